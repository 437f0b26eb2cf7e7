"""Kernels over many layers at once: their addresses, sizes and strides lie in a table in device memory.

A *problem* is wideᵀ narrow [n, r] of every sample, wide [B, T, n] and narrow [B, T, r] with r of a few columns: one of
LoRA's two gradients, or that of a linear layer with a narrow side. A *vector* is a per-sample gradient that exists
already, [B, n]. Either is cut in pieces of BN columns (and R of the narrow side), and `work` lists (problem, piece).

Arithmetic and bounds are those of `lora` (`strip_product`). A row of the table is FIELDS int64, in the order of
`grouped.Problem.fields`; sizes and strides are divided by their ALIGN as `launching.rows` gives them.
"""

import triton
import triton.language as tl

from dpkernels.backends.triton_ops.device import (
    SLACK,
    add_sample,
    error_of,
    float64_total,
    load_rows,
    product,
    renewed,
    round_up,
    run_ends,
    times,
    upper_square,
)
from dpkernels.backends.triton_ops.launching import kernel
from dpkernels.backends.triton_ops.lora import strip_product

FIELDS = tl.constexpr(16)
WIDE, NARROW, OUT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
WIDE_B, WIDE_T, WIDTH = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)
NARROW_B, NARROW_T, RANK = tl.constexpr(6), tl.constexpr(7), tl.constexpr(8)
FRAMES, RANK_TILES = tl.constexpr(9), tl.constexpr(10)
FIRST, PIECES = tl.constexpr(11), tl.constexpr(12)
OUT_COLUMN, OUT_RANK, SCALE = tl.constexpr(13), tl.constexpr(14), tl.constexpr(15)


