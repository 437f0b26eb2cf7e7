"""Kernels of the transducer's lattice: the sums over all paths to and from each cell, and each cell's flows.

Arcs come in pairs: BLANKS[i] frames ahead with the blank (0 is no arc), LABELS[i] with a label. COUNT is the number of
durations, 0 in an RNN-T; otherwise i is a duration, whose score counts too.

α (the paths to a cell) and β (those from it) are logarithms in float64, whose rounding is far below that of the float32
scores. In float32 each sum of logarithms, exponentials and logarithms would need compensation. With five durations a
cell takes some 700 float64 operations, and with H = 640 and V = 8,198 31 million in the three products. Where float64
runs at a 64th of float32's rate (sm_86, sm_103) that is still a few percent of the time of these.
"""

import triton
import triton.language as tl

from dpkernels.backends.triton_ops.launching import kernel
from dpkernels.backends.triton_ops.transducer_kernels import own_sizes

NOWHERE = tl.constexpr(-1e300)
"""The logarithm of 0: finite, so that differences are never NaN, and below any sum of finite scores."""


@triton.jit
def joined(top, total, term):
    """A running ln Σ exp as (top, total) for top + ln total, with one more term; it begins with (NOWHERE, 1)."""
    apart = term - top
    smaller = tl.exp(-tl.abs(apart))
    return tl.maximum(top, term), tl.where(apart > 0.0, total * smaller + 1.0, total + smaller)


@triton.jit
def scored(scores, cell, ok, KIND: tl.constexpr, INDEX: tl.constexpr, COUNT: tl.constexpr):
    """The score of an arc in cells of one utterance in float64; NOWHERE for −∞, for NaN, and where not ok."""
    at = scores + cell * (2 + COUNT)
    score = tl.load(at + KIND, mask=ok, other=float("-inf")).to(tl.float64)
    if COUNT:
        score += tl.load(at + 2 + INDEX, mask=ok, other=0.0).to(tl.float64)
    nowhere = tl.full(score.shape, NOWHERE, tl.float64)
    return tl.where(score > nowhere, score, nowhere)


@triton.jit
def looked_up(paths, t, u, width, ok):
    """α or β of cells (t, u) of one utterance, stored by diagonals; NOWHERE where not ok."""
    value = tl.load(paths + (t + u).to(tl.int64) * width + u, mask=ok, other=0.0)
    return tl.where(ok, value, tl.full(value.shape, NOWHERE, tl.float64))


@triton.jit
def store(paths, t, u, width, ok, value):
    """Write what `looked_up` reads."""
    tl.store(paths + (t + u).to(tl.int64) * width + u, value, mask=ok)


