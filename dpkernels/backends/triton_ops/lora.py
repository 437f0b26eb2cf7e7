"""LoRA: norms and weighted sums of both factors' gradients, dhᵀx for A and s gᵀh for B, from one read of x and g.

Each is the product of a wide matrix [T, n] (x or g) and a narrow one [T, r] (dh or h). One launch computes both: a
program takes a strip of BN columns of one wide matrix and up to R columns of its narrow one, and computes wideᵀ narrow
[BN, R] by `device.product`, BT frames at a time, PIECES of these in float32, and from there in float64.

**Norms.** Entries are squared and added in float64. The bound is by strips: the entries of a strip are off by at most
γ Σ_t ‖wide_t‖‖narrow_t‖ over the strip's columns, and the errors of different strips are of different entries, so
they add in squares. These norms of rows are computed from the loaded tiles in float32 and enlarged by
2⁻¹⁴, which covers their own rounding (squares and sums: (BN + BT + 4)u < 2⁻¹⁵; PTX's approximate square roots:
2⁻²²). They are 0 for rows of zeros only (`device.squares_above_zero`); to others δ of `bounds` is added. So a frame of
padding, in the wide matrix or in the narrow one, adds nothing to the bound.

**Gradients.** The same products, stored in float32 by sample, so that x and g are read once and can then be freed.

**Sums.** A program adds SAMPLES samples, each times its factor, in float64; their sums go to memory once for each
such group and are added in order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpkernels.backends.triton_ops import bounds, configs, tensor_cores, vectors
from dpkernels.backends.triton_ops.device import (
    PIECES,
    float64_of,
    frames_added,
    frames_of,
    load_rows,
    product,
    sample_at,
    squares_above_zero,
    times,
)
from dpkernels.backends.triton_ops.launching import (
    architecture,
    dense,
    float64_bits,
    float64_by_torch,
    is_long,
    kernel,
    launch,
    rows,
    scratch,
    tile_of,
    tiles,
    upcast,
)

_MOST_COLUMNS = 32
"""Columns of a narrow matrix in one program; a larger rank takes several programs."""


@triton.jit
def strip(piece, rank_tiles, BN: tl.constexpr, R: tl.constexpr):
    """The columns of the wide matrix and those of the narrow one in a piece."""
    return piece // rank_tiles * BN + tl.arange(0, BN), piece % rank_tiles * R + tl.arange(0, R)


@triton.jit
def entries_of(columns, width, ranks, rank, COLUMNS_FIRST: tl.constexpr):
    """Offsets [BN, R] of a strip in a dense [width, rank] (COLUMNS_FIRST) or [rank, width], and which it has."""
    if COLUMNS_FIRST:
        at = columns.to(tl.int64)[:, None] * rank + ranks[None, :]
    else:
        at = columns[:, None] + ranks.to(tl.int64)[None, :] * width
    return at, (columns < width)[:, None] & (ranks < rank)[None, :]


@triton.jit
def strip_pieces(
    wide, w_t, w_n, width, narrow, n_t, n_n, rank, columns, ranks, first, n, one, NORMS: tl.constexpr,
    SMALLEST: tl.constexpr, W_ALIGN: tl.constexpr, N_ALIGN: tl.constexpr, UPCAST: tl.constexpr, BT: tl.constexpr,
    BN: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """One sample's wideᵀ narrow at (columns, ranks) over frames first <= t < n, in float32.

    With NORMS also Σ_t ‖wide_t‖‖narrow_t‖ over these columns, in float64.
    """
    acc = tl.zeros((BN, R), tl.float32)
    terms = tl.zeros((), tl.float64)
    for t in range(first, n, BT):
        at = t + tl.arange(0, BT)
        a = load_rows(wide, at, columns, n, width, w_t, w_n, W_ALIGN)
        b = load_rows(narrow, at, ranks, n, rank, n_t, n_n, N_ALIGN)
        acc = product(tl.trans(a), b, acc, one, UPCAST)
        if NORMS:
            of_wide = tl.sum(squares_above_zero(a.to(tl.float32)), axis=1)
            of_narrow = tl.sum(squares_above_zero(b.to(tl.float32)), axis=1)
            both = (tl.sqrt(of_wide) + SMALLEST * BN**0.5) * (tl.sqrt(of_narrow) + SMALLEST * R**0.5)
            own = (of_wide != 0.0) & (of_narrow != 0.0)
            terms += tl.sum(tl.where(own, both, 0.0), axis=0).to(tl.float64)
    return acc, terms * (1.0 + 2.0**-14)


@triton.jit
def strip_product(
    wide, w_t, w_n, width, narrow, n_t, n_n, rank, columns, ranks, n, one, LONG: tl.constexpr, NORMS: tl.constexpr,
    SMALLEST: tl.constexpr, W_ALIGN: tl.constexpr, N_ALIGN: tl.constexpr, UPCAST: tl.constexpr, BT: tl.constexpr,
    BN: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """`strip_pieces` of a sample's n frames. LONG: there may be more than PIECES·BT, and the products are float64.

    The float64 products need registers of their own, which would be most of the kernel's.
    """
    if LONG:
        total = tl.zeros((BN, R), tl.float64)
        terms = tl.zeros((), tl.float64)
        for first in range(0, n, PIECES * BT):
            acc, of_part = strip_pieces(
                wide, w_t, w_n, width, narrow, n_t, n_n, rank, columns, ranks, first,
                tl.minimum(first + PIECES * BT, n), one, NORMS, SMALLEST, W_ALIGN, N_ALIGN, UPCAST, BT, BN, R,
            )  # fmt: skip
            total += acc.to(tl.float64)
            terms += of_part
        return total, terms
    else:
        return strip_pieces(
            wide, w_t, w_n, width, narrow, n_t, n_n, rank, columns, ranks, 0, n, one, NORMS, SMALLEST, W_ALIGN,
            N_ALIGN, UPCAST, BT, BN, R,
        )  # fmt: skip


@triton.jit
def strip_norms(
    wide, w_b, w_t, w_n, width, narrow, n_b, n_t, n_n, rank, lengths, out, frames, sample, piece, pieces,
    rank_tiles, one, LONG: tl.constexpr, SMALLEST: tl.constexpr, W_ALIGN: tl.constexpr, N_ALIGN: tl.constexpr,
    UPCAST: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """out [B, pieces, 2]: squares and terms of one sample's piece, for `vectors.finish`."""
    width, rank = times(width, W_ALIGN), times(rank, N_ALIGN)
    columns, ranks = strip(piece, rank_tiles, BN, R)
    n = frames_of(lengths, sample, frames)
    total, terms = strip_product(
        sample_at(wide, sample, w_b, W_ALIGN), w_t, w_n, width, sample_at(narrow, sample, n_b, N_ALIGN), n_t, n_n,
        rank, columns, ranks, n, one, LONG, True, SMALLEST, W_ALIGN, N_ALIGN, UPCAST, BT, BN, R,
    )  # fmt: skip
    exact = total.to(tl.float64)
    at = out + (sample.to(tl.int64) * pieces + piece) * 2
    tl.store(at, tl.sum(tl.sum(exact * exact, axis=1), axis=0))
    tl.store(at + 1, terms * terms)


