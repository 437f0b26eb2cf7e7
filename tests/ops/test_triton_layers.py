"""Embeddings, norm layers and depthwise convolutions in Triton: shapes that meet every branch of their kernels."""

import itertools
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpkernels import ops
from dpkernels.backends import triton_ops
from dpkernels.backends.triton_ops import configs, vectors
from tests.ops.tolerances import DTYPES, MEAN_EXCESS, SUM_OFF
from tests.slow import in_turns, slow_unless

WIDTH = 5


def gradients(x: Tensor, g: Tensor, taps: int, geometry: dict[str, int]) -> Tensor:
    """Per-sample gradients [B, C, 1, k] of a depthwise convolution, float64."""
    found = []
    for one, its_g in zip(x.double(), g.double(), strict=True):
        w = torch.zeros(x.shape[1], 1, taps, dtype=torch.float64, requires_grad=True)
        y = F.conv1d(one[None], w, groups=x.shape[1], **geometry)[0]
        found.append(torch.autograd.grad(y, w, its_g)[0])
    return torch.stack(found)


def check(norm_sq: Tensor, exact: Tensor) -> None:
    """Norms [B] not below those of the exact gradients [B, ...], and not far above."""
    excess = norm_sq.double() / exact.flatten(1).square().sum(1) - 1
    assert float(excess.min()) >= 0
    assert float(excess.max()) <= MEAN_EXCESS


