"""Depthwise conv1d: Σ_t g_ct x_c(ts + jδ − π) for channels c and taps j, its norm and weighted sum.

A program takes BC channels and BK taps of one sample and reads their frames once from memory; that every tap loads its
own shift of x is the cache's work, as neighbouring taps share all but one frame. Products are added in float32 in BT
separate sums over SPAN frames, those BT to one another in float32, and the results in float64: a term meets its
product's rounding and at most SPAN/BT + BT others, or as many as there are frames. The bound: tap (c, j) is off by at
most γ Σ_t |g x| ≤ γ ‖x_c‖‖g_c‖ (Cauchy and Schwarz), whose squares cost one addition a frame and not one a product.
"""

import triton.language as tl
from torch import Tensor

from dpkernels.backends.triton_ops import vectors
from dpkernels.backends.triton_ops.launching import (
    aligned,
    dense,
    float64_by_torch,
    kernel,
    launch,
    scratch,
    tile_of,
    tiles,
)

TAPS = (8, 16)
"""Taps of one program: enough for the filter, or the most, and the filter is shared out among several programs."""


@kernel
def depthwise_conv1d_sums(
    x,
    x_b: int,
    x_c: int,
    x_t: int,
    g,
    g_b: int,
    g_c: int,
    g_t: int,
    factors,
    out,
    channels: int,
    x_frames: int,
    g_frames: int,
    taps: int,
    stride: int,
    padding: int,
    dilation: int,
    across: int,
    pieces: int,
    BK: tl.constexpr,
    BC: tl.constexpr,
    BT: tl.constexpr,
    SPAN: tl.constexpr,
):
    """One program a (sample, BC channels, BK taps): squares for the norm, or with factors the sums themselves."""
    program = tl.program_id(0)
    sample, piece = program // pieces, program % pieces
    channel = (piece // across) * BC + tl.arange(0, BC)
    tap = (piece % across) * BK + tl.arange(0, BK)
    here, inside = channel < channels, (channel < channels)[:, None] & (tap < taps)[None, :]
    x_rows = x + sample.to(tl.int64) * x_b + channel.to(tl.int64) * x_c
    g_rows = g + sample.to(tl.int64) * g_b + channel.to(tl.int64) * g_c
    shift = tap * dilation - padding
    n = g_frames
    if factors is not None:
        n = tl.where(tl.load(factors + sample) != 0.0, g_frames, 0)
    total = tl.zeros((BC, BK), tl.float64)
    of_g = tl.zeros((BC,), tl.float64)
    for first in range(0, n, SPAN):
        sums = tl.zeros((BC, BK, BT), tl.float32)
        for t in range(first, tl.minimum(first + SPAN, n), BT):
            at = t + tl.arange(0, BT)
            b = tl.load(
                g_rows[:, None] + at.to(tl.int64)[None, :] * g_t,
                mask=here[:, None] & (at < n)[None, :],
                other=0.0,
            ).to(tl.float32)
            place = at[None, :] * stride + shift[:, None]
            read = (at < n)[None, :] & (place >= 0) & (place < x_frames)
            a = tl.load(
                x_rows[:, None, None] + place.to(tl.int64)[None, :, :] * x_t,
                mask=inside[:, :, None] & read[None, :, :],
                other=0.0,
            ).to(tl.float32)
            sums += a * b[:, None, :]
            if factors is None:
                of_g += tl.sum(b.to(tl.float64) * b.to(tl.float64), axis=1)
        total += tl.sum(sums, axis=2).to(tl.float64)
    if factors is None:
        of_x = tl.zeros((BC,), tl.float64)
        for t in range(0, x_frames, SPAN):
            at = t + tl.arange(0, SPAN)
            mask = here[:, None] & (at < x_frames)[None, :]
            c = tl.load(x_rows[:, None] + at.to(tl.int64)[None, :] * x_t, mask=mask, other=0.0).to(tl.float64)
            of_x += tl.sum(c * c, axis=1)
        own = tl.sum((tap < taps).to(tl.float64), axis=0)
        tl.store(out + program.to(tl.int64) * 2, tl.sum(tl.sum(total * total, axis=1), axis=0))
        tl.store(out + program.to(tl.int64) * 2 + 1, own * tl.sum(of_x * of_g, axis=0))
    else:
        entry = (sample.to(tl.int64) * channels + channel)[:, None] * taps + tap[None, :]
        tl.store(out + entry, total, mask=inside)


def _pieces(x: Tensor, taps: int) -> tuple[int, int, int]:
    """(taps a program, programs across the taps, programs a sample)."""
    size = next((size for size in TAPS if size >= taps), TAPS[-1])
    across = tiles(taps, size)
    return size, across, across * tiles(x.shape[1], tile_of(depthwise_conv1d_sums, x, "BC"))


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Of [B, C, T]; 0 where there is one entry, whose stride means nothing."""
    return tuple(s if n > 1 else 0 for s, n in zip(tensor.stride(), tensor.shape, strict=True))


def _launch(
    x: Tensor,
    g: Tensor,
    factors: Tensor | None,
    out: Tensor,
    taps: int,
    geometry: tuple[int, int, int],
) -> None:
    batch, channels, x_frames = x.shape
    size, across, pieces = _pieces(x, taps)
    x, g = aligned(x), aligned(g)
    launch(
        depthwise_conv1d_sums,
        batch * pieces,
        x,
        x,
        *_strides(x),
        g,
        *_strides(g),
        dense(factors),
        out,
        channels,
        x_frames,
        g.shape[2],
        taps,
        *geometry,
        across,
        pieces,
        BK=size,
    )


@float64_by_torch
def depthwise_conv1d_norm_sq(
    x: Tensor, g: Tensor, *, kernel_size: int, stride: int = 1, padding: int = 0, dilation: int = 1
) -> Tensor:
    """‖Σ_t g_ct x_ct'‖² over c and j, rounded up; see `dpkernels.ops.depthwise_conv1d_norm_sq`."""
    partials = scratch(x, len(x), _pieces(x, kernel_size)[2], 2)
    _launch(x, g, None, partials, kernel_size, (stride, padding, dilation))
    entries, block = x.shape[1] * kernel_size, tile_of(depthwise_conv1d_sums, x, "BT")
    chain = block + tile_of(depthwise_conv1d_sums, x, "SPAN") // block
    return vectors.finish(partials, None, g.shape[2], entries, per_term=1, chain=chain, wide=True)


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
    _launch(x, g, factors, sums, taps, (stride, padding, dilation))
    vectors.add(sums, factors, out)
