"""Kernels of the linear family: half-Gram, direct, their last steps, and the weighted sum.

Everything below is for one sample with L frames, x [L, d] and g [L, p]; u, γ and S (with its δ) as in `bounds`. Only
frames that add something count (`frame_kernels`): the form of the norm, S and the rest of the bound are the same with
any padding, wherever it is.

**direct** squares and sums tiles of gᵀx. An entry is made by `product` in pieces of BT frames, PIECES of them in
float32 and the rest in float64, and rounded to float32: κ is a constant (`bounds.sum_roundings`). Squares are added in
float32 along one side of a tile (a relative error of the square of γ_{BD+2}), and in float64 from there.

**gram** sums (x_s·x_t)(g_s·g_t) over blocks on and below the diagonal, those below counted twice. A term
x_sj x_tj g_sk g_tk meets κ_d + κ_p roundings in the two products, one in multiplying them, and as many as GRAM_GROUP
in float32 sums of so many, which are added in float64 (a whole row in float32 would cost a third of the bound): with n
of them in all, the square is off by at most γ_n S² (Cauchy and Schwarz, twice). S comes from the diagonal, x_t·x_t
and g_t·g_t, whose roots rounding makes too small by at most 2γ_n each. It gathers the L frames, blocks of BT of them.

**Underflow.** A float32 result below 2⁻¹²⁶ may be flushed to 0: `device.lost` on the norm; n·2⁻¹²⁶ on a sum of n
squares. In gram, an entry of x_s·x_t is off by 2d·2⁻¹²⁶ at most, which counts times Σ_st |g_s·g_t| ≤ L Σ_t ‖g_t‖², and
the same with x and g exchanged.
"""

import triton
import triton.language as tl

from dpkernels.backends.triton_ops.device import (
    PIECES,
    TINIEST,
    UNIT,
    add_sample,
    float64_total,
    frames_added,
    gamma,
    load_rows,
    lost,
    product,
    renewed,
    roundings_of,
    run_ends,
    sample_at,
    sum_of_products,
    times,
    upper_norms,
    upper_square,
)
from dpkernels.backends.triton_ops.frame_kernels import own_count, own_end, own_places
from dpkernels.backends.triton_ops.launching import kernel

GRAM = tl.constexpr(1)

GRAM_OPERATIONS = tl.constexpr(1.0)  # linear.py: _most_by_gram has it too
"""Half-Gram is chosen below this share of direct's operations: a constant to be measured."""

GRAM_GROUP = tl.constexpr(8)
"""Products of two inner products that are added in float32."""

GRAM_SHARE = tl.constexpr(0.01)
"""A sample whose gram bound is above this share of its square is computed again by direct."""


@triton.jit
def by_gram(n, p, d, METHOD: tl.constexpr):
    """Whether a sample of n frames is computed by half-Gram, n²(p+d) operations against 2npd."""
    if METHOD == 0:
        # int64: p·d alone passes 2³¹ for a vocabulary
        wide = tl.full((), 1, tl.int64)
        return (wide * n * (p + d)).to(tl.float64) < GRAM_OPERATIONS * (2 * wide * p * d).to(tl.float64)
    else:
        return n >= (0 if METHOD == GRAM else n + 1)


