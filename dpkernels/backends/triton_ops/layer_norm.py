"""LayerNorm and RMSNorm weights: Σ_t x̂_it ⊙ g_it, its norm and weighted sum, one read of x̂ and of g.

Products of BT frames are computed and added in float32, and those sums in float64, so a term meets its product's
rounding and at most BT others. The bound is per entry: the error of entry j is at most γ Σ_t |x̂_tj g_tj|, and the
kernel also sums these magnitudes.
"""

import triton
import triton.language as tl
from torch import Tensor

from dpkernels.backends.triton_ops import bounds, vectors
from dpkernels.backends.triton_ops.device import TINIEST, frames_of, load_rows, sample_at, times
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


@triton.jit
def magnitudes(a, b, product):
    """|a·b| of float32 entries, and more than 0 where a product of entries other than 0 underflowed to 0."""
    return tl.where((product == 0.0) & (a != 0.0) & (b != 0.0), TINIEST, tl.abs(product))


@kernel
def layer_norm_sums(
    x,
    x_b: int,
    x_t: int,
    x_n: int,
    x_width: int,
    g,
    g_b: int,
    g_t: int,
    g_n: int,
    g_width: int,
    lengths,
    factors,
    out,
    frames: int,
    strips: int,
    X_ALIGN: tl.constexpr,
    G_ALIGN: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    """One program a (sample, strip of BN features): squares for the norm, or with factors the sums themselves."""
    program = tl.program_id(0)
    x_width, g_width = times(x_width, X_ALIGN), times(g_width, G_ALIGN)
    sample, strip = program // strips, program % strips
    columns = strip * BN + tl.arange(0, BN)
    x_base, g_base = sample_at(x, sample, x_b, X_ALIGN), sample_at(g, sample, g_b, G_ALIGN)
    n = frames_of(lengths, sample, frames)
    if factors is not None:
        n = tl.where(tl.load(factors + sample) != 0.0, n, 0)
    total = tl.zeros((BN,), tl.float64)
    magnitude = tl.zeros((BN,), tl.float64)
    for t in range(0, n, BT):
        at = t + tl.arange(0, BT)
        a = load_rows(x_base, at, columns, n, x_width, x_t, x_n, X_ALIGN).to(tl.float32)
        b = load_rows(g_base, at, columns, n, g_width, g_t, g_n, G_ALIGN).to(tl.float32)
        total += tl.sum(a * b, axis=0).to(tl.float64)
        if factors is None:
            magnitude += tl.sum(magnitudes(a, b, a * b), axis=0).to(tl.float64)
    if factors is None:
        tl.store(out + program.to(tl.int64) * 2, tl.sum(total * total, axis=0))
        tl.store(out + program.to(tl.int64) * 2 + 1, tl.sum(magnitude * magnitude, axis=0))
    else:
        tl.store(out + sample.to(tl.int64) * g_width + columns, total, mask=columns < g_width)


def _launch(x_hat: Tensor, g: Tensor, lengths: Tensor | None, factors: Tensor | None, out: Tensor) -> None:
    batch, frames, width = g.shape
    strips = tiles(width, tile_of(layer_norm_sums, g, "BN"))
    (x_view, x_align), (g_view, g_align) = rows(x_hat), rows(g)
    launch(
        layer_norm_sums,
        batch * strips,
        g,
        *x_view,
        *g_view,
        dense(lengths),
        dense(factors),
        out,
        frames,
        strips,
        X_ALIGN=x_align,
        G_ALIGN=g_align,
    )


@float64_by_torch
def layer_norm_norm_sq(x_hat: Tensor, g: Tensor, *, lengths: Tensor | None = None) -> Tensor:
    """‖Σ_t x̂_it ⊙ g_it‖², rounded up; see `dpkernels.ops.layer_norm_norm_sq`."""
    batch, _, width = g.shape
    partials = scratch(g, batch, tiles(width, tile_of(layer_norm_sums, g, "BN")), 2)
    _launch(x_hat, g, lengths, None, partials)
    chain = tile_of(layer_norm_sums, g, "BT")
    return vectors.finish(partials, width, bounds.sum_roundings(chain, bounds.ROUNDINGS_FMA, pieces=0))


@float64_by_torch
def layer_norm_weighted_sum(
    x_hat: Tensor, g: Tensor, factors: Tensor, out: Tensor, *, lengths: Tensor | None = None
) -> None:
    """out += Σ_i c_i Σ_t x̂_it ⊙ g_it; see `dpkernels.ops.layer_norm_weighted_sum`."""
    sums = scratch(g, len(g), g.shape[2])
    _launch(x_hat, g, lengths, factors, sums)
    vectors.add(sums, factors, out)
