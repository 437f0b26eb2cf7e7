"""Transposed convolutions of every dimension, and Conv3d: the checks are those of test_conv.py."""

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
    Conv3dRecord,
    DepthwiseConv1dRecord,
    ExpandedRecord,
    GhostConv3d,
    GhostConvTranspose1d,
    GhostConvTranspose2d,
    LinearRecord,
    attach,
    ghost_subclass,
    register_swap,
    swap,
    uncovered,
)
from dpkernels.nn.convert.swapping import _ORIGINALS, _SWAPS
from dpkernels.nn.layers import conv_records
from tests.nn.layers.test_conv import check, never_materialised, squares
from tests.nn.per_sample import check_private, run_private

__all__ = ["never_materialised"]  # a fixture that is used by all tests

SPACE = {1: (7,), 2: (5, 4), 3: (3, 4, 3)}
CONV3D: list[tuple[tuple[Any, ...], dict[str, Any], type]] = [
    ((3, 4, 1), {}, LinearRecord),
    ((2, 4, 2), {"stride": (1, 2, 1), "padding": 1}, Conv3dRecord),
    ((4, 4, (1, 3, 2)), {"groups": 2, "dilation": (1, 1, 2), "bias": False}, Conv3dRecord),
    ((3, 3, 2), {"groups": 3, "padding": "same"}, ExpandedRecord),
    ((2, 3, 3), {"padding": "same"}, Conv3dRecord),
    ((2, 3, 2), {"padding": 1, "padding_mode": "circular"}, Conv3dRecord),
    ((2, 3, 2), {"padding": 1, "padding_mode": "replicate"}, Conv3dRecord),
]
# output_padding above padding, below it, and above the stride (where dilation allows it)
TRANSPOSED: list[tuple[int, tuple[Any, ...], dict[str, Any], type]] = [
    (1, (4, 6, 1), {}, LinearRecord),
    (1, (4, 6, 1), {"stride": 2}, Conv1dRecord),
    (1, (4, 6, 3), {"stride": 2, "padding": 1, "output_padding": 1}, Conv1dRecord),
    (1, (4, 6, 3), {"stride": 3, "output_padding": 2, "groups": 2}, Conv1dRecord),
    (1, (4, 6, 3), {"stride": 1, "dilation": 3, "padding": 1, "output_padding": 2}, Conv1dRecord),
    (1, (4, 4, 3), {"stride": 2, "padding": 2, "groups": 4}, DepthwiseConv1dRecord),
    (1, (4, 4, 3), {"stride": 2, "padding": 2, "output_padding": 1, "groups": 4}, DepthwiseConv1dRecord),
    (1, (4, 4, 3), {"stride": 2, "output_padding": 1, "groups": 4, "bias": False}, DepthwiseConv1dRecord),
    (1, (4, 4, 3), {"dilation": 3, "padding": 1, "output_padding": 2, "groups": 4}, DepthwiseConv1dRecord),
    (1, (4, 2, 3), {"stride": 2, "output_padding": 1, "groups": 2}, ExpandedRecord),
    (1, (2, 4, 3), {"groups": 2, "padding": 1}, Conv1dRecord),
    (1, (1, 1, 3), {"stride": 2}, DepthwiseConv1dRecord),
    (2, (3, 5, 3), {"stride": 2, "padding": 1, "output_padding": (1, 0)}, Conv2dRecord),
    (2, (4, 6, (3, 2)), {"groups": 2, "dilation": (1, 2), "stride": (2, 1), "bias": False}, Conv2dRecord),
    (2, (4, 4, 2), {"groups": 4, "stride": 2, "padding": 1, "output_padding": (0, 1)}, ExpandedRecord),
    (2, (4, 4, 2), {"groups": 4, "dilation": 3, "padding": 1, "output_padding": (2, 1)}, ExpandedRecord),
    (3, (2, 3, 2), {"stride": 2, "padding": 1, "output_padding": (1, 0, 1)}, Conv3dRecord),
    (3, (4, 2, (1, 2, 3)), {"groups": 2, "dilation": (1, 1, 2)}, ExpandedRecord),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.thinned(5)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", range(len(CONV3D)))
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_conv3d(case: int, dtype: torch.dtype) -> None:
    args, kwargs, kind = CONV3D[case]
    check(nn.Conv3d(*args, **kwargs, dtype=dtype), torch.randn(3, args[0], *SPACE[3]).to(dtype), kind)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", range(len(TRANSPOSED)))
def test_transposed(case: int, dtype: torch.dtype) -> None:
    n, args, kwargs, kind = TRANSPOSED[case]
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[n - 1](*args, **kwargs, dtype=dtype)
    check(layer, torch.randn(3, args[0], *SPACE[n]).to(dtype), kind)


class Sized(nn.Module):
    """Sizes that the layer alone does not give: torch finds the output padding from them."""

    def __init__(self, layer: Any, size: list[int]) -> None:
        super().__init__()
        self.layer, self.size = layer, size

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(x), self.size)


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.ConvTranspose1d(4, 5, 3, stride=3, padding=1), [21]),
        (nn.ConvTranspose2d(4, 5, 3, stride=2, padding=1), [10, 7]),
        (nn.ConvTranspose3d(4, 2, 2, stride=2), [7, 8, 7]),
    ],
)
def test_output_size(layer: Any, size: list[int]) -> None:
    x = torch.randn(3, 4, *SPACE[len(size)], dtype=torch.float64)
    model = Sized(layer.double(), size)
    private = check_private(model, squares, (x,))
    assert torch.equal(private.losses, squares(model, x))
    attach(swap(model))
    with pytest.raises(ValueError, match="output size"):
        model.layer(x, [99] * len(size))