@triton.jit
def arriving(
    scores, alpha, t, u, inside, top, total, width, AHEAD: tl.constexpr, KIND: tl.constexpr, INDEX: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """The running sum over paths to (t, u), with those whose last arc is the given one."""
    s, v = t - AHEAD, u - KIND
    ok = inside & (s >= 0) & (v >= 0)
    arc = scored(scores, s * width + v, ok, KIND, INDEX, COUNT)
    return joined(top, total, looked_up(alpha, s, v, width, ok) + arc)


@triton.jit
def onward(beta, t, u, n, own, width, inside, AHEAD: tl.constexpr, KIND: tl.constexpr):
    """ln Σ over the ways on from where an arc of (t, u) leads: 0 at the end of all paths, NOWHERE outside."""
    s, v = t + AHEAD, u + KIND
    value = looked_up(beta, s, v, width, inside & (s < n) & (v < own))
    if KIND == 0:
        value = tl.where(inside & (s == n) & (u == own - 1), 0.0, value)
    return value


@triton.jit
def write_alpha(
    scores, alpha, n, own, width, BLANKS: tl.constexpr, LABELS: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Diagonal by diagonal, from (0, 0)."""
    for row in range(0, n + own - 1):
        for first in range(tl.maximum(row - n + 1, 0), tl.minimum(row + 1, own), BLOCK):
            u = first + tl.arange(0, BLOCK)
            t = row - u
            inside = (u < own) & (t >= 0) & (t < n)
            # one empty path leads to (0, 0)
            top = tl.where((u == 0) & (t == 0), 0.0, tl.full((BLOCK,), NOWHERE, tl.float64))
            total = tl.full((BLOCK,), 1.0, tl.float64)
            for i in tl.static_range(len(BLANKS)):
                if BLANKS[i] > 0:
                    top, total = arriving(
                        scores, alpha, t, u, inside, top, total, width, BLANKS[i], 0, i, COUNT
                    )
                top, total = arriving(scores, alpha, t, u, inside, top, total, width, LABELS[i], 1, i, COUNT)
            store(alpha, t, u, width, inside, top + tl.log(total))
        # the next diagonals read what other threads wrote
        tl.debug_barrier()


@triton.jit
def leaving(
    scores, beta, t, u, inside, top, total, n, own, width, AHEAD: tl.constexpr, KIND: tl.constexpr,
    INDEX: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The running sum over paths from (t, u), with those whose first arc is the given one."""
    arc = scored(scores, t * width + u, inside & (u < own - KIND), KIND, INDEX, COUNT)
    return joined(top, total, onward(beta, t, u, n, own, width, inside, AHEAD, KIND) + arc)


@triton.jit
def write_beta(
    scores, beta, n, own, width, BLANKS: tl.constexpr, LABELS: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Diagonal by diagonal, from the last cell."""
    rows = n + own - 1
    for behind in range(0, rows):
        row = rows - 1 - behind
        for first in range(tl.maximum(row - n + 1, 0), tl.minimum(row + 1, own), BLOCK):
            u = first + tl.arange(0, BLOCK)
            t = row - u
            inside = (u < own) & (t >= 0) & (t < n)
            top = tl.full((BLOCK,), NOWHERE, tl.float64)
            total = tl.full((BLOCK,), 1.0, tl.float64)
            for i in tl.static_range(len(BLANKS)):
                if BLANKS[i] > 0:
                    top, total = leaving(
                        scores, beta, t, u, inside, top, total, n, own, width, BLANKS[i], 0, i, COUNT
                    )
                top, total = leaving(
                    scores, beta, t, u, inside, top, total, n, own, width, LABELS[i], 1, i, COUNT
                )
            store(beta, t, u, width, inside, top + tl.log(total))
        tl.debug_barrier()


@kernel
def lattice_paths(
    scores,
    frame_lengths,
    target_lengths,
    alpha,
    beta,
    losses,
    frames: int,
    width: int,
    BLANKS: tl.constexpr,
    LABELS: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Two programs an utterance: α, and β with the loss; both [B, T+U, U+1], cell (t, u) in row t + u."""
    program = tl.program_id(0)
    utterance = (program // 2).to(tl.int64)
    n, own = own_sizes(frame_lengths, target_lengths, utterance, frames, width)
    scores += utterance * frames * width * (2 + COUNT)
    paths = utterance * (frames + width - 1) * width
    if program % 2 == 0:
        write_alpha(scores, alpha + paths, n, own, width, BLANKS, LABELS, COUNT, BLOCK)
    else:
        write_beta(scores, beta + paths, n, own, width, BLANKS, LABELS, COUNT, BLOCK)
        tl.store(losses + utterance, loss_of(beta + paths, n))


@triton.jit
def loss_of(beta, n):
    """−β of (0, 0) in float32; +∞ if there are no frames or there is no path."""
    likelihood = tl.load(beta, mask=n > 0, other=0.0)
    exists = (n > 0) & (likelihood > 0.5 * tl.full((), NOWHERE, tl.float64))
    return tl.where(exists, -likelihood, float("inf")).to(tl.float32)


@kernel
def lattice_flows(
    scores,
    frame_lengths,
    target_lengths,
    alpha,
    beta,
    flows,
    frames: int,
    width: int,
    blocks: int,
    BLANKS: tl.constexpr,
    LABELS: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a (utterance, BLOCK of its cells): flows as scores; nothing is written where there is no path."""
    program = tl.program_id(0)
    utterance, block = (program // blocks).to(tl.int64), program % blocks
    n, own = own_sizes(frame_lengths, target_lengths, utterance, frames, width)
    if block * BLOCK >= n * own:
        return
    paths = utterance * (frames + width - 1) * width
    alpha += paths
    beta += paths
    if loss_of(beta, n) == float("inf"):
        return
    scores += utterance * frames * width * (2 + COUNT)
    flows += utterance * frames * width * (2 + COUNT)
    cell = block * BLOCK + tl.arange(0, BLOCK)
    t = cell // own
    u = cell - t * own
    inside = t < n
    reached = looked_up(alpha, t, u, width, inside) - tl.load(beta)
    at = flows + (t * width + u) * (2 + COUNT)
    of_blank, of_label = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for i in tl.static_range(len(BLANKS)):
        arc = scored(scores, t * width + u, inside & (u < own - 1), 1, i, COUNT)
        label = tl.exp(reached + arc + onward(beta, t, u, n, own, width, inside, LABELS[i], 1))
        of_label += label
        both = label
        if BLANKS[i] > 0:
            arc = scored(scores, t * width + u, inside, 0, i, COUNT)
            blank = tl.exp(reached + arc + onward(beta, t, u, n, own, width, inside, BLANKS[i], 0))
            of_blank += blank
            both += blank
        if COUNT:
            tl.store(at + 2 + i, both.to(tl.float32), mask=inside)
    tl.store(at, of_blank.to(tl.float32), mask=inside)
    tl.store(at + 1, of_label.to(tl.float32), mask=inside)
