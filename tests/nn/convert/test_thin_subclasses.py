"""Subclasses of torch's layers: swapped where their parameters do what the torch layer's do, else left as they are."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dpkernels.nn import (
    EmbeddingRecord,
    GhostConv2d,
    GhostEmbedding,
    GhostLayerNorm,
    GhostLinear,
    LinearRecord,
    swap,
    uncovered,
    unswap,
)
from dpkernels.nn.thin import is_thin
from tests.nn.per_sample import assert_same_module, check_private


class Renamed(nn.Linear):
    """Nothing of its own."""


class Scaled(nn.Embedding):
    def __init__(self, *sizes: int, scale: float, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.scale


class ScaledTwice(Scaled):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).to(self.weight.dtype) * 2


class ChannelsFirst(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Padded(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, [1, 1, 1, 1]))


class NotScaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.weight.norm()


class Aliased(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + getattr(self, "bias")  # noqa: B009


class OnItsOwn(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, torch.ones(3, 4))


class InALambda(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return (lambda y: y * self.weight.mean())(super().forward(input))


class Helped(nn.Linear):
    def factor(self) -> Tensor:
        return self.weight.mean()

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.factor()


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight.tanh(), bias)


class OwnWeight(nn.Linear):
    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return found * 2 if name == "weight" else found


def doubled(forward: Any) -> Any:
    @functools.wraps(forward)
    def call(self: Any, input: Tensor) -> Tensor:
        return forward(self, input) * self.weight.norm()

    return call


class Decorated(nn.Linear):
    @doubled
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


THIN = [
    (lambda: Renamed(4, 3), GhostLinear, torch.randn(3, 4)),
    (
        lambda: Scaled(6, 3, scale=3.0, padding_idx=1),
        GhostEmbedding,
        torch.tensor([[1, 2, 1], [0, 1, 5], [1, 1, 4]]),
    ),
    (lambda: ScaledTwice(6, 3, scale=3.0), GhostEmbedding, torch.tensor([[1, 2], [0, 1], [5, 5]])),
    (lambda: ChannelsFirst(4), GhostLayerNorm, torch.randn(3, 4, 2, 3)),
    (lambda: Padded(4, 3, 3), GhostConv2d, torch.randn(4, 4, 3, 3)),
]
NOT_THIN = [NotScaled, Aliased, OnItsOwn, InALambda, Helped, OwnConvolution, OwnWeight, Decorated]


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().flatten(1).sum(1)


@pytest.mark.parametrize(("make", "ghost", "x"), THIN)
def test_a_thin_subclass_is_swapped_and_right(make: Any, ghost: type[nn.Module], x: Tensor) -> None:
    layer = make().double()
    x = x.double() if x.is_floating_point() else x
    own = type(layer)
    check_private(nn.Sequential(layer), loss, (x,))
    swapped = swap(copy.deepcopy(layer))
    assert isinstance(swapped, ghost)
    assert isinstance(swapped, own)
    assert_same_module(layer, swapped)
    assert type(unswap(swapped)) is own


def test_a_thin_embedding_records_ids_and_heeds_its_padding() -> None:
    model = nn.Sequential(Scaled(6, 3, scale=2.0, padding_idx=1), nn.Linear(3, 2)).double()
    private = check_private(model, loss, (torch.tensor([[1, 2], [1, 1], [3, 4]]),))
    kinds = {type(record) for record in private.records}
    assert {EmbeddingRecord, LinearRecord} <= kinds
    assert float(private.sums["0.weight"][1].abs().sum()) == 0


@pytest.mark.parametrize("own", NOT_THIN)
def test_what_uses_a_parameter_itself_is_not(own: type[nn.Module]) -> None:
    assert not is_thin(own, own.__mro__[1])
    sizes = (4, 3, 2) if issubclass(own, nn.Conv2d) else (4, 3)
    assert type(swap(own(*sizes))) is own


def test_a_parametrised_layer_is_no_thin_subclass() -> None:
    layer = parametrizations.weight_norm(nn.Linear(3, 3))
    assert isinstance(layer, nn.Linear)
    assert not isinstance(swap(layer), GhostLinear)
    assert uncovered(layer)


@pytest.mark.parametrize("option", ["padding_idx", "max_norm", "sparse", "scale_grad_by_freq"])
def test_an_embedding_of_its_own_is_refused_where_expansion_would_lose_an_option(option: str) -> None:
    """Under vmap a lookup is an index: its backward gave the padding row a gradient (M2M-100, PLBart)."""
    value: Any = {"padding_idx": 0, "max_norm": 1.0}.get(option, True)
    model = nn.Sequential(NotScaled(4, 3, **{option: value}))
    [found] = uncovered(swap(model))
    assert option in found.reason
    assert uncovered(swap(nn.Sequential(NotScaled(4, 3)))) == []