@triton.jit
def gram_tile(
    tensor, width, stride_t, stride_n, rows, columns, frames, one, ALIGN: tl.constexpr, WHOLE: tl.constexpr,
    BK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Inner products of the frames `rows` and `columns` of one sample. WHOLE: BK divides the width."""
    acc = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for k in range(0, width, BK):
        features = k + tl.arange(0, BK)
        a = load_rows(tensor, rows, features, frames, width, stride_t, stride_n, ALIGN, WHOLE)
        b = load_rows(tensor, columns, features, frames, width, stride_t, stride_n, ALIGN, WHOLE)
        acc = product(a, tl.trans(b), acc, one, UPCAST)
    return acc


@triton.jit
def occurrences(s, t):
    """How often a pair of blocks counts: one below the diagonal stands for the one above it too."""
    return tl.where(s == t, 1.0, 2.0).to(tl.float64)


@kernel
def linear_gram(
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
    order,
    found,
    partials,
    diagonals,
    frames: int,
    blocks: int,
    pairs: int,
    one,
    X_ALIGN: tl.constexpr,
    G_ALIGN: tl.constexpr,
    METHOD: tl.constexpr,
    SMALLEST: tl.constexpr,
    UPCAST: tl.constexpr,
    X_WHOLE: tl.constexpr,
    G_WHOLE: tl.constexpr,
    BS: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """One program a (sample, pair of blocks s ≥ t of BT frames, strip of BS of the frames of s).

    partials [B, pairs, BT/BS]: its part of the square; diagonals [B, blocks, BT/BS, 3]: S, Σ_t ‖x_t‖², Σ_t ‖g_t‖² of
    a strip. Of pairs that lie beyond a sample's frames nothing is written.
    """
    program, d, p = tl.program_id(0), times(d, X_ALIGN), times(p, G_ALIGN)
    strip, program = program % (BT // BS), program // (BT // BS)
    sample, pair = program // pairs, program % pairs
    # pair s(s+1)/2 + t, the root corrected for its rounding
    s = ((tl.sqrt((8 * pair + 1).to(tl.float32)) - 1.0) * 0.5).to(tl.int32)
    s = tl.where(s * (s + 1) // 2 > pair, s - 1, s)
    s = tl.where((s + 1) * (s + 2) // 2 <= pair, s + 1, s)
    t = pair - s * (s + 1) // 2
    n = own_count(found, sample)
    if s * BT >= tl.where(by_gram(n, p, d, METHOD), n, 0):
        return
    x_at, g_at = sample_at(x, sample, x_b, X_ALIGN), sample_at(g, sample, g_b, G_ALIGN)
    places = s * BT + strip * BS + tl.arange(0, BS)
    # a strip beyond the n-th frame, in a block that is not, has nothing to read
    rows = own_places(order, sample, places, n, frames)
    columns = own_places(order, sample, t * BT + tl.arange(0, BT), n, frames)
    xx = gram_tile(x_at, d, x_t, x_n, rows, columns, frames, one, X_ALIGN, X_WHOLE, BK, UPCAST)
    gg = gram_tile(g_at, p, g_t, g_n, rows, columns, frames, one, G_ALIGN, G_WHOLE, BK, UPCAST)
    at = partials + program.to(tl.int64) * (BT // BS) + strip
    tl.store(at, sum_of_products(xx, gg, GRAM_GROUP) * occurrences(s, t))
    if s == t:
        of_diagonal = (strip * BS + tl.arange(0, BS))[:, None] == tl.arange(0, BT)[None, :]
        x_square = tl.sum(tl.where(of_diagonal, xx, 0.0), axis=1).to(tl.float64)
        g_square = tl.sum(tl.where(of_diagonal, gg, 0.0), axis=1).to(tl.float64)
        at = diagonals + ((sample.to(tl.int64) * blocks + s) * (BT // BS) + strip) * 3
        both = upper_norms(x_square, d, SMALLEST) * upper_norms(g_square, p, SMALLEST)
        tl.store(at, tl.sum(tl.where(places < n, both, 0.0), axis=0))
        tl.store(at + 1, tl.sum(x_square, axis=0))
        tl.store(at + 2, tl.sum(g_square, axis=0))


@kernel
def finish_gram(
    partials,
    diagonals,
    found,
    out,
    scale,
    again,
    p: int,
    d: int,
    blocks: int,
    pairs: int,
    METHOD: tl.constexpr,
    GRAM_BS: tl.constexpr,
    GRAM_BT: tl.constexpr,
    GRAM_BK: tl.constexpr,
    PER_TERM: tl.constexpr,
    SUM_ROUNDINGS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a sample: its norm, S, and whether direct must do it (again)."""
    sample = tl.program_id(0).to(tl.int64)
    n = own_count(found, sample)
    if not by_gram(n, p, d, METHOD):
        tl.store(again + sample, 1)
        return
    one = tl.full((), 1.0, tl.float64)
    strips = GRAM_BT // GRAM_BS
    sample_blocks = (n + GRAM_BT - 1) // GRAM_BT
    parts, sample_blocks = sample_blocks * (sample_blocks + 1) // 2 * strips, sample_blocks * strips
    square, terms, of_x, of_g = one * 0.0, one * 0.0, one * 0.0, one * 0.0
    for first in range(0, parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        square += tl.sum(
            tl.load(partials + sample * pairs * strips + part, mask=part < parts, other=0.0), axis=0
        )
    for first in range(0, sample_blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        at = diagonals + (sample * blocks * strips + block) * 3
        terms += tl.sum(tl.load(at, mask=block < sample_blocks, other=0.0), axis=0)
        of_x += tl.sum(tl.load(at + 1, mask=block < sample_blocks, other=0.0), axis=0)
        of_g += tl.sum(tl.load(at + 2, mask=block < sample_blocks, other=0.0), axis=0)
    int_d, int_p = d + tl.zeros((), tl.int32), p + tl.zeros((), tl.int32)
    roundings = roundings_of(int_d, GRAM_BK, PER_TERM) + roundings_of(int_p, GRAM_BK, PER_TERM)
    relative = gamma(roundings + GRAM_GROUP + 2.0)
    tiny_x, tiny_g = one * TINIEST * 2.0 * d, one * TINIEST * 2.0 * p
    terms = (terms + 2.0 * n * tl.sqrt(tiny_x * of_g + tiny_g * of_x + tiny_x * tiny_g * n)) / (
        1.0 - relative
    )
    underflow = tiny_x * of_g + tiny_g * of_x + (tiny_x * tiny_g + one * TINIEST) * n
    error = relative * terms * terms + 2.0 * n * underflow
    loose = tl.where(error <= square * GRAM_SHARE, 0, 1)  # of NaN and of a negative square too
    of_sum = gamma(one * SUM_ROUNDINGS) * terms + lost(one * p * d)
    upper = upper_square(tl.where(loose == 0, square + error, 0.0), of_sum)
    tl.store(scale + sample, terms)
    tl.store(again + sample, tl.where(n > 0, loose, 0))
    tl.store(out + sample, tl.where(n > 0, upper, 0.0))


@triton.jit
def row_squares(
    tensor, width, stride_t, stride_n, rows, n, ALIGN: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr
):
    """Σ of squares of each of `rows` in float64, not below the exact one but for underflow."""
    total = tl.zeros((BT,), tl.float64)
    for k in range(0, width, BN):
        block = load_rows(tensor, rows, k + tl.arange(0, BN), n, width, stride_t, stride_n, ALIGN).to(
            tl.float32
        )
        total += tl.sum(block * block, axis=1).to(tl.float64)
    return total * (1.0 + 2.0 * (BN + 1) * UNIT)


@kernel
def linear_rows(
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
    own,
    found,
    partials,
    frames: int,
    blocks: int,
    X_ALIGN: tl.constexpr,
    G_ALIGN: tl.constexpr,
    METHOD: tl.constexpr,
    SMALLEST: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    """partials [B, blocks]: S over blocks of BT frames, of the samples that direct does at once."""
    program, d, p = tl.program_id(0), times(d, X_ALIGN), times(p, G_ALIGN)
    sample, first = program // blocks, (program % blocks) * BT
    n = own_end(found, sample)
    if first >= tl.where(by_gram(own_count(found, sample), p, d, METHOD), 0, n):
        return
    rows = first + tl.arange(0, BT)
    x_square = row_squares(sample_at(x, sample, x_b, X_ALIGN), d, x_t, x_n, rows, n, X_ALIGN, BT, BN)
    g_square = row_squares(sample_at(g, sample, g_b, G_ALIGN), p, g_t, g_n, rows, n, G_ALIGN, BT, BN)
    both = upper_norms(x_square, d, SMALLEST) * upper_norms(g_square, p, SMALLEST)
    counted = tl.load(own + sample.to(tl.int64) * frames + rows, mask=rows < n, other=0) != 0
    tl.store(partials + program.to(tl.int64), tl.sum(tl.where(counted, both, 0.0), axis=0))


@kernel
def linear_direct(
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
    found,
    again,
    partials,
    across: int,
    tiles: int,
    one,
    X_ALIGN: tl.constexpr,
    G_ALIGN: tl.constexpr,
    UPCAST: tl.constexpr,
    LONG: tl.constexpr,
    BT: tl.constexpr,
    BP: tl.constexpr,
    BD: tl.constexpr,
):
    """partials [B, tiles]: Σ of squares of a [BP, BD] tile of gᵀx; one program each. again: None means all.

    LONG: samples may have more than PIECES·BT frames. The float64 total has registers of its own only there.
    """
    program, d, p = tl.program_id(0), times(d, X_ALIGN), times(p, G_ALIGN)
    sample, tile = program // tiles, program % tiles
    if again is not None:  # noqa: SIM102 (decided when compiled)
        if tl.load(again + sample) == 0:
            return
    n = own_end(found, sample)
    row, column = tile // across * BP, tile % across * BD
    x_at, g_at = sample_at(x, sample, x_b, X_ALIGN), sample_at(g, sample, g_b, G_ALIGN)
    if LONG:
        total = tl.zeros((BP, BD), tl.float64)
        for first in range(0, n, PIECES * BT):
            acc = sample_product(
                x_at, d, x_t, x_n, g_at, p, g_t, g_n, row, column, first, tl.minimum(first + PIECES * BT, n), one,
                X_ALIGN, G_ALIGN, UPCAST, BT, BP, BD,
            )  # fmt: skip
            total += acc.to(tl.float64)
        acc = total.to(tl.float32)
    else:
        acc = sample_product(
            x_at, d, x_t, x_n, g_at, p, g_t, g_n, row, column, 0, n, one, X_ALIGN, G_ALIGN, UPCAST, BT, BP, BD,
        )  # fmt: skip
    in_rows = tl.sum(acc * acc, axis=1).to(tl.float64)
    tl.store(partials + program.to(tl.int64), tl.sum(in_rows, axis=0))


@triton.jit
def sample_product(
    x, d, x_t, x_n, g, p, g_t, g_n, row, column, first, n, one, X_ALIGN: tl.constexpr, G_ALIGN: tl.constexpr,
    UPCAST: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The tile of gᵀx [BP, BD] of one sample at (row, column), over frames first <= t < n."""
    outputs, inputs = row + tl.arange(0, BP), column + tl.arange(0, BD)
    acc = tl.zeros((BP, BD), tl.float32)
    for t in range(first, n, BT):
        rows = t + tl.arange(0, BT)
        a = load_rows(g, rows, outputs, n, p, g_t, g_n, G_ALIGN)
        b = load_rows(x, rows, inputs, n, d, x_t, x_n, X_ALIGN)
        acc = product(tl.trans(a), b, acc, one, UPCAST)
    return acc


@kernel
def finish_direct(
    partials,
    rows,
    scale,
    found,
    again,
    out,
    p: int,
    d: int,
    tiles: int,
    blocks: int,
    METHOD: tl.constexpr,
    ROWS_BT: tl.constexpr,
    DIRECT_BD: tl.constexpr,
    NORM_ROUNDINGS: tl.constexpr,
    SUM_ROUNDINGS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a sample: its norm, where direct computed it. scale: S of those that gram tried; None: of none."""
    sample = tl.program_id(0).to(tl.int64)
    if again is not None:  # noqa: SIM102 (decided when compiled)
        if tl.load(again + sample) == 0:
            return
    n = own_end(found, sample)
    one = tl.full((), 1.0, tl.float64)
    square, terms = one * 0.0, one * 0.0
    for first in range(0, tiles, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        square += tl.sum(tl.load(partials + sample * tiles + tile, mask=tile < tiles, other=0.0), axis=0)
    if by_gram(own_count(found, sample), p, d, METHOD):
        terms = tl.load(scale + sample)
    else:
        sample_blocks = (n + ROWS_BT - 1) // ROWS_BT
        for first in range(0, sample_blocks, BLOCK):
            block = first + tl.arange(0, BLOCK)
            terms += tl.sum(
                tl.load(rows + sample * blocks + block, mask=block < sample_blocks, other=0.0), axis=0
            )
    square = square * (1.0 + gamma(one * (DIRECT_BD + 2))) + one * TINIEST * 2.0 * p * d
    relative = gamma(one * NORM_ROUNDINGS) + gamma(one * SUM_ROUNDINGS)
    upper = upper_square(square, relative * terms + lost(one * p * d))
    tl.store(out + sample, tl.where(n > 0, upper, 0.0))


@kernel
def linear_sum(
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
    factors,
    lengths,
    out,
    batch: int,
    frames: int,
    across: int,
    one,
    X_ALIGN: tl.constexpr,
    G_ALIGN: tl.constexpr,
    UPCAST: tl.constexpr,
    PAIRS: tl.constexpr,
    BT: tl.constexpr,
    BP: tl.constexpr,
    BD: tl.constexpr,
):
    """One program a [BP, BD] tile of `out` [p, d]: every sample's float32 products times its factor.

    A product covers PIECES·BT frames; a longer sample has several. They are added in float64, or in PAIRS of float32.

    Without lengths it is one loop over all samples' frames, so that a sample's first loads are on their way while the
    one before is computed (nothing they need may wait for a factor, so samples with factor 0 are read, and left out);
    with lengths, frames beyond them are not even looped over. The bits are the same.
    """
    program, d, p = tl.program_id(0), times(d, X_ALIGN), times(p, G_ALIGN)
    row, column = program // across * BP, program % across * BD
    total = tl.zeros((BP, BD), tl.float32 if PAIRS else tl.float64)
    rest = tl.zeros((BP, BD), tl.float32)
    outputs, inputs = row + tl.arange(0, BP), column + tl.arange(0, BD)
    if lengths is None:
        acc, chunks = tl.zeros((BP, BD), tl.float32), (frames + BT - 1) // BT
        for step in range(0, batch * chunks):
            sample = step // chunks + tl.zeros((), tl.int64)
            rows = step % chunks * BT + tl.arange(0, BT)
            a = load_rows(sample_at(g, sample, g_b, G_ALIGN), rows, outputs, frames, p, g_t, g_n, G_ALIGN)
            b = load_rows(sample_at(x, sample, x_b, X_ALIGN), rows, inputs, frames, d, x_t, x_n, X_ALIGN)
            acc = product(tl.trans(a), b, acc, one, UPCAST)
            if run_ends(step % chunks, chunks):
                factor = tl.load(factors + sample)
                if factor != 0.0:  # a select for every entry would cost as much as the addition
                    total, rest = add_sample(total, rest, factor, acc, one, PAIRS)
                total, rest = renewed(total, rest, sample, PAIRS)
                acc = tl.zeros((BP, BD), tl.float32)
    else:
        for i in range(0, batch):
            sample = i + tl.zeros((), tl.int64)
            factor = tl.load(factors + sample)
            n = frames_added(factor, lengths, sample, frames)
            for first in range(0, n, PIECES * BT):
                acc = sample_product(
                    sample_at(x, sample, x_b, X_ALIGN), d, x_t, x_n, sample_at(g, sample, g_b, G_ALIGN), p, g_t, g_n,
                    row, column, first, tl.minimum(first + PIECES * BT, n), one, X_ALIGN, G_ALIGN, UPCAST, BT, BP, BD,
                )  # fmt: skip
                total, rest = add_sample(total, rest, factor, acc, one, PAIRS)
            total, rest = renewed(total, rest, sample, PAIRS)
    # read only now: addresses held over the loop would spill
    at = out + outputs.to(tl.int64)[:, None] * d + inputs[None, :]
    inside = (outputs < p)[:, None] & (inputs < d)[None, :]
    wide = float64_total(total, rest, PAIRS) + tl.load(at, mask=inside, other=0.0).to(tl.float64)
    tl.store(at, wide.to(out.dtype.element_ty), mask=inside)