def test_without_a_batch_dimension() -> None:
    for layer, x in (
        (nn.ConvTranspose1d(4, 4, 3), torch.randn(4, 9)),
        (nn.ConvTranspose2d(4, 4, 3), torch.randn(4, 9, 5)),
        (nn.Conv3d(4, 4, 3), torch.randn(4, 4, 5, 3)),
    ):
        ghost: Any = swap(copy.deepcopy(layer))
        tape = attach(ghost)
        y = ghost(x)
        assert torch.equal(y, layer(x))
        tape.open(1)
        y.sum().backward()
        assert [r.batch_size for r in tape.close()] == [1, 1]


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parts(frozen: str) -> None:
    plain = nn.Sequential(nn.ConvTranspose1d(4, 4, 3), nn.ConvTranspose1d(4, 4, 3, stride=2))
    for layer in plain:
        getattr(layer, frozen).requires_grad_(False)
    check_private(plain, squares, (torch.randn(3, 4, 9),))


def test_autocast() -> None:
    for plain in (nn.ConvTranspose1d(4, 6, 3), nn.ConvTranspose1d(4, 4, 3, groups=4)):
        ghost = swap(copy.deepcopy(plain))
        tape = attach(ghost)
        x = torch.randn(3, 4, 9)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, want = ghost(x), plain(x)
        assert y.dtype is want.dtype
        assert torch.equal(y, want)
        tape.open(3)
        y.float().sum().backward()
        assert all(r.norm_sq().isfinite().all() for r in tape.close())


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.ConvTranspose1d(4, 4, 3, padding=1),
        lambda: nn.ConvTranspose1d(4, 4, 3, padding=1, groups=4),
        lambda: nn.ConvTranspose1d(4, 4, 3, padding=1, groups=2),
        lambda: nn.ConvTranspose2d(4, 4, 3, padding=1, stride=2, output_padding=1),
        lambda: nn.ConvTranspose2d(4, 4, 1),
        lambda: nn.Conv3d(4, 4, 3, padding=1),
    ],
)
def test_reused_layers_merge(make: Any) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = make()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    model = Twice().double()
    space = SPACE[len(model.layer.kernel_size)]
    private = check_private(model, squares, (torch.randn(3, 4, *space, dtype=torch.float64),))
    assert len(private.records) == 2  # the weight's and the bias's


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1)])
def test_an_encoder_and_its_decoder_may_share_their_weight(kernel: int, stride: int) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Conv1d(4, 6, kernel, stride=stride)
            self.decoder = nn.ConvTranspose1d(6, 4, kernel, stride=stride, bias=False)
            self.decoder.weight = self.encoder.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder(torch.tanh(self.encoder(x)))

    private = check_private(Tied().double(), squares, (torch.randn(3, 4, 9, dtype=torch.float64),))
    assert sum(isinstance(r, BiasRecord) for r in private.records) == 1
    assert len(private.records) == 2


@pytest.mark.parametrize("samples", [1, 2])
def test_windows_are_made_a_few_samples_at_a_time(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the memory for them, every sample's norm has the same bits, and the sums are the same."""
    layer = nn.Conv3d(4, 4, 2, groups=2)
    x = torch.randn(5, 4, *SPACE[3])
    whole = run_private(swap(copy.deepcopy(layer)), squares, (x,), torch.rand(5))
    windows = 2 * 3 * 2 * 16 * 4  # bytes of a sample's, of a group
    made: list[int] = []
    unfold = conv_records.unfold

    def noted(x: Tensor, *geometry: Any) -> Tensor:
        made.append(len(x))
        return unfold(x, *geometry)

    monkeypatch.setattr(conv_records, "unfold", noted)
    monkeypatch.setattr(conv_records, "CPU_WINDOW_BYTES", samples * windows)
    parts = run_private(swap(copy.deepcopy(layer)), squares, (x,), torch.ones(5))
    assert max(made) == samples
    assert torch.equal(parts.norm_sq, whole.norm_sq)
    check_private(layer, squares, (x,))
    record: Any = next(r for r in parts.records if isinstance(r, Conv3dRecord))
    made.clear()
    (materialised,) = record.materialised()
    assert max(made) == samples
    torch.testing.assert_close(materialised.norm_sq(), record.norm_sq(), rtol=1e-3, atol=0)
    assert len(materialised.g) == 5


def test_a_large_layer_of_ones_own_can_be_given_a_rule() -> None:
    class Own(nn.ConvTranspose2d):
        def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
            return super().forward(self.squashed(x), output_size)

        def squashed(self, x: Tensor) -> Tensor:
            return x.tanh()

    model = nn.Sequential(Own(64, 128, 3))
    assert [u.name for u in uncovered(swap(model))] == ["0.weight"]  # its bias is small
    ghost = ghost_subclass(Own, GhostConvTranspose2d)
    register_swap(Own, ghost)
    try:
        check_private(nn.Sequential(Own(4, 3, 3)), squares, (torch.randn(3, 4, 5, 4),))
    finally:
        del _SWAPS[Own], _ORIGINALS[ghost]


def test_gradcheck() -> None:
    """The plain path's gradients, and the private path's of its input."""
    for layer, space in (
        (GhostConvTranspose1d(2, 2, 3, stride=2, output_padding=1), (4,)),
        (GhostConv3d(2, 2, 2), (2, 3, 2)),
    ):
        x = torch.randn(2, 2, *space, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(layer.double(), (x,))
        tape = attach(layer)

        def forward(x: Tensor, layer: Any = layer, tape: Any = tape) -> Tensor:
            tape.discard()
            y = layer(x)
            tape.open(2)
            return y

        assert torch.autograd.gradcheck(forward, (x,))
        tape.discard()