def channels_last(tensor: Tensor) -> Tensor:
    """[B, C, T] as a speech model has it that keeps [B, T, C]: channels are adjacent."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def every_other(tensor: Tensor) -> Tensor:
    """With nothing adjacent, and NaN between."""
    return torch.stack((tensor, torch.full_like(tensor, torch.nan)), dim=-1)[..., 0]


LAYOUTS = {"contiguous": Tensor.contiguous, "channels last": channels_last, "every other": every_other}


TAPS = [(1, "contiguous"), (11, "channels last"), (12, "contiguous"), (33, "contiguous")]


# around depthwise_conv1d.MOST_TAPS
@pytest.mark.thinned(4)
@pytest.mark.parametrize(
    ("taps", "layout"),
    slow_unless(
        lambda taps, layout: (taps, layout) in TAPS,
        itertools.product([1, 5, 9, 11, 12, 31, 33], ["contiguous", "channels last"]),
    ),
)
def test_any_number_of_taps(triton_backend: str, taps: int, layout: str) -> None:
    geometry = {"stride": 1, "padding": taps // 2, "dilation": 1}
    frames = 50  # more than two tiles, so that one has no border
    shapes = (2, WIDTH, frames), (2, WIDTH, frames + 2 * (taps // 2) - taps + 1)
    x, g = (LAYOUTS[layout](torch.randn(shape)) for shape in shapes)
    exact = gradients(x, g, taps, geometry)
    check(ops.depthwise_conv1d_norm_sq(x, g, kernel_size=taps, **geometry), exact)
    out = torch.zeros(WIDTH, 1, taps, dtype=torch.float64)
    ops.depthwise_conv1d_weighted_sum(x, g, torch.tensor([0.5, 2.0]), out, **geometry)
    torch.testing.assert_close(out, 0.5 * exact[0] + 2 * exact[1], rtol=1e-5, atol=1e-5)


@pytest.mark.thinned(5)
@pytest.mark.parametrize(
    "geometry",
    [
        {"stride": 3, "padding": 0, "dilation": 1},
        {"stride": 2, "padding": 7, "dilation": 3},  # whole windows of padding
        {"stride": 1, "padding": 2, "dilation": 5},
        {"stride": 5, "padding": 1, "dilation": 2},
    ],
)
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float64])
def test_strides_paddings_and_dilations(
    triton_backend: str, geometry: dict[str, int], dtype: torch.dtype
) -> None:
    taps, frames = 4, 47
    after = (frames + 2 * geometry["padding"] - geometry["dilation"] * (taps - 1) - 1) // geometry[
        "stride"
    ] + 1
    x, g = torch.randn(2, WIDTH, frames).to(dtype), torch.randn(2, WIDTH, after).to(dtype)
    check(ops.depthwise_conv1d_norm_sq(x, g, kernel_size=taps, **geometry), gradients(x, g, taps, geometry))


@pytest.mark.parametrize(("layout", "config"), [("contiguous", ""), ("channels last", " channels_last")])
def test_more_frames_than_one_float32_sum_takes(triton_backend: str, layout: str, config: str) -> None:
    span = configs.CONFIGS["depthwise_conv1d_sums" + config][4, configs.ANY].tiles["SPAN"]
    x, g = (LAYOUTS[layout](torch.randn(1, 2, 2 * span + 70)) for _ in range(2))
    geometry = {"stride": 1, "padding": 1, "dilation": 1}
    check(ops.depthwise_conv1d_norm_sq(x, g, kernel_size=3, **geometry), gradients(x, g, 3, geometry))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("channels", "dtype"),
    [(7, torch.float32), (8, torch.bfloat16), pytest.param(72, torch.bfloat16, marks=pytest.mark.slow)],
)
def test_layouts_of_a_convolution(triton_backend: str, channels: int, dtype: torch.dtype) -> None:
    """Widths with and without whole tiles and vectors; with what is not adjacent in x, g is not either."""
    x, g = torch.randn(2, channels, 37).to(dtype), torch.randn(2, channels, 37).to(dtype)
    geometry = {"stride": 1, "padding": 2, "dilation": 2}
    exact, factors = gradients(x, g, 3, geometry), torch.tensor([0.5, 2.0])
    results = {}
    for of_x, of_g in itertools.product(LAYOUTS, LAYOUTS):
        placed = LAYOUTS[of_x](x), LAYOUTS[of_g](g)
        norm_sq = ops.depthwise_conv1d_norm_sq(*placed, kernel_size=3, **geometry)
        check(norm_sq, exact)
        out = torch.zeros(channels, 1, 3, dtype=torch.float64)
        ops.depthwise_conv1d_weighted_sum(*placed, factors, out, **geometry)
        torch.testing.assert_close(out, 0.5 * exact[0] + 2 * exact[1], rtol=1e-5, atol=1e-5)
        results[of_x, of_g] = norm_sq, out
    for (of_x, _), pair in results.items():  # g's layout decides nothing
        assert all(torch.equal(a, b) for a, b in zip(pair, results[of_x, of_x], strict=True))


@pytest.mark.parametrize(("scale_x", "scale_g"), [(1e-25, 1e20), (1e25, 1e-20), (0.0, 1e30), (1e-42, 1e-42)])
def test_a_convolutions_bound_holds_where_squares_leave_float32(
    triton_backend: str, scale_x: float, scale_g: float
) -> None:
    x, g = torch.randn(2, WIDTH, 40) * scale_x, torch.randn(2, WIDTH, 40) * scale_g
    geometry = {"stride": 1, "padding": 1, "dilation": 1}
    exact = gradients(x, g, 3, geometry).flatten(1).square().sum(1)
    given = ops.depthwise_conv1d_norm_sq(x, g, kernel_size=3, **geometry)
    assert (given.double() >= exact).all()
    if scale_x == 0.0:
        assert not given.any()
    elif scale_x * scale_g > 1e-30:
        assert (given.double() <= exact * 1.02).all()


@pytest.mark.parametrize(("stride", "frames"), [(1, 2100), (3, 700)])
def test_the_bound_of_a_convolution_counts_every_frame(triton_backend: str, stride: int, frames: int) -> None:
    """One program's sums of absolute values, beside float64 ones of all that its taps meet: hardly below."""
    x, g = torch.randn(1, 8, (frames - 1) * stride + 5), torch.randn(1, 8, frames)
    with mock.patch.object(vectors, "finish") as finish:
        triton_ops.depthwise_conv1d_norm_sq(x, g, kernel_size=5, stride=stride)
    magnitude = float(finish.call_args.args[0][..., 1].sum())
    exact = float(gradients(x.abs(), g.abs(), 5, {"stride": stride}).square().sum())
    assert exact * (1 - 2.0**-15) <= magnitude <= exact * (1 + 2.0**-15)


