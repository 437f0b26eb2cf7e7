"""Embeddings: g summed over equal ids of a sample, its norm; and the same sums, weighted, added to the table's rows.

Positions are sorted by id (torch.sort, stable, so the order is unique), and a program adds the run
of equal ids that begins at its position; programs of other positions return at once. The host does not wait for the
device, and no two programs write to one row. Rows of g are added BT at a time in float32, and those sums in float64.

A sample's kept ids are sorted to the front, so that neither the rest of the batch nor padding tokens move them.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from dpkernels.backends.triton_ops import bounds, vectors
from dpkernels.backends.triton_ops.device import load_rows, sample_at, times
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

_LAST = torch.iinfo(torch.int64).max


@kernel
def embedding_squares(
    ids,
    order,
    ends,
    kept,
    g,
    g_b: int,
    g_t: int,
    g_n: int,
    width: int,
    partials,
    frames: int,
    strips: int,
    ALIGN: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    """One program a (sample, sorted position, strip of BN features): squares of the sum of the run beginning there."""
    program, width = tl.program_id(0), times(width, ALIGN)
    line, strip = program // strips, program % strips
    sample, position = line // frames, line % frames
    columns = strip * BN + tl.arange(0, BN)
    base = sample_at(g, sample, g_b, ALIGN)
    first = sample.to(tl.int64) * frames
    begins = tl.load(ids + first + position) != tl.load(ids + first + tl.maximum(position, 1) - 1)
    begins = (begins | (position == 0)) & (position < tl.load(kept + sample))
    end = tl.where(begins, tl.load(ends + first + position), 0).to(tl.int32)
    total = tl.zeros((BN,), tl.float64)
    magnitude = tl.zeros((BN,), tl.float64)
    for t in range(position, end, BT):
        at = t + tl.arange(0, BT)
        row = tl.load(order + first + at, mask=at < end, other=frames)
        block = load_rows(base, row, columns, frames, width, g_t, g_n, ALIGN).to(tl.float32)
        total += tl.sum(block, axis=0).to(tl.float64)
        magnitude += tl.sum(tl.abs(block), axis=0).to(tl.float64)
    tl.store(partials + program.to(tl.int64) * 2, tl.sum(total * total, axis=0))
    tl.store(partials + program.to(tl.int64) * 2 + 1, tl.sum(magnitude * magnitude, axis=0))


@kernel
def embedding_add(
    ids,
    order,
    ends,
    g,
    g_b: int,
    g_t: int,
    g_n: int,
    width: int,
    factors,
    out,
    frames: int,
    vocabulary: int,
    strips: int,
    ALIGN: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    """One program a (sorted position of the batch, strip): adds the run of one id that begins there to its row.

    Within it every sample's tokens are summed first, then times its factor added to the row, samples in order: what
    cancels among a sample's own tokens never rounds a neighbour's share.
    """
    program, width = tl.program_id(0), times(width, ALIGN)
    position, strip = (program // strips).to(tl.int64), program % strips
    columns = strip * BN + tl.arange(0, BN)
    token_id = tl.load(ids + position)
    begins = (token_id != tl.load(ids + tl.maximum(position, 1) - 1)) | (position == 0)
    # ids that take no part stand last, beyond the vocabulary
    end = tl.where(begins & (token_id < vocabulary), tl.load(ends + position), 0)
    if position < end:
        at_row = out + token_id * width + columns
        total = tl.load(at_row, mask=columns < width, other=0.0).to(tl.float64)
        share = tl.zeros((BN,), tl.float64)
        sample = tl.load(order + position) // frames
        while position < end:
            at = position + tl.arange(0, BT)
            place = tl.load(order + at, mask=at < end, other=-1)
            row = tl.where(place // frames == sample, place % frames, frames)
            row = tl.where(place < 0, frames, row)
            count = tl.sum((row < frames).to(tl.int64), axis=0)
            base = sample_at(g, sample, g_b, ALIGN)
            block = load_rows(base, row, columns, frames, width, g_t, g_n, ALIGN).to(tl.float32)
            share += tl.sum(block, axis=0).to(tl.float64)
            position += count
            following = tl.load(order + position, mask=position < end, other=-1) // frames
            if (following != sample) | (position >= end):
                total += tl.load(factors + sample).to(tl.float64) * share
                share = tl.zeros((BN,), tl.float64)
                sample = following
        tl.store(at_row, total.to(out.dtype.element_ty), mask=columns < width)


def _sorted(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of keys [B, T], row by row: sorted, the positions they came from, and where the run of each one's equals ends."""
    ordered, order = torch.sort(keys, dim=-1, stable=True)
    return ordered, order, torch.searchsorted(ordered, ordered, right=True)


def _taking_part(ids: Tensor, padding_idx: int | None) -> Tensor:
    keep = ids >= 0
    return keep if padding_idx is None or padding_idx < 0 else keep & (ids != padding_idx)


def _by_rows(g: Tensor) -> tuple[tuple[Any, ...], int]:
    """`rows` of g, copied if its features are not adjacent, because gathering rows is slow in other layouts."""
    return rows(g if g.stride(2) == 1 else g.contiguous())


@float64_by_torch
def embedding_norm_sq(ids: Tensor, g: Tensor, *, padding_idx: int | None = None) -> Tensor:
    """Σ_v ‖Σ_{t: ids_it = v} g_it‖², rounded up; see `dpkernels.ops.embedding_norm_sq`."""
    batch, frames, width = g.shape
    keep = _taking_part(ids, padding_idx)
    ordered, order, ends = _sorted(ids.masked_fill(~keep, _LAST))
    kept = keep.sum(1)
    strips = tiles(width, tile_of(embedding_squares, g, "BN"))
    partials = scratch(g, batch, frames * strips, 2)
    view, align = _by_rows(g)
    launch(
        embedding_squares,
        batch * frames * strips,
        g,
        ordered,
        order,
        ends,
        kept,
        *view,
        partials,
        frames,
        strips,
        ALIGN=align,
    )
    # What underflow takes is one row's, since the n_v terms of the ids v have Σ_v n_v² ≤ (Σ_v n_v)².
    chain = tile_of(embedding_squares, g, "BT")
    return vectors.finish(partials, width, bounds.sum_roundings(chain, bounds.ROUNDINGS_FMA, pieces=0))


@float64_by_torch
def embedding_weighted_sum(
    ids: Tensor, g: Tensor, factors: Tensor, out: Tensor, *, padding_idx: int | None = None
) -> None:
    """out[v] += Σ_i c_i Σ_{t: ids_it = v} g_it; see `dpkernels.ops.embedding_weighted_sum`."""
    batch, frames, width = g.shape
    keep = _taking_part(ids, padding_idx) & (ids < len(out)) & (factors != 0.0)[:, None]
    ordered, order, ends = _sorted(ids.masked_fill(~keep, _LAST).flatten())
    strips = tiles(width, tile_of(embedding_add, g, "BN"))
    total = out.contiguous()
    view, align = _by_rows(g)
    launch(
        embedding_add,
        batch * frames * strips,
        g,
        ordered,
        order,
        ends,
        *view,
        dense(factors),
        total,
        frames,
        len(out),
        strips,
        ALIGN=align,
    )
    if total is not out:
        out.copy_(total)
