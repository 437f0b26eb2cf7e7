"""Which frames of a sample add to a linear layer's gradient: found on the device, before a norm's form is chosen.

A frame adds nothing if its row of x or of g is all zero: padding, at the end, before or between the sample's frames.
What a norm's form and its bound follow from is the number of the others. Where a row that is not finite faces a zero
row, the frame counts, since 0·NaN must stay NaN.

**Cost.** Rows are read from the first feature on, BN at a time, and only until both have shown an entry that is not 0.
So of a frame that counts mostly BN of the d + p entries are read twice over, 3 % of either at a width of 1,024; a frame
of padding is read to its end. Both matter (x, g) together, so that layers of one input do not share the result.
"""

import triton
import triton.language as tl

from dpkernels.backends.triton_ops.device import frames_of, load_rows, sample_at, times
from dpkernels.backends.triton_ops.launching import kernel


@triton.jit
def evidence(block, NOT_ZERO: tl.constexpr):
    """Of every row of a tile: NOT_ZERO if an entry is not 0, plus 4 if one is not finite."""
    wide = block.to(tl.float32)
    found = tl.where(wide != 0.0, NOT_ZERO, 0) | tl.where(tl.abs(wide) < float("inf"), 0, 4)
    return tl.max(found, axis=1)


@triton.jit
def counts(found):
    """Whether the evidence says that a frame counts: 1 of x and 2 of g, or 4 of either."""
    return (found & 3 == 3) | (found >= 4)


@kernel
def frames_that_count(
    x,
    x_b: int,
    x_t: int,
    x_n: int,
    d: int,
    g,
    g_b: int,
    g_t: int,
    g_n: int,
    p: int,
    lengths,
    own,
    frames: int,
    blocks: int,
    X_ALIGN: tl.constexpr,
    G_ALIGN: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    """own [B, T] int8: 1 for the frames that count; one program a (sample, block of BT frames)."""
    program, d, p = tl.program_id(0), times(d, X_ALIGN), times(p, G_ALIGN)
    sample, first = program // blocks, (program % blocks) * BT
    n = frames_of(lengths, sample, frames)
    rows = first + tl.arange(0, BT)
    x_at, g_at = sample_at(x, sample, x_b, X_ALIGN), sample_at(g, sample, g_b, G_ALIGN)
    found = tl.zeros((BT,), tl.int32)
    column = tl.zeros((), tl.int32)
    end = tl.where(first < n, tl.maximum(d, p), 0).to(tl.int32)
    while column < end:
        columns = column + tl.arange(0, BN)
        needed = tl.where(counts(found), n, rows)  # rows from n on are not read
        found |= evidence(load_rows(x_at, needed, columns, n, d, x_t, x_n, X_ALIGN), 1)
        found |= evidence(load_rows(g_at, needed, columns, n, p, g_t, g_n, G_ALIGN), 2)
        undecided = tl.sum(((rows < n) & ~counts(found)).to(tl.int32), axis=0)
        column = tl.where(undecided > 0, column + BN, end)
    at = own + sample.to(tl.int64) * frames + rows
    tl.store(at, counts(found).to(tl.int8), mask=rows < frames)


@kernel
def order_frames(own, order, found, frames: int, BLOCK: tl.constexpr):
    """order [B, T] int32: the frames that count, first; found [B, 2] int32: how many, and where the last one ends."""
    sample = tl.program_id(0).to(tl.int64)
    count, end = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    for first in range(0, frames, BLOCK):
        at = first + tl.arange(0, BLOCK)
        here = tl.load(own + sample * frames + at, mask=at < frames, other=0).to(tl.int32)
        place = count + tl.cumsum(here, 0) - here
        tl.store(order + sample * frames + place, at, mask=here != 0)
        count += tl.sum(here, axis=0)
        end = tl.maximum(end, tl.max(tl.where(here != 0, at + 1, 0), axis=0))
    tl.store(found + sample * 2, count)
    tl.store(found + sample * 2 + 1, end)


@triton.jit
def own_count(found, sample):
    """The number of a sample's frames that count."""
    return tl.load(found + sample.to(tl.int64) * 2)


@triton.jit
def own_end(found, sample):
    """Where the last of a sample's frames that count ends."""
    return tl.load(found + sample.to(tl.int64) * 2 + 1)


@triton.jit
def own_places(order, sample, places, n, frames):
    """The numbers of a sample's `places`-th frames that count; `frames`, which no load reads, from the n-th on."""
    return tl.load(order + sample.to(tl.int64) * frames + places, mask=places < n, other=frames)