@triton.jit
def strip_sums(
    wide, w_b, w_t, w_n, width, narrow, n_b, n_t, n_n, rank, lengths, factors, out, frames, batch, group, piece,
    rank_tiles, scale, one, LONG: tl.constexpr, COLUMNS_FIRST: tl.constexpr, W_ALIGN: tl.constexpr,
    N_ALIGN: tl.constexpr, UPCAST: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, R: tl.constexpr,
    SAMPLES: tl.constexpr,
):  # fmt: skip
    """out [groups, width, rank] (COLUMNS_FIRST) or [groups, rank, width]: a group's weighted sum of one piece."""
    width, rank = times(width, W_ALIGN), times(rank, N_ALIGN)
    columns, ranks = strip(piece, rank_tiles, BN, R)
    total = tl.zeros((BN, R), tl.float64)
    for i in range(group * SAMPLES, tl.minimum((group + 1) * SAMPLES, batch)):
        sample = i + tl.zeros((), tl.int64)
        factor = tl.load(factors + sample).to(tl.float64)
        n = frames_added(factor, lengths, sample, frames)
        gradient, _ = strip_product(
            sample_at(wide, sample, w_b, W_ALIGN), w_t, w_n, width, sample_at(narrow, sample, n_b, N_ALIGN), n_t,
            n_n, rank, columns, ranks, n, one, LONG, False, 0.0, W_ALIGN, N_ALIGN, UPCAST, BT, BN, R,
        )  # fmt: skip
        total += factor * scale * gradient.to(tl.float64)
    size = (tl.full((), 1, tl.int64) * width) * rank
    at, inside = entries_of(columns, width, ranks, rank, COLUMNS_FIRST)
    tl.store(out + group * size + at, total, mask=inside)