@triton.jit
def address(row, FIELD: tl.constexpr, DTYPE: tl.constexpr):
    """A tensor's address, which the caller guarantees to be a multiple of 16 bytes."""
    return tl.multiple_of(tl.load(row + FIELD).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def integer(row, FIELD: tl.constexpr):
    """A size, in 32 bits."""
    return tl.load(row + FIELD).to(tl.int32)


@kernel
def grouped_norms(
    work,
    table,
    partials,
    pieces: int,
    one,
    DTYPE: tl.constexpr,
    W_ALIGN: tl.constexpr,
    N_ALIGN: tl.constexpr,
    SMALLEST: tl.constexpr,
    UPCAST: tl.constexpr,
    LONG: tl.constexpr,
    R: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    """partials [B, pieces, 2]: squares and terms of a piece of one sample's problem; one program each."""
    sample, place = (tl.program_id(0) // pieces).to(tl.int64), tl.program_id(0) % pieces
    row, piece = table + tl.load(work + 2 * place) * FIELDS, tl.load(work + 2 * place + 1)
    rank_tiles = integer(row, RANK_TILES)
    columns, ranks = piece // rank_tiles * BN + tl.arange(0, BN), piece % rank_tiles * R + tl.arange(0, R)
    wide = address(row, WIDE, DTYPE) + times(sample * tl.load(row + WIDE_B), W_ALIGN)
    narrow = address(row, NARROW, DTYPE) + times(sample * tl.load(row + NARROW_B), N_ALIGN)
    total, terms = strip_product(
        wide, tl.load(row + WIDE_T), 1, times(integer(row, WIDTH), W_ALIGN), narrow, tl.load(row + NARROW_T), 1,
        times(integer(row, RANK), N_ALIGN), columns, ranks, integer(row, FRAMES), one, LONG, True, SMALLEST,
        W_ALIGN, N_ALIGN, UPCAST, BT, BN, R,
    )  # fmt: skip
    exact = total.to(tl.float64)
    at = partials + (sample * pieces + integer(row, FIRST) + piece) * 2
    tl.store(at, tl.sum(tl.sum(exact * exact, axis=1), axis=0))
    tl.store(at + 1, terms * terms)


@kernel
def grouped_sums(
    work,
    table,
    factors,
    batch: int,
    one,
    DTYPE: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    W_ALIGN: tl.constexpr,
    N_ALIGN: tl.constexpr,
    UPCAST: tl.constexpr,
    PAIRS: tl.constexpr,
    R: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    """One program a piece: every sample's float32 products times its factor, in order, added to `out`.

    One loop over all samples' frames, as in `linear_kernels.linear_sum`.
    """
    place = tl.program_id(0)
    row, piece = table + tl.load(work + 2 * place) * FIELDS, tl.load(work + 2 * place + 1)
    frames, rank_tiles = integer(row, FRAMES), integer(row, RANK_TILES)
    columns, ranks = piece // rank_tiles * BN + tl.arange(0, BN), piece % rank_tiles * R + tl.arange(0, R)
    width, rank = times(integer(row, WIDTH), W_ALIGN), times(integer(row, RANK), N_ALIGN)
    wide, narrow = address(row, WIDE, DTYPE), address(row, NARROW, DTYPE)
    wide_b, wide_t = tl.load(row + WIDE_B), tl.load(row + WIDE_T)
    narrow_b, narrow_t = tl.load(row + NARROW_B), tl.load(row + NARROW_T)
    scale = tl.load(row + SCALE).to(tl.float64, bitcast=True)
    total = tl.zeros((BN, R), tl.float32 if PAIRS else tl.float64)
    rest, acc = tl.zeros((BN, R), tl.float32), tl.zeros((BN, R), tl.float32)
    chunks = (frames + BT - 1) // BT
    for step in range(0, batch * chunks):
        sample = step // chunks + tl.zeros((), tl.int64)
        at = step % chunks * BT + tl.arange(0, BT)
        a = load_rows(wide + times(sample * wide_b, W_ALIGN), at, columns, frames, width, wide_t, 1, W_ALIGN)
        b = load_rows(
            narrow + times(sample * narrow_b, N_ALIGN), at, ranks, frames, rank, narrow_t, 1, N_ALIGN
        )
        acc = product(tl.trans(a), b, acc, one, UPCAST)
        if run_ends(step % chunks, chunks):
            factor = tl.load(factors + sample)
            if factor != 0.0:
                total, rest = add_sample(total, rest, factor, acc, one, PAIRS)
            total, rest = renewed(total, rest, sample, PAIRS)
            acc = tl.zeros((BN, R), tl.float32)
    inside = (columns < width)[:, None] & (ranks < rank)[None, :]
    out = tl.load(row + OUT).to(tl.pointer_type(OUT_DTYPE))
    out += columns.to(tl.int64)[:, None] * tl.load(row + OUT_COLUMN) + ranks[None, :] * tl.load(
        row + OUT_RANK
    )
    wide = tl.load(out, mask=inside, other=0.0).to(tl.float64) + scale * float64_total(total, rest, PAIRS)
    tl.store(out, wide.to(OUT_DTYPE), mask=inside)


@kernel
def grouped_vector_norms(
    work, table, partials, pieces: int, DTYPE: tl.constexpr, W_ALIGN: tl.constexpr, BN: tl.constexpr
):
    """partials [B, pieces, 2]: the squares of a piece of one sample's vector, and 0: one term each is exact."""
    sample, place = (tl.program_id(0) // pieces).to(tl.int64), tl.program_id(0) % pieces
    row, piece = table + tl.load(work + 2 * place) * FIELDS, tl.load(work + 2 * place + 1)
    columns = piece * BN + tl.arange(0, BN)
    at = address(row, WIDE, DTYPE) + times(sample * tl.load(row + WIDE_B), W_ALIGN) + columns
    entries = tl.load(at, mask=columns < times(integer(row, WIDTH), W_ALIGN), other=0.0).to(tl.float64)
    at = partials + (sample * pieces + integer(row, FIRST) + piece) * 2
    tl.store(at, tl.sum(entries * entries, axis=0))
    tl.store(at + 1, 0.0)


@kernel
def grouped_vector_sums(
    work,
    table,
    factors,
    batch: int,
    DTYPE: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    W_ALIGN: tl.constexpr,
    BN: tl.constexpr,
):
    """One program a piece: every sample's entries times its factor, in order, in float64, added to `out`."""
    place = tl.program_id(0)
    row, piece = table + tl.load(work + 2 * place) * FIELDS, tl.load(work + 2 * place + 1)
    columns = piece * BN + tl.arange(0, BN)
    width, stride = times(integer(row, WIDTH), W_ALIGN), times(tl.load(row + WIDE_B), W_ALIGN)
    out = tl.load(row + OUT).to(tl.pointer_type(OUT_DTYPE)) + columns
    total = tl.load(out, mask=columns < width, other=0.0).to(tl.float64)
    at = address(row, WIDE, DTYPE) + columns
    for i in range(0, batch):
        factor = tl.load(factors + i).to(tl.float64)
        read = columns < tl.where(factor != 0.0, width, 0)
        total += factor * tl.load(at, mask=read, other=0.0).to(tl.float64)
        at += stride
    tl.store(out, total.to(OUT_DTYPE), mask=columns < width)


@kernel
def finish_group(
    table,
    partials,
    out,
    problems: int,
    pieces: int,
    columns: int,
    first_column: int,
    SIZES: tl.constexpr,
    ROUNDINGS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [B, columns] at first_column on: (|s|√Σ squares + |s|e)² rounded up; one program a (sample, problem).

    SIZES: the ALIGN of width times that of rank.
    """
    sample, problem = (tl.program_id(0) // problems).to(tl.int64), tl.program_id(0) % problems
    row = table + problem * FIELDS
    square, magnitude = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    problem_pieces = integer(row, PIECES)
    for first in range(0, problem_pieces, BLOCK):
        piece = first + tl.arange(0, BLOCK)
        at = partials + (sample * pieces + integer(row, FIRST) + piece) * 2
        square += tl.sum(tl.load(at, mask=piece < problem_pieces, other=0.0), axis=0)
        magnitude += tl.sum(tl.load(at + 1, mask=piece < problem_pieces, other=0.0), axis=0)
    entries = (tl.load(row + WIDTH) * tl.load(row + RANK) * SIZES).to(tl.float64)
    error = error_of(magnitude, entries, ROUNDINGS)
    scale = tl.abs(tl.load(row + SCALE).to(tl.float64, bitcast=True))
    upper = upper_square(square * scale * scale, error * scale)
    tl.store(out + sample * columns + first_column + problem, upper.to(tl.float64))


@kernel
def add_columns(norms, out, columns: int, BLOCK: tl.constexpr):
    """out [B] float32, rounded up: the sum of a row of norms [B, columns], in float64; one program a sample."""
    sample = tl.program_id(0).to(tl.int64)
    total = tl.zeros((), tl.float64)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(norms + sample * columns + column, mask=column < columns, other=0.0), axis=0)
    tl.store(out + sample, round_up(total * SLACK))
