"""The claim everything rests on: one backward gives the sum of one-by-one clipped gradients.

For random models that mix the layer types, trained through the public engine without noise, the parameters move by
exactly the float64 sum of clipped per-sample gradients: in each dtype, with and without padding, with micro-batches,
with inputs shared between layers, with tied and reused weights, and with frozen parts.
"""

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpkernels

FEATURES, FRAMES, WORDS = 12, 9, 11
# Relative L2 distance to the float64 sum: the forward and backward of the model itself round in the model's dtype, and
# norms are rounded up by the bound of a sum of any length, by some 10⁻⁵ here.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2}


class SharedInput(nn.Module):
    """Three projections that read one tensor, as q, k and v do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=index == 0) for index in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) * torch.sigmoid(self.k(x)) + self.v(x)


class Transposed(nn.Module):
    """A layer over [B, C, T] inside a model that keeps [B, T, C]."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(1, 2)).transpose(1, 2)


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Twice(nn.Module):
    """One layer used twice: its two uses have cross terms."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "linear": lambda width: nn.Linear(width, width),
    "shared input": SharedInput,
    "lora": lambda width: dpkernels.GhostLoRALinear(width, width, r=3, alpha=6),
    "layer norm": lambda width: nn.LayerNorm(width),
    "rms norm": lambda width: nn.RMSNorm(width),
    "depthwise": lambda width: Transposed(nn.Conv1d(width, width, 3, padding=1, groups=width)),
    "pointwise": lambda width: Transposed(nn.Conv1d(width, width, 1)),
    "convolution": lambda width: Transposed(nn.Conv1d(width, width, 3, padding=1)),
    "reused": Twice,
    "expanded": lambda width: Transposed(nn.PReLU(width, init=0.1)),
    "grouped": lambda width: Transposed(nn.Conv1d(width, width, 3, padding=1, groups=2)),
}


class Model(nn.Module):
    """Word ids [B, T] to one loss per sample [B]; frames at and beyond a sample's length do not count."""

    def __init__(self, names: list[str], seed: int, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(WORDS, FEATURES)
        self.layers = nn.ModuleList(Residual(LAYERS[name](FEATURES)) for name in names)
        self.head = nn.Linear(FEATURES, WORDS)
        if tied:
            self.head.weight = self.embedding.weight
        for name, parameter in self.named_parameters():
            if "lora_B" in name:  # zero at the start, which would leave A without a gradient
                nn.init.normal_(parameter, std=0.2)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        keep = (torch.arange(ids.shape[1])[None] < lengths[:, None]).unsqueeze(-1)
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(torch.where(keep, x, 0))
        scores = torch.where(keep, self.head(x), 0).float()
        targets = (ids * 3 + 1) % WORDS
        losses = nn.functional.cross_entropy(scores.transpose(1, 2), targets, reduction="none")
        return (losses * keep.squeeze(-1)).sum(1)


def clipped_sum_one_by_one(model: Model, ids: Tensor, lengths: Tensor, bound: float) -> dict[str, Tensor]:
    """Σ_i min(1, C/‖g_i‖)·g_i in float64, each g_i from a backward of its own over an unpadded sample."""
    model = copy.deepcopy(model).double()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in trained.items()}
    for row, length in zip(ids, lengths, strict=True):
        loss = model(row[None, : int(length)], length[None]).sum()
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        filled = [
            torch.zeros_like(p) if g is None else g for g, p in zip(gradients, trained.values(), strict=True)
        ]
        norm = torch.stack([g.square().sum() for g in filled]).sum().sqrt()
        for name, gradient in zip(trained, filled, strict=True):
            total[name] += gradient * min(1.0, bound / float(norm))
    return total


def private_sum(
    model: Model, ids: Tensor, lengths: Tensor, bound: float, micro_batch: int
) -> dict[str, Tensor]:
    """What one noiseless step of the engine moves the parameters by, times the expected batch size."""
    before = {name: p.detach().double().clone() for name, p in model.named_parameters() if p.requires_grad}
    data = TensorDataset(ids, lengths)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no noise is asked for on purpose
        model, optimizer, loader = dpkernels.PrivacyEngine().make_private(
            module=model,
            optimizer=optimizer,
            data_loader=DataLoader(data, batch_size=len(data)),  # q = 1: every sample is drawn
            noise_multiplier=0.0,
            max_grad_norm=bound,
            physical_batch_size=micro_batch,
        )
        optimizer.keep_gradients = True
        for micro_batches in loader:
            for batch_ids, batch_lengths in micro_batches:
                optimizer.backward(model(batch_ids, batch_lengths))
            gradients: dict[str, Tensor] = {}
            optimizer.step()
            gradients.update(
                {n: p.grad.detach().double() * len(data) for n, p in model.named_parameters() if n in before}
            )
            break
    return gradients


def relative_distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys()
    difference = sum(float((left[name] - right[name]).square().sum()) for name in left)
    return (difference / sum(float(t.square().sum()) for t in right.values())) ** 0.5


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    names=st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
    padded=st.booleans(),
    tied=st.booleans(),
    micro_batch=st.integers(1, 6),
    frozen=st.integers(0, 2),
    bound=st.sampled_from([0.05, 1.0, 1e4]),
)
def test_random_models(
    names: list[str], seed: int, padded: bool, tied: bool, micro_batch: int, frozen: int, bound: float
) -> None:
    model = Model(names, seed, tied)
    if frozen == 1:
        model.embedding.requires_grad_(False)
    if frozen == 2:
        model.layers[0].requires_grad_(False)
    ids = torch.randint(WORDS, (6, FRAMES))
    lengths = torch.randint(1, FRAMES + 1, (6,)) if padded else torch.full((6,), FRAMES)
    expected = clipped_sum_one_by_one(model, ids, lengths, bound)
    actual = private_sum(model, ids, lengths, bound, micro_batch)
    assert relative_distance(actual, expected) < TOLERANCE[torch.float32]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(LAYERS))
def test_each_layer_in_each_dtype(name: str, dtype: torch.dtype) -> None:
    model = Model([name], seed=3).to(dtype)
    ids, lengths = torch.randint(WORDS, (5, FRAMES)), torch.tensor([1, 4, 9, 9, 2])
    expected = clipped_sum_one_by_one(model, ids, lengths, 0.5)
    actual = private_sum(model, ids, lengths, 0.5, micro_batch=2)
    assert relative_distance(actual, expected) < TOLERANCE[dtype]


def test_the_comparison_sees_a_wrong_clip() -> None:
    """Planted fault: clipping at 1 % more than asked is far outside the tolerance."""
    model = Model(["linear", "lora"], seed=1)
    ids, lengths = torch.randint(WORDS, (5, FRAMES)), torch.full((5,), FRAMES)
    expected = clipped_sum_one_by_one(model, ids, lengths, 0.05)
    actual = private_sum(model, ids, lengths, 0.05 * 1.01, micro_batch=2)
    assert relative_distance(actual, expected) > 10 * TOLERANCE[torch.float32]
