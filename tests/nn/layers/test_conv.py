from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpkernels.nn import (
    BiasRecord,
    Conv1dRecord,
    Conv2dRecord,
    ConvRecord,
    DepthwiseConv1dRecord,
    ExpandedRecord,
    GhostConv1d,
    GhostConv2d,
    LinearRecord,
    Tape,
    attach,
    detach,
    swap,
    unswap,
)
from tests.nn.per_sample import assert_same_module, check_private


@pytest.fixture(autouse=True)
def never_materialised(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are about the ghost rules; test_materialised.py forms the same layers' gradients."""
    monkeypatch.setattr(Tape, "_materialises", lambda *_: False)


def squares(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    y = y if y.dtype is torch.float64 else y.float()
    return (y * y).flatten(1).sum(1)


CONV1D: list[tuple[tuple[int, ...], dict[str, Any], type]] = [
    ((4, 6, 1), {}, LinearRecord),
    ((4, 6, 1), {"stride": 2}, Conv1dRecord),
    ((4, 6, 3), {"padding": 1}, Conv1dRecord),
    ((4, 6, 3), {"stride": 2, "padding": 2, "dilation": 2}, Conv1dRecord),
    ((4, 6, 3), {"groups": 2, "bias": False}, Conv1dRecord),
    ((4, 4, 3), {"groups": 4, "padding": 1}, DepthwiseConv1dRecord),
    ((4, 4, 4), {"groups": 4, "padding": 2, "stride": 2, "dilation": 2}, DepthwiseConv1dRecord),
    ((4, 8, 3), {"groups": 4, "padding": 1, "stride": 2}, ExpandedRecord),
    ((4, 4, 4), {"groups": 4, "padding": "same"}, DepthwiseConv1dRecord),
    ((4, 6, 3), {"padding": "same", "dilation": 2}, Conv1dRecord),
    ((4, 6, 4), {"padding": "same"}, Conv1dRecord),
    ((4, 6, 3), {"padding": "valid"}, Conv1dRecord),
    ((4, 6, 3), {"padding": 2, "padding_mode": "reflect"}, Conv1dRecord),
    ((4, 6, 3), {"padding": 2, "padding_mode": "circular"}, Conv1dRecord),
    ((4, 4, 3), {"padding": 1, "padding_mode": "replicate", "groups": 4}, DepthwiseConv1dRecord),
    ((1, 6, 3), {}, Conv1dRecord),
]
CONV2D: list[tuple[tuple[Any, ...], dict[str, Any], type]] = [
    ((3, 5, 1), {}, LinearRecord),
    ((1, 5, 3), {"stride": 2, "padding": 1}, Conv2dRecord),
    ((3, 5, (3, 2)), {"padding": (2, 1), "dilation": (1, 2)}, Conv2dRecord),
    ((4, 6, 3), {"groups": 2}, Conv2dRecord),
    ((4, 4, 3), {"groups": 4, "stride": 2, "padding": 1}, ExpandedRecord),
    ((4, 8, (3, 2)), {"groups": 4, "dilation": (2, 1), "bias": False}, ExpandedRecord),
    ((3, 5, 3), {"padding": "same"}, Conv2dRecord),
    ((3, 5, 3), {"padding": 1, "padding_mode": "reflect"}, Conv2dRecord),
]


@pytest.mark.thinned(5)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", range(len(CONV1D)))
def test_conv1d(case: int, dtype: torch.dtype) -> None:
    args, kwargs, kind = CONV1D[case]
    check(nn.Conv1d(*args, **kwargs, dtype=dtype), torch.randn(3, args[0], 9).to(dtype), kind)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", range(len(CONV2D)))
def test_conv2d(case: int, dtype: torch.dtype) -> None:
    args, kwargs, kind = CONV2D[case]
    check(nn.Conv2d(*args, **kwargs, dtype=dtype), torch.randn(3, args[0], 7, 8).to(dtype), kind)


def check(plain: Any, x: Tensor, kind: type) -> None:
    ghost = swap(copy.deepcopy(plain))
    assert type(ghost).__name__ == f"Ghost{type(plain).__name__}"
    assert_same_module(plain, ghost)
    assert torch.equal(plain(x), ghost(x))
    tape = attach(ghost)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y1, y2 = plain(x1), ghost(x2)
    assert torch.equal(y1, y2)
    tape.open(len(x))
    (y1 * y1).sum().backward()
    (y2 * y2).sum().backward()
    records = tape.close()
    assert torch.equal(x1.grad, x2.grad)
    assert type(records[0]) is kind
    assert type(unswap(detached(ghost))) is type(plain)
    attach(swap(ghost))
    detach(ghost, unswap=True)
    assert type(ghost) is type(plain)
    # An activation before it, so that x needs a gradient there and g is not the loss's own.
    check_private(nn.Sequential(nn.Tanh(), plain, nn.Tanh()), squares, (x,))


def detached(model: nn.Module) -> nn.Module:
    detach(model)
    return model


def test_without_a_batch_dimension() -> None:
    plain = nn.Conv1d(4, 4, 3)
    ghost = swap(copy.deepcopy(plain))
    tape = attach(ghost)
    x = torch.randn(4, 9)
    y = ghost(x)
    assert torch.equal(y, plain(x))
    tape.open(1)
    y.sum().backward()
    assert [r.batch_size for r in tape.close()] == [1, 1]


def test_only_the_bias_trained_keeps_no_input() -> None:
    plain = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 3))
    for layer in plain:
        layer.weight.requires_grad_(False)
    check_private(plain, squares, (torch.randn(3, 4, 9),))