@kernel
def lora_pieces(
    x,
    x_b: int,
    x_t: int,
    x_n: int,
    d: int,
    dh,
    dh_b: int,
    dh_t: int,
    dh_n: int,
    dh_rank: int,
    g,
    g_b: int,
    g_t: int,
    g_n: int,
    p: int,
    h,
    h_b: int,
    h_t: int,
    h_n: int,
    h_rank: int,
    lengths,
    factors,
    of_a,
    of_b,
    batch: int,
    frames: int,
    pieces_a: int,
    pieces_b: int,
    rank_tiles: int,
    scale_high: int,
    scale_low: int,
    one,
    X_ALIGN: tl.constexpr,
    DH_ALIGN: tl.constexpr,
    G_ALIGN: tl.constexpr,
    H_ALIGN: tl.constexpr,
    SMALLEST: tl.constexpr,
    UPCAST: tl.constexpr,
    LONG: tl.constexpr,
    R: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """One program a (sample, piece) for norms, a (group of samples, piece) for sums: first A's pieces, then B's."""
    which, piece = tl.program_id(0) // (pieces_a + pieces_b), tl.program_id(0) % (pieces_a + pieces_b)
    if factors is None:
        if piece < pieces_a:
            strip_norms(
                x, x_b, x_t, x_n, d, dh, dh_b, dh_t, dh_n, dh_rank, lengths, of_a, frames, which, piece, pieces_a,
                rank_tiles, one, LONG, SMALLEST, X_ALIGN, DH_ALIGN, UPCAST, BT, BN, R,
            )  # fmt: skip
        else:
            strip_norms(
                g, g_b, g_t, g_n, p, h, h_b, h_t, h_n, h_rank, lengths, of_b, frames, which, piece - pieces_a,
                pieces_b, rank_tiles, one, LONG, SMALLEST, G_ALIGN, H_ALIGN, UPCAST, BT, BN, R,
            )  # fmt: skip
    else:
        if piece < pieces_a:
            scale = tl.full((), 1.0, tl.float64)
            strip_sums(
                x, x_b, x_t, x_n, d, dh, dh_b, dh_t, dh_n, dh_rank, lengths, factors, of_a, frames, batch, which,
                piece, rank_tiles, scale, one, LONG, False, X_ALIGN, DH_ALIGN, UPCAST, BT, BN, R, SAMPLES,
            )  # fmt: skip
        else:
            scale = float64_of(scale_high, scale_low)
            strip_sums(
                g, g_b, g_t, g_n, p, h, h_b, h_t, h_n, h_rank, lengths, factors, of_b, frames, batch, which,
                piece - pieces_a, rank_tiles, scale, one, LONG, True, G_ALIGN, H_ALIGN, UPCAST, BT, BN, R, SAMPLES,
            )  # fmt: skip


@triton.jit
def strip_gradient(
    wide, w_b, w_t, w_n, width, narrow, n_b, n_t, n_n, rank, out, frames, sample, piece, rank_tiles, scale, one,
    LONG: tl.constexpr, COLUMNS_FIRST: tl.constexpr, W_ALIGN: tl.constexpr, N_ALIGN: tl.constexpr,
    UPCAST: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """out [B, width, rank] (COLUMNS_FIRST) or [B, rank, width]: one piece of one sample's scale·wideᵀ narrow."""
    width, rank = times(width, W_ALIGN), times(rank, N_ALIGN)
    columns, ranks = strip(piece, rank_tiles, BN, R)
    gradient, _ = strip_product(
        sample_at(wide, sample, w_b, W_ALIGN), w_t, w_n, width, sample_at(narrow, sample, n_b, N_ALIGN), n_t, n_n,
        rank, columns, ranks, frames + tl.zeros((), tl.int32), one, LONG, False, 0.0, W_ALIGN, N_ALIGN, UPCAST, BT, BN,
        R,
    )  # fmt: skip
    at, inside = entries_of(columns, width, ranks, rank, COLUMNS_FIRST)
    at = out + (sample.to(tl.int64) * width) * rank + at
    tl.store(at, (gradient.to(tl.float64) * scale).to(tl.float32), mask=inside)


@kernel
def lora_forms(
    x,
    x_b: int,
    x_t: int,
    x_n: int,
    d: int,
    dh,
    dh_b: int,
    dh_t: int,
    dh_n: int,
    dh_rank: int,
    g,
    g_b: int,
    g_t: int,
    g_n: int,
    p: int,
    h,
    h_b: int,
    h_t: int,
    h_n: int,
    h_rank: int,
    of_a,
    of_b,
    frames: int,
    pieces_a: int,
    pieces_b: int,
    rank_tiles: int,
    scale_high: int,
    scale_low: int,
    one,
    X_ALIGN: tl.constexpr,
    DH_ALIGN: tl.constexpr,
    G_ALIGN: tl.constexpr,
    H_ALIGN: tl.constexpr,
    UPCAST: tl.constexpr,
    LONG: tl.constexpr,
    R: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    """of_a [B, r, d], of_b [B, p, r] float32: one program a (sample, piece), first A's pieces, then B's."""
    sample, piece = tl.program_id(0) // (pieces_a + pieces_b), tl.program_id(0) % (pieces_a + pieces_b)
    if piece < pieces_a:
        scale = tl.full((), 1.0, tl.float64)
        strip_gradient(
            x, x_b, x_t, x_n, d, dh, dh_b, dh_t, dh_n, dh_rank, of_a, frames, sample, piece, rank_tiles, scale, one,
            LONG, False, X_ALIGN, DH_ALIGN, UPCAST, BT, BN, R,
        )  # fmt: skip
    else:
        scale = float64_of(scale_high, scale_low)
        strip_gradient(
            g, g_b, g_t, g_n, p, h, h_b, h_t, h_n, h_rank, of_b, frames, sample, piece - pieces_a, rank_tiles, scale,
            one, LONG, True, G_ALIGN, H_ALIGN, UPCAST, BT, BN, R,
        )  # fmt: skip


def rank_columns(rank: int) -> int:
    """R: columns of the narrow matrix a program takes, the power of two, from 16, that covers the rank; at most 32."""
    return min(_MOST_COLUMNS, max(16, 1 << (rank - 1).bit_length()))


def _aligns(views: dict[str, tuple[tuple[Any, ...], int]]) -> dict[str, Any]:
    return {f"{name}_ALIGN": align for name, (_, align) in views.items()}


def _run(
    x: Tensor,
    h: Tensor,
    g: Tensor,
    dh: Tensor,
    lengths: Tensor | None,
    factors: Tensor | None,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Partials of A and B for `vectors.finish`, or with factors the sums of groups of samples, for `vectors.add`."""
    (batch, frames, d), p, rank = x.shape, g.shape[2], h.shape[2]
    views = {"X": rows(x), "DH": rows(dh), "G": rows(g), "H": rows(h)}
    aligned = views["X"][1] > 1 and views["G"][1] > 1
    strip = tile_of(lora_pieces, x, "BN", aligned)
    long = is_long(lora_pieces, x, aligned)
    columns = rank_columns(rank)
    rank_tiles = tiles(rank, columns)
    pieces_a, pieces_b = tiles(d, strip) * rank_tiles, tiles(p, strip) * rank_tiles
    if factors is None:
        programs = batch
        of_a, of_b = scratch(x, batch, pieces_a, 2), scratch(x, batch, pieces_b, 2)
    else:
        programs = tiles(batch, tile_of(lora_pieces, x, "SAMPLES", aligned))
        of_a, of_b = scratch(x, programs, rank, d), scratch(x, programs, p, rank)
    launch(
        lora_pieces,
        programs * (pieces_a + pieces_b),
        x,
        *(argument for view, _ in views.values() for argument in view),
        dense(lengths),
        dense(factors),
        of_a,
        of_b,
        batch,
        frames,
        pieces_a,
        pieces_b,
        rank_tiles,
        *float64_bits(scaling),
        1.0,
        aligned=aligned,
        variant="long" if long else "",
        SMALLEST=bounds.smallest(x.dtype),
        UPCAST=upcast(x),
        LONG=long,
        R=columns,
        **_aligns(views),
    )
    return of_a, of_b


@float64_by_torch
def lora_norm_sq(
    x: Tensor, h: Tensor, g: Tensor, dh: Tensor, *, scaling: float = 1.0, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(‖dh_iᵀx_i‖², s²‖g_iᵀh_i‖²), rounded up; see `dpkernels.ops.lora_norm_sq`."""
    of_a, of_b = _run(x, h, g, dh, lengths, None, scaling)
    chain = configs.largest(configs.SUMS["lora"], "BT", x.dtype, architecture(x.device))
    roundings, rank = bounds.sum_roundings(chain, tensor_cores.roundings(x)), h.shape[2]
    norm_a = vectors.finish(of_a, rank * x.shape[2], roundings)
    norm_b = vectors.finish(of_b, rank * g.shape[2], roundings, scaling)
    return norm_a, norm_b


@float64_by_torch
def lora_gradients(
    x: Tensor, h: Tensor, g: Tensor, dh: Tensor, *, scaling: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(dh_iᵀx_i, s·g_iᵀh_i), float32; see `dpkernels.ops.lora_gradients`. x and g are read once."""
    (batch, frames, d), p, rank = x.shape, g.shape[2], h.shape[2]
    of_a = torch.empty(batch, rank, d, dtype=torch.float32, device=x.device)
    of_b = torch.empty(batch, p, rank, dtype=torch.float32, device=x.device)
    views = {"X": rows(x), "DH": rows(dh), "G": rows(g), "H": rows(h)}
    aligned = views["X"][1] > 1 and views["G"][1] > 1
    strip, columns = tile_of(lora_forms, x, "BN", aligned), rank_columns(rank)
    long = is_long(lora_forms, x, aligned)
    rank_tiles = tiles(rank, columns)
    pieces_a, pieces_b = tiles(d, strip) * rank_tiles, tiles(p, strip) * rank_tiles
    launch(
        lora_forms,
        batch * (pieces_a + pieces_b),
        x,
        *(argument for view, _ in views.values() for argument in view),
        of_a,
        of_b,
        frames,
        pieces_a,
        pieces_b,
        rank_tiles,
        *float64_bits(scaling),
        1.0,
        aligned=aligned,
        variant="long" if long else "",
        UPCAST=upcast(x),
        LONG=long,
        R=columns,
        **_aligns(views),
    )
    return of_a, of_b


@float64_by_torch
def lora_weighted_sum(
    x: Tensor,
    h: Tensor,
    g: Tensor,
    dh: Tensor,
    factors: Tensor,
    out_a: Tensor,
    out_b: Tensor,
    *,
    scaling: float = 1.0,
    lengths: Tensor | None = None,
) -> None:
    """out_a += Σ_i c_i dh_iᵀx_i, out_b += s Σ_i c_i g_iᵀh_i; see `dpkernels.ops.lora_weighted_sum`."""
    of_a, of_b = _run(x, h, g, dh, lengths, factors, scaling)
    vectors.add(of_a, None, out_a)
    vectors.add(of_b, None, out_b)
