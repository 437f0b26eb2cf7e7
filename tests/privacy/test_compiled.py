"""The engine trains a model in a compiled graph as it does in eager code, in every strategy.

The fast tests run the ops of the graph without a compiler; the slow ones compile.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from dpkernels import PrivacyEngine

KEY = bytes.fromhex("1d" * 32)
Losses = Callable[[Any, Any], Tensor]


class Model(nn.Module):
    """A table, attention and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(9, 8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.table(ids))
        y, _ = self.attention(h, h, h, need_weights=False)
        return self.last(self.norm(y + h)).mean(1)


def losses_of(model: Any, batch: Any) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def trained(compile_with: Callable[[nn.Module], tuple[Any, Losses]], **run: Any) -> dict[str, Tensor]:
    """The parameters after three steps in micro-batches of two shapes."""
    torch.manual_seed(0)
    model = Model()
    ids = torch.randint(0, 9, (24, 6))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="noise_key|no self_check|noise_multiplier")
        _, optimizer, loader = PrivacyEngine(noise_key=KEY).make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
            data_loader=DataLoader(TensorDataset(ids, ids[:, 0] % 3), batch_size=16),
            noise_multiplier=0.1,
            max_grad_norm=0.3,
            physical_batch_size=6,
            steps=3,
            **run,
        )
        called, losses = compile_with(model)
        for logical_batch in loader:
            for place, (rows, labels) in enumerate(logical_batch):
                optimizer.backward(losses(called, (rows[:, : 6 - place % 2], labels)))
            optimizer.step()
            optimizer.zero_grad()
    return copy.deepcopy(dict(model.named_parameters()))


def check_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-5, atol=1e-6)


STRATEGIES = ["bookkeeping", "mixed", "two_pass", "per_layer"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_in_the_ops_of_a_graph_is_the_eager_one(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_ops(model: nn.Module) -> tuple[Any, Losses]:
        def run(x: Tensor) -> Any:
            with monkeypatch.context() as patch:
                patch.setattr(torch.compiler, "is_compiling", lambda: True)
                return model(x)

        return run, losses_of

    check_same(
        trained(lambda model: (model, losses_of), strategy=strategy), trained(in_ops, strategy=strategy)
    )


def after(model: nn.Module) -> tuple[Any, Losses]:
    return torch.compile(model, backend="aot_eager"), losses_of


def in_place(model: nn.Module) -> tuple[Any, Losses]:
    model.compile(backend="aot_eager")
    return model, losses_of


def of_the_loss(model: nn.Module) -> tuple[Any, Losses]:
    return model, torch.compile(losses_of, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("way", [after, in_place, of_the_loss])
def test_a_compiled_step_is_the_eager_one(way: Callable[..., Any], strategy: str) -> None:
    torch._dynamo.reset()
    check_same(trained(lambda model: (model, losses_of), strategy=strategy), trained(way, strategy=strategy))
