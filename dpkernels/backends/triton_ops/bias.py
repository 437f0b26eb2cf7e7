"""Bias: Σ_t g_it, its norm and weighted sum, with one read of g.

Frames are added in float32, BT at a time, and those sums in float64, so a term meets at most BT float32 roundings. The
bound is per entry: the error of entry j is at most γ Σ_t |g_tj|, and the kernel also sums these magnitudes. An entry of
which one frame alone is not 0 is exact: padding does not give it a bound, and a materialised gradient has none either.
"""

import triton.language as tl
from torch import Tensor

from dpkernels.backends.triton_ops import bounds, vectors
from dpkernels.backends.triton_ops.device import frames_added, frames_of, load_rows, sample_at, times
from dpkernels.backends.triton_ops.launching import (
    dense,
    float64_by_torch,
    kernel,
    launch,
    rows,
    scratch,
    tile_of,
    tiles,
)


@kernel
def bias_sums(
    g,
    g_b: int,
    g_t: int,
    g_n: int,
    width: int,
    lengths,
    factors,
    out,
    frames: int,
    strips: int,
    ALIGN: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    """One program a (sample, strip of BN features): squares for the norm, or with factors the sums themselves."""
    program, width = tl.program_id(0), times(width, ALIGN)
    sample, strip = program // strips, program % strips
    columns = strip * BN + tl.arange(0, BN)
    base = sample_at(g, sample, g_b, ALIGN)
    n = frames_of(lengths, sample, frames)
    if factors is not None:
        n = frames_added(tl.load(factors + sample), lengths, sample, frames)
    total = tl.zeros((BN,), tl.float64)
    magnitude = tl.zeros((BN,), tl.float64)
    addends = tl.zeros((BN,), tl.int32)
    for t in range(0, n, BT):
        block = load_rows(base, t + tl.arange(0, BT), columns, n, width, g_t, g_n, ALIGN).to(tl.float32)
        total += tl.sum(block, axis=0).to(tl.float64)
        if factors is None:
            magnitude += tl.sum(tl.abs(block), axis=0).to(tl.float64)
            addends += tl.sum((block != 0.0).to(tl.int32), axis=0)
    if factors is None:
        magnitude = tl.where(addends > 1, magnitude, 0.0)
        tl.store(out + program.to(tl.int64) * 2, tl.sum(total * total, axis=0))
        tl.store(out + program.to(tl.int64) * 2 + 1, tl.sum(magnitude * magnitude, axis=0))
    else:
        tl.store(out + sample.to(tl.int64) * width + columns, total, mask=columns < width)


@float64_by_torch
def bias_norm_sq(g: Tensor, *, lengths: Tensor | None = None) -> Tensor:
    """‖Σ_t g_it‖², rounded up; see `dpkernels.ops.bias_norm_sq`."""
    batch, frames, width = g.shape
    strips = tiles(width, tile_of(bias_sums, g, "BN"))
    partials = scratch(g, batch, strips, 2)
    view, align = rows(g)
    launch(bias_sums, batch * strips, g, *view, dense(lengths), None, partials, frames, strips, ALIGN=align)
    chain = tile_of(bias_sums, g, "BT")
    return vectors.finish(partials, width, bounds.sum_roundings(chain, bounds.ROUNDINGS_FMA, pieces=0))


@float64_by_torch
def bias_weighted_sum(g: Tensor, factors: Tensor, out: Tensor, *, lengths: Tensor | None = None) -> None:
    """out += Σ_i c_i Σ_t g_it; see `dpkernels.ops.bias_weighted_sum`."""
    batch, frames, width = g.shape
    strips, factors = tiles(width, tile_of(bias_sums, g, "BN")), factors.contiguous()
    sums = scratch(g, batch, width)
    view, align = rows(g)
    launch(
        bias_sums,
        batch * strips,
        g,
        *view,
        dense(lengths),
        dense(factors),
        sums,
        frames,
        strips,
        ALIGN=align,
    )
    vectors.add(sums, factors, out)
