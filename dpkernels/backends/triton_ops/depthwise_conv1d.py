"""Depthwise conv1d: Σ_t g_ct x_c(ts + jδ − π) for channels c and taps j, its norm and weighted sum.

A program computes BC channels of one sample and K taps. BT threads share its frames, EACH neighbouring ones a thread at
a time, so that a frame of x that several of them use is read once into a register, and otherwise from L1. Only border
tiles have masks.

Products are added in float32, one sum for each thread, over SPAN frames, and all else is float64: a term meets its
product's rounding and at most SPAN/BT others. The bound: tap (c, j) is off by at most γ Σ_t |g x|, which the norm adds
up too. ‖x_c‖‖g_c‖ would cost one addition a frame and not one a product, but padding adds to it: a convolution's input
is rarely 0 there, though its output gradient is.
"""

import triton
import triton.language as tl
from torch import Tensor

from dpkernels.backends.triton_ops import bounds, configs, launching, vectors
from dpkernels.backends.triton_ops.device import TINIEST, times
from dpkernels.backends.triton_ops.launching import (
    aligned,
    dense,
    float64_by_torch,
    kernel,
    scratch,
    tiles,
)

MOST_TAPS = 11
"""The taps of one program, whose sums are in registers: a longer filter is divided evenly among programs."""

_VECTOR = 8
"""Channels that strides are multiples of, where the compiler may read several at once."""


@triton.jit
def placed(places, LAST: tl.constexpr):
    """Frames along their axis of a tile: the one whose neighbours are adjacent in memory is the second."""
    if LAST:
        return places[:, None]
    else:
        return places[None, :]


@triton.jit
def added(
    sums,
    terms,
    met,
    x_tile,
    x_step,
    g_tile,
    g_step,
    here,
    at,
    n,
    place,
    x_frames,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    EACH: tl.constexpr,
    WHOLE: tl.constexpr,
    NORMS: tl.constexpr,
):
    """`sums`, one tile for each tap, and the products of EACH frames from `at` on, whose first tap is at `place`.

    A frame that several taps meet is loaded by name for each; the compiler loads it once. WHOLE: all exist. With
    NORMS also `terms`, the sums of the products' absolute values, and `met`: where any factors were both not 0.
    """
    for r in tl.static_range(EACH):
        read = here & (at + r < n)
        if WHOLE:
            b = tl.load(g_tile + r * g_step).to(tl.float32)
        else:
            b = tl.load(g_tile + r * g_step, mask=read, other=0.0).to(tl.float32)
        after, after_terms = (), ()
        for j in tl.static_range(K):
            shift = r * STRIDE + j * DILATION
            if WHOLE:
                a = tl.load(x_tile + shift * x_step)
            else:
                exists = read & (place + shift >= 0) & (place + shift < x_frames)
                a = tl.load(x_tile + shift * x_step, mask=exists, other=0.0)
            product = a.to(tl.float32) * b
            after += (sums[j] + product,)  # type: ignore[assignment]
            if NORMS:
                after_terms += (terms[j] + tl.abs(product),)  # type: ignore[assignment]
                met = tl.where((a != 0.0) & (b != 0.0), 1, met)
        sums = after
        if NORMS:
            terms = after_terms
    return sums, terms, met


@triton.jit
def zeros(K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, dtype: tl.constexpr):
    """K tiles."""
    zero_tiles = ()
    for _ in tl.static_range(K):
        zero_tiles += (tl.zeros((ROWS, COLUMNS), dtype),)  # type: ignore[assignment]
    return zero_tiles


@triton.jit
def widened(totals, sums, K: tl.constexpr):
    """K float64 tiles, and the float32 ones of a span added to them."""
    after = ()
    for j in tl.static_range(K):
        after += (totals[j] + sums[j].to(tl.float64),)  # type: ignore[assignment]
    return after


