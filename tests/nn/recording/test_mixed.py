"""Random models of all layer types, parts frozen, reused or checkpointed, against one-by-one gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpkernels.nn import GhostLoRALinear, freeze_batch_norm
from tests.nn.per_sample import check_private

WIDTH = 4


class Transposed(nn.Module):
    """A convolution or batch norm over [B,T,C]."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(1, 2)).transpose(1, 2)


class Image(nn.Module):
    """A 2-d convolution over [B,1,T,C]."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.unsqueeze(1)).squeeze(1)


class Raw(nn.Module):
    """A raw parameter beside a child."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.gain.view(1, 1, -1)


def lora() -> nn.Module:
    layer = GhostLoRALinear(WIDTH, WIDTH, r=2)
    nn.init.normal_(layer.lora_B)
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "no bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "lora": lora,
    "conv": lambda: Transposed(nn.Conv1d(WIDTH, WIDTH, 3, padding=1)),
    "depthwise": lambda: Transposed(nn.Conv1d(WIDTH, WIDTH, 3, padding=2, dilation=2, groups=WIDTH)),
    "pointwise": lambda: Transposed(nn.Conv1d(WIDTH, WIDTH, 1)),
    "image": Image,
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "rms norm": lambda: nn.RMSNorm(WIDTH),
    "batch norm": lambda: Transposed(nn.BatchNorm1d(WIDTH)),
    "group norm": lambda: Transposed(nn.GroupNorm(2, WIDTH)),
    "raw": Raw,
    "prelu": lambda: nn.PReLU(),
}


class Model(nn.Module):
    def __init__(self, kinds: list[str], order: list[int], checkpointed: bool, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, WIDTH)
        self.layers = nn.ModuleList(LAYERS[kind]() for kind in kinds)
        self.head = nn.Linear(WIDTH, 6, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.order, self.checkpointed = [i % len(kinds) for i in order], checkpointed

    def body(self, x: Tensor) -> Tensor:
        for i in self.order:
            x = x + torch.tanh(self.layers[i](x))
        return x

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)
        return self.head(x)


def squares(model: nn.Module, ids: Tensor) -> Tensor:
    return (model(ids) ** 2).flatten(1).sum(1)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kinds=st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=5),
    order=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    checkpointed=st.booleans(),
    tied=st.booleans(),
    frozen=st.sets(st.integers(0, 20), max_size=6),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    seed=st.integers(0, 1000),
)
def test_random_models(
    kinds: list[str],
    order: list[int],
    checkpointed: bool,
    tied: bool,
    frozen: set[int],
    shape: tuple[int, int],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    model = freeze_batch_norm(Model(kinds, order, checkpointed, tied)).double()
    for i, p in enumerate(model.parameters()):
        if i in frozen:
            p.requires_grad_(False)
    assume(any(p.requires_grad for p in model.parameters()))
    check_private(model, squares, (torch.randint(0, 6, shape),))
