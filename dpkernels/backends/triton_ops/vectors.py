"""Helpers of families whose per-sample gradient is a small vector, and the last step of every norm."""

import torch
import triton.language as tl
from torch import Tensor

from dpkernels.backends.triton_ops import launching
from dpkernels.backends.triton_ops.device import error_of, float64_of, upper_square
from dpkernels.backends.triton_ops.launching import float64_bits, kernel, launch, scratch


@kernel
def finish_norms(
    partials,
    out,
    pieces: int,
    entries: int,
    scale_high: int,
    scale_low: int,
    ROUNDINGS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[i] = (|s|√Σ squares + |s|e)² rounded up, over a sample's pieces in order; one program a sample."""
    sample = tl.program_id(0).to(tl.int64)
    square = tl.zeros((), tl.float64)
    magnitude = tl.zeros((), tl.float64)
    for first in range(0, pieces, BLOCK):
        piece = first + tl.arange(0, BLOCK)
        at = partials + (sample * pieces + piece) * 2
        square += tl.sum(tl.load(at, mask=piece < pieces, other=0.0), axis=0)
        magnitude += tl.sum(tl.load(at + 1, mask=piece < pieces, other=0.0), axis=0)
    error = error_of(magnitude, entries, ROUNDINGS)
    scale = tl.abs(float64_of(scale_high, scale_low))
    tl.store(out + sample, upper_square(square * scale * scale, error * scale))


def finish(partials: Tensor, entries: int, roundings: float, scaling: float = 1.0) -> Tensor:
    """‖G_i‖², rounded up, from each sample's pieces of it.

    Args:
        partials: [B, pieces, 2] float64: of every piece the sum of squares of its entries, and the sum of squares of
            bounds on what their terms add up to in absolute value (Σ_t |a_t||b_t| for each entry, or Σ_t ‖a_t‖‖b_t‖
            for a block of entries). A frame that adds nothing must not be in them.
        entries: of one sample's gradient.
        roundings: κ of the norm's sums and of the weighted sum's, whichever is larger (`bounds.sum_roundings`).
        scaling: s, for |s|·‖G_i‖.

    Returns:
        [B] float32.
    """
    out = torch.empty(partials.shape[0], dtype=torch.float32, device=partials.device)
    launch(
        finish_norms,
        partials.shape[0],
        out,
        partials,
        out,
        partials.shape[1],
        entries,
        *float64_bits(scaling),
        ROUNDINGS=roundings,
    )
    return out


@kernel
def add_weighted(sums, factors, out, batch: int, entries: int, BLOCK: tl.constexpr):
    """out += Σ_i c_i sums_i in order, in float64; a row with factor 0 is not read. factors: None means 1."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < entries
    total = tl.load(out + entry, mask=inside, other=0.0).to(tl.float64)
    at = sums + entry
    for i in range(0, batch):
        if factors is None:
            total += tl.load(at, mask=inside, other=0.0)
        else:
            factor = tl.load(factors + i).to(tl.float64)
            total += factor * tl.load(at, mask=entry < tl.where(factor != 0.0, entries, 0), other=0.0)
        at += entries
    tl.store(out + entry, total.to(out.dtype.element_ty), mask=inside)


def add(sums: Tensor, factors: Tensor | None, out: Tensor) -> None:
    """out += Σ_i factors_i sums_i for dense float64 sums [n, ...], `out` of shape [...] in any strides."""
    entries, total = out.numel(), launching.dense(out)
    assert total is not None
    block = launching.tile_of(add_weighted, total, "BLOCK")
    launch(
        add_weighted,
        launching.tiles(entries, block),
        total,
        sums,
        launching.dense(factors),
        total,
        len(sums),
        entries,
    )
    if total is not out:
        out.copy_(total)


__all__ = ["add", "finish", "scratch"]