@kernel
def depthwise_conv1d_sums(
    x,
    x_b: int,
    x_step: int,
    g,
    g_b: int,
    g_step: int,
    factors,
    out,
    channels: int,
    x_frames: int,
    g_frames: int,
    taps: int,
    padding: int,
    across: int,
    pieces: int,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    K: tl.constexpr,
    LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    BC: tl.constexpr,
    BT: tl.constexpr,
    EACH: tl.constexpr,
    SPAN: tl.constexpr,
):
    """One program a (sample, BC channels, K taps): squares for the norm, or with factors the sums themselves.

    Frames are adjacent and x_step, g_step a channel's stride; with LAST channels are adjacent and they are a frame's.
    """
    program = tl.program_id(0)
    channels = times(channels, ALIGN)
    sample, piece = program // pieces, program % pieces
    first_channel, first_tap = (piece // across) * BC, (piece % across) * K
    channel = first_channel + tl.arange(0, BC)
    x_base = x + times(sample.to(tl.int64) * x_b, ALIGN)
    g_base = g + times(sample.to(tl.int64) * g_b, ALIGN)
    if LAST:
        one = tl.full((), 1, tl.int64)
        x_frame, g_frame = times(one * x_step, ALIGN), times(one * g_step, ALIGN)
        x_base, g_base = x_base + channel[None, :], g_base + channel[None, :]
        here = (channel < channels)[None, :]
    else:
        x_frame, g_frame = 1, 1
        x_base += channel.to(tl.int64)[:, None] * x_step
        g_base += channel.to(tl.int64)[:, None] * g_step
        here = (channel < channels)[:, None]
    shift = first_tap * DILATION - padding
    n = g_frames
    if factors is not None:
        n = tl.where(tl.load(factors + sample) != 0.0, g_frames, 0)
    offsets = placed(tl.arange(0, BT) * EACH, LAST)
    x_tile = x_base + offsets.to(tl.int64) * STRIDE * x_frame
    g_tile = g_base + offsets.to(tl.int64) * g_frame
    full = first_channel + BC <= channels
    totals = zeros(K, BT if LAST else BC, BC if LAST else BT, tl.float64)
    all_terms = zeros(K if factors is None else 0, BT if LAST else BC, BC if LAST else BT, tl.float64)
    met = tl.zeros((BT if LAST else BC, BC if LAST else BT), tl.int32)
    for first in range(0, n, SPAN):
        end = tl.minimum(first + SPAN, n)
        sums = zeros(K, BT if LAST else BC, BC if LAST else BT, tl.float32)
        terms = zeros(K if factors is None else 0, BT if LAST else BC, BC if LAST else BT, tl.float32)
        for t in range(first, end, BT * EACH):
            place = t * STRIDE + shift
            x_at, g_at = x_tile + place.to(tl.int64) * x_frame, g_tile + t * g_frame
            inside = (place >= 0) & (place + (BT * EACH - 1) * STRIDE + (K - 1) * DILATION < x_frames)
            at, start = t + offsets, place + offsets * STRIDE
            if full & inside & (t + BT * EACH <= end):
                sums, terms, met = added(
                    sums, terms, met, x_at, x_frame, g_at, g_frame, here, at, end, start, x_frames,
                    K, STRIDE, DILATION, EACH, True, factors is None,
                )  # fmt: skip
            else:
                sums, terms, met = added(
                    sums, terms, met, x_at, x_frame, g_at, g_frame, here, at, end, start, x_frames,
                    K, STRIDE, DILATION, EACH, False, factors is None,
                )  # fmt: skip
        totals = widened(totals, sums, K)
        all_terms = widened(all_terms, terms, K if factors is None else 0)
    square = tl.zeros((BC,), tl.float64)
    magnitude = tl.zeros((BC,), tl.float64)
    entry = (sample.to(tl.int64) * channels + channel) * taps + first_tap
    for j in tl.static_range(K):
        total = tl.sum(totals[j], axis=0 if LAST else 1)
        if factors is None:
            square += tl.where(first_tap + j < taps, total * total, 0.0)
            total = tl.sum(all_terms[j], axis=0 if LAST else 1)
            magnitude += tl.where(first_tap + j < taps, total * total, 0.0)
        else:
            tl.store(out + entry + j, total, mask=channel < tl.where(first_tap + j < taps, channels, 0))
    if factors is None:
        # where all products underflowed to 0, the bound is not 0
        least = tl.where(tl.sum(tl.max(met, axis=1), axis=0) > 0, TINIEST, 0.0)
        tl.store(out + program.to(tl.int64) * 2, tl.sum(square, axis=0))
        tl.store(out + program.to(tl.int64) * 2 + 1, tl.maximum(tl.sum(magnitude, axis=0), least))


def _channels_last(x: Tensor) -> bool:
    """Whether channels are adjacent in memory, and frames are not. A stride over one entry means nothing."""
    _, channels, frames = x.shape
    return x.stride(1) == 1 and channels > 1 and frames > 1 and x.stride(2) != 1


def _config(x: Tensor, last: bool) -> configs.Config:
    name = "depthwise_conv1d_sums channels_last" if last else "depthwise_conv1d_sums"
    return configs.config(name, x.dtype, launching.architecture(x.device))


def _rows(tensor: Tensor, last: bool) -> Tensor:
    """With adjacent channels or else adjacent frames: itself, or a copy."""
    turned = tensor.transpose(1, 2) if last else tensor
    if turned.shape[2] > 1 and turned.stride(2) != 1:
        turned = turned.contiguous()
    turned = aligned(turned)
    return turned.transpose(1, 2) if last else turned


def _pieces(x: Tensor, taps: int) -> tuple[int, int, int]:
    """(taps a program, programs across the taps, programs a sample)."""
    across = tiles(taps, MOST_TAPS)
    return tiles(taps, across), across, across * tiles(x.shape[1], _config(x, _channels_last(x)).tiles["BC"])


def _launch(
    x: Tensor,
    g: Tensor,
    factors: Tensor | None,
    out: Tensor,
    taps: int,
    stride: int,
    padding: int,
    dilation: int,
) -> None:
    batch, channels, x_frames = x.shape
    size, across, pieces = _pieces(x, taps)
    if batch * pieces == 0:
        return
    last = _channels_last(x)
    x, g = _rows(x, last), _rows(g, last)
    # of a sample, and of a channel or of a frame; 0 over one entry
    steps = [
        stride if size > 1 else 0
        for t in (x, g)
        for stride, size in ((t.stride(n), t.shape[n]) for n in (0, 2 if last else 1))
    ]
    align = _VECTOR if last and not any(n % _VECTOR for n in (*steps, channels)) else 1
    x_b, x_step, g_b, g_step = (n // align for n in steps)
    of_x, of_g, counts = (x, x_b, x_step), (g, g_b, g_step), (taps, padding, across, pieces)
    launching.execute(
        depthwise_conv1d_sums,
        batch * pieces,
        x.device,
        (*of_x, *of_g, dense(factors), out, channels // align, x_frames, g.shape[2], *counts),
        _config(x, last).options
        | {"STRIDE": stride, "DILATION": dilation, "K": size, "LAST": last, "ALIGN": align},
    )


@float64_by_torch
def depthwise_conv1d_norm_sq(
    x: Tensor, g: Tensor, *, kernel_size: int, stride: int = 1, padding: int = 0, dilation: int = 1
) -> Tensor:
    """‖Σ_t g_ct x_ct'‖² over c and j, rounded up; see `dpkernels.ops.depthwise_conv1d_norm_sq`."""
    partials = scratch(x, len(x), _pieces(x, kernel_size)[2], 2)
    _launch(x, g, None, partials, kernel_size, stride, padding, dilation)
    # the sum may meet the same tensors in another layout
    sizes = [_config(x, last).tiles for last in (False, True)]
    chain = max(size["SPAN"] // size["BT"] for size in sizes)
    entries = x.shape[1] * kernel_size
    return vectors.finish(partials, entries, bounds.sum_roundings(chain, bounds.ROUNDINGS_FMA, pieces=0))


@float64_by_torch
def depthwise_conv1d_weighted_sum(
    x: Tensor,
    g: Tensor,
    factors: Tensor,
    out: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> None:
    """out[c, 0, j] += Σ_i c_i Σ_t g_ict x_ict'; see `dpkernels.ops.depthwise_conv1d_weighted_sum`."""
    taps = out.shape[2]
    sums = scratch(x, len(x), x.shape[1], taps)
    _launch(x, g, factors, sums, taps, stride, padding, dilation)
    vectors.add(sums, factors, out)
