"""Kernels of the transducer's lattice: the sums over all paths to and from each cell, and each cell's flows.

The arcs of a cell are a table of ARCS entries: arc 2i is the blank, arc 2i + 1 a label, each AHEAD of it in frames; a
blank that moves no frame is no arc. COUNT is the number of durations, 0 in an RNN-T; otherwise i is a duration, whose
score counts too. A tile has the arcs of BLOCK cells of a diagonal, and no cell's bits depend on the others of its tile.

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
"""The logarithm of 0: finite, so that differences are NaN for scores that are NaN only, and below any sum of others."""


@triton.jit
def arcs(AHEAD: tl.constexpr, ARCS: tl.constexpr):
    """[1, ARCS] each: frames ahead, 0 for the blank or 1 for a label, the duration's index, whether it is an arc."""
    index = tl.arange(0, ARCS)[None, :]
    ahead = tl.zeros((1, ARCS), tl.int32)
    for i in tl.static_range(len(AHEAD)):
        ahead = tl.where(index == i, AHEAD[i], ahead)
    kind = index % 2
    return ahead, kind, index // 2, (index < len(AHEAD)) & ((kind == 1) | (ahead > 0))


@triton.jit
def arc_scores(scores, t, u, width, kind, step, exists, COUNT: tl.constexpr):
    """Scores of arcs that leave cells (t, u) of one utterance, in float64; NOWHERE for −∞ and no arc, NaN for NaN."""
    at = scores + (t * width + u) * (2 + COUNT)
    score = tl.load(at + kind, mask=exists, other=float("-inf")).to(tl.float64)
    if COUNT:
        score += tl.load(at + 2 + step, mask=exists, other=0.0).to(tl.float64)
    nowhere = tl.full(score.shape, NOWHERE, tl.float64)
    return tl.where(score < nowhere, nowhere, score)


@triton.jit
def place(t, u, width):
    """Where α and β of cell (t, u) are: in row t + u, so that the cells of a diagonal are neighbours."""
    return (t + u).to(tl.int64) * width + u


@triton.jit
def looked_up(paths, t, u, width, exists):
    """α or β of cells (t, u); NOWHERE where there is none."""
    value = tl.load(paths + place(t, u, width), mask=exists, other=0.0)
    return tl.where(exists, value, tl.full(value.shape, NOWHERE, tl.float64))


@triton.jit
def onward(beta, t, u, n, own, width, ahead, kind, exists):
    """ln Σ over the ways on from where arcs of (t, u) lead: 0 at the end of all paths, NOWHERE outside."""
    s, v = t + ahead, u + kind
    value = looked_up(beta, s, v, width, exists & (s < n) & (v < own))
    return tl.where(exists & (kind == 0) & (s == n) & (u == own - 1), 0.0, value)


@triton.jit
def summed(terms):
    """ln Σ exp of each row."""
    top = tl.max(terms, axis=1)
    return top + tl.log(tl.sum(tl.exp(terms - top[:, None]), axis=1))


@triton.jit
def diagonal(row, first, n, own, BLOCK: tl.constexpr):
    """(t, u, inside) of the cells u ≥ first of a diagonal, [BLOCK, 1]."""
    u = (first + tl.arange(0, BLOCK))[:, None]
    t = row - u
    return t, u, (u < own) & (t >= 0) & (t < n)


@triton.jit
def write_alpha(
    scores, alpha, n, own, width, AHEAD: tl.constexpr, COUNT: tl.constexpr, ARCS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Diagonal by diagonal, from (0, 0), to which the empty path leads."""
    ahead, kind, step, exists = arcs(AHEAD, ARCS)
    for row in range(0, n + own - 1):
        for first in range(tl.maximum(row - n + 1, 0), tl.minimum(row + 1, own), BLOCK):
            t, u, inside = diagonal(row, first, n, own, BLOCK)
            s, v = t - ahead, u - kind
            arrives = inside & exists & (s >= 0) & (v >= 0)
            arc = arc_scores(scores, s, v, width, kind, step, arrives, COUNT)
            value = summed(looked_up(alpha, s, v, width, arrives) + arc)[:, None]
            value = tl.where((t == 0) & (u == 0), 0.0, value)
            tl.store(alpha + place(t, u, width), value, mask=inside)
        # the next diagonals read what other threads wrote
        tl.debug_barrier()


@triton.jit
def write_beta(
    scores, beta, n, own, width, AHEAD: tl.constexpr, COUNT: tl.constexpr, ARCS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Diagonal by diagonal, from the last cell."""
    ahead, kind, step, exists = arcs(AHEAD, ARCS)
    rows = n + own - 1
    for behind in range(0, rows):
        row = rows - 1 - behind
        for first in range(tl.maximum(row - n + 1, 0), tl.minimum(row + 1, own), BLOCK):
            t, u, inside = diagonal(row, first, n, own, BLOCK)
            leaves = inside & exists
            arc = arc_scores(scores, t, u, width, kind, step, leaves & (u + kind < own), COUNT)
            value = summed(onward(beta, t, u, n, own, width, ahead, kind, leaves) + arc)[:, None]
            tl.store(beta + place(t, u, width), value, mask=inside)
        tl.debug_barrier()


@triton.jit
def loss_of(beta, n):
    """−β of (0, 0) in float32; +∞ if there are no frames, there is no path, or a score is NaN."""
    likelihood = tl.load(beta, mask=n > 0, other=0.0)
    exists = (n > 0) & (likelihood > 0.5 * tl.full((), NOWHERE, tl.float64))
    return tl.where(exists, -likelihood, float("inf")).to(tl.float32)


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
    AHEAD: tl.constexpr,
    COUNT: tl.constexpr,
    ARCS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Two programs an utterance: α, and β with the loss; both [B, T+U, U+1], cell (t, u) in row t + u."""
    program = tl.program_id(0)
    utterance = (program // 2).to(tl.int64)
    n, own = own_sizes(frame_lengths, target_lengths, utterance, frames, width)
    scores += utterance * frames * width * (2 + COUNT)
    paths = utterance * (frames + width - 1) * width
    if program % 2 == 0:
        write_alpha(scores, alpha + paths, n, own, width, AHEAD, COUNT, ARCS, BLOCK)
    else:
        write_beta(scores, beta + paths, n, own, width, AHEAD, COUNT, ARCS, BLOCK)
        tl.store(losses + utterance, loss_of(beta + paths, n))


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
    AHEAD: tl.constexpr,
    COUNT: tl.constexpr,
    ARCS: tl.constexpr,
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
    cell = (block * BLOCK + tl.arange(0, BLOCK))[:, None]
    t = cell // own
    u = cell - t * own
    ahead, kind, step, exists = arcs(AHEAD, ARCS)
    leaves = (t < n) & exists
    arc = arc_scores(scores, t, u, width, kind, step, leaves & (u + kind < own), COUNT)
    reached = looked_up(alpha, t, u, width, t < n) - tl.load(beta)
    flow = tl.exp(reached + arc + onward(beta, t, u, n, own, width, ahead, kind, leaves))
    at = flows + (t * width + u) * (2 + COUNT)
    for i in tl.static_range(2):
        of_kind = tl.sum(tl.where(kind == i, flow, 0.0), axis=1)[:, None]
        tl.store(at + i, of_kind.to(tl.float32), mask=t < n)
    if COUNT:
        of_durations = tl.sum(tl.reshape(flow, (BLOCK, ARCS // 2, 2)), axis=2)
        i = tl.arange(0, ARCS // 2)[None, :]
        tl.store(at + 2 + i, of_durations.to(tl.float32), mask=(t < n) & (i < COUNT))