def test_autocast() -> None:
    plain = nn.Conv1d(4, 6, 3)
    ghost = swap(copy.deepcopy(plain))
    tape = attach(ghost)
    x = torch.randn(3, 4, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, want = ghost(x), plain(x)
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, want)
    tape.open(3)
    y.float().sum().backward()
    assert all(r.norm_sq().isfinite().all() for r in tape.close())


@pytest.mark.parametrize("kwargs", [{}, {"groups": 4}, {"groups": 4, "stride": 2, "dilation": 2}])
def test_reused_convolution_merges(kwargs: dict[str, Any]) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv1d(4, 4, 3, padding=1, **kwargs)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    private = check_private(Twice(), squares, (torch.randn(3, 4, 11),))
    assert len(private.records) == 2  # the weight's and the bias's


@pytest.mark.parametrize("strides", [(1, 2), (2, 1)])
def test_general_and_pointwise_uses_of_one_weight_merge_as_linear(strides: tuple[int, int]) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv1d(4, 4, 1, stride=n, bias=False) for n in strides)
            self.layers[1].weight = self.layers[0].weight

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](torch.tanh(self.layers[0](x)))

    private = check_private(Tied(), squares, (torch.randn(3, 4, 9),))
    assert [type(r) for r in private.records] == [LinearRecord]


@pytest.mark.parametrize(("kind", "space"), [(Conv1dRecord, (5,)), (Conv2dRecord, (5, 4))])
def test_a_record_without_geometry_is_of_torchs_defaults(
    kind: type[ConvRecord], space: tuple[int, ...]
) -> None:
    kernel = (2,) * len(space)
    x, g = torch.randn(2, 3, *space), torch.randn(2, 4, *(n - 1 for n in space))
    (materialised,) = kind("layer", nn.Parameter(torch.zeros(4, 3, *kernel)), x, g).materialised()
    convolve = nn.functional.conv1d if len(space) == 1 else nn.functional.conv2d
    for i in range(2):
        weight = torch.zeros(4, 3, *kernel, requires_grad=True)
        (want,) = torch.autograd.grad(convolve(x[i], weight), weight, g[i])
        torch.testing.assert_close(materialised.g[i], want)


def test_reused_grouped_convolution_is_materialised() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv1d(4, 4, 3, padding=1, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    private = check_private(Twice(), squares, (torch.randn(3, 4, 9),))
    assert {type(r) for r in private.records} == {ExpandedRecord, BiasRecord}


def test_gradcheck_in_the_plain_path() -> None:
    layer = GhostConv1d(2, 2, 3).double()
    x = torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    image = torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(GhostConv2d(2, 2, 2).double(), (image,))