def table_gradients(ids: Tensor, g: Tensor, rows: int, padding_idx: int | None = None) -> Tensor:
    """Per-sample gradients [B, V, d] of a table, float64."""
    full = torch.zeros(len(ids), rows, g.shape[2], dtype=torch.float64)
    kept = g.double() if padding_idx is None else g.double() * (ids != padding_idx)[..., None]
    return full.scatter_add_(1, ids[..., None].expand_as(g), kept)


IDS: dict[str, Any] = {
    "all equal": lambda b, t: torch.full((b, t), 3),
    "all distinct": lambda b, t: torch.stack([torch.randperm(t) for _ in range(b)]),
    "one hot id": lambda b, t: torch.randint(0, 40, (b, t)) * (torch.rand(b, t) < 0.3),
    "only padding": lambda b, t: torch.full((b, t), 1),
}


@pytest.mark.thinned(6)
@pytest.mark.parametrize(("kind", "dtype"), in_turns(IDS, [d for d in DTYPES if d != torch.float64]))
def test_runs_of_equal_ids(triton_backend: str, kind: str, dtype: torch.dtype) -> None:
    ids, g = IDS[kind](3, 40), torch.randn(3, 40, 7).to(dtype)
    exact = table_gradients(ids, g, 41, padding_idx=1)
    norms = ops.embedding_norm_sq(ids, g, padding_idx=1)
    if kind == "only padding":
        assert not norms.any()
    else:
        check(norms, exact)
    factors, start = torch.tensor([0.5, 0.0, 2.0]), torch.randn(41, 7, dtype=torch.float64)
    for out in (start.clone(), start.float()):
        ops.embedding_weighted_sum(ids, g, factors, out, padding_idx=1)
        truth = start + 0.5 * exact[0] + 2 * exact[2]
        off = SUM_OFF[dtype] * float(g.double().norm()) * 7 if out.dtype == torch.float64 else 1e-5
        assert float((out - truth).norm()) <= off
        untouched = torch.ones(41, dtype=torch.bool).index_fill_(0, ids[[0, 2]].flatten().unique(), False)
        assert torch.equal(
            out[untouched | (torch.arange(41) == 1)], start.to(out.dtype)[untouched | (torch.arange(41) == 1)]
        )


@pytest.mark.parametrize("kept", [3, 21])
def test_padding_tokens_do_not_change_an_embeddings_bits(triton_backend: str, kept: int) -> None:
    ids, g = torch.randint(2, 9, (2, kept)), torch.randn(2, kept, 5)
    long_ids, long_g = torch.ones(2, 37, dtype=torch.int64), torch.full((2, 37, 5), torch.nan)
    place = torch.randperm(37)[:kept].sort().values
    long_ids[:, place], long_g[:, place] = ids, g
    given = ops.embedding_norm_sq(long_ids, long_g, padding_idx=1)
    assert torch.equal(given, ops.embedding_norm_sq(ids, g, padding_idx=1))


def test_what_cancels_in_a_sample_never_rounds_a_neighbours_share(triton_backend: str) -> None:
    """One example's tokens of 2⁶⁰ cancel; added one by one to the others' they would leave nothing of them."""
    ids = torch.zeros(3, 20, dtype=torch.int64)
    g = torch.randn(3, 20, 4)
    g[1] = 0
    g[1, 3], g[1, 17] = 2.0**60, -(2.0**60)
    out = torch.zeros(1, 4, dtype=torch.float64)
    ops.embedding_weighted_sum(ids, g, torch.ones(3), out)
    torch.testing.assert_close(out[0], g[[0, 2]].double().sum((0, 1)), rtol=1e-5, atol=1e-5)


def test_an_id_outside_the_table_touches_nothing(triton_backend: str) -> None:
    """A GPU does not look at ids: the kernel leaves such ones out. Called past the op's check, which the CPU has."""
    memory = torch.zeros(6, 4, dtype=torch.float64)
    ids = torch.tensor([[0, 3, -1, 9, 2**40, 1]])
    triton_ops.embedding_weighted_sum(ids, torch.ones(1, 6, 4), torch.ones(1), memory[1:4])
    assert memory[:, 0].tolist() == [0, 1, 1, 0, 0, 0]
