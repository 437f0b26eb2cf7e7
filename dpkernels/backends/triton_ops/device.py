"""Functions that the kernels share.

Integer arguments of kernels are never specialised (`kernel` in `launching`): the code, and with it the order
of a sum, depends on types, the layer's shape and the layout, but not on a batch's size or padding.
"""

import triton
import triton.language as tl

from dpkernels.backends.triton_ops import bounds

UNIT = tl.constexpr(bounds.UNIT)
TINIEST = tl.constexpr(bounds.TINIEST)
SLACK = tl.constexpr(bounds.SLACK)
PIECES = tl.constexpr(bounds.PIECES)
RENEWED = tl.constexpr(bounds.RENEWED)


@triton.jit
def frames_of(lengths, sample, frames):
    """L_i: lengths[i] clamped to [0, T] (a GPU cannot raise), or T if `lengths` is None."""
    n = frames + tl.zeros((), tl.int32)
    if lengths is not None:
        n = tl.minimum(tl.maximum(tl.load(lengths + sample), 0), frames).to(tl.int32)
    return n


@triton.jit
def frames_added(factor, lengths, sample, frames):
    """L_i of a sample in a weighted sum; 0 if its factor is 0, because multiplying by 0 would keep a NaN."""
    return tl.where(factor != 0.0, frames_of(lengths, sample, frames), 0)


@triton.jit
def times(value, ALIGN: tl.constexpr):
    """Multiply an integer that `launching.rows` divided by ALIGN, so that the compiler knows the divisor."""
    if ALIGN > 1:
        value = value * ALIGN
    return value


@triton.jit
def sample_at(tensor, sample, stride_b, ALIGN: tl.constexpr):
    """Address of sample i of a [B, T, n] tensor passed by `launching.rows`."""
    return tensor + times(sample.to(tl.int64) * stride_b, ALIGN)


@triton.jit
def offsets(rows, columns, stride_t, stride_n, ALIGN: tl.constexpr):
    """Offsets [rows, columns] within a sample, 64 bits."""
    if ALIGN == 0:
        return rows.to(tl.int64)[:, None] * stride_t + columns.to(tl.int64)[None, :] * stride_n
    else:
        return times(rows.to(tl.int64) * stride_t, ALIGN)[:, None] + columns[None, :]


@triton.jit
def load_rows(
    base, rows, columns, n, width, stride_t, stride_n, ALIGN: tl.constexpr, WHOLE: tl.constexpr = False
):
    """Frames `rows` < n and features `columns` < width of one sample; 0 elsewhere. WHOLE: all columns are inside."""
    if WHOLE:
        inside = (rows < n)[:, None] & (columns >= 0)[None, :]
    else:
        inside = (rows < n)[:, None] & (columns < width)[None, :]
    return tl.load(base + offsets(rows, columns, stride_t, stride_n, ALIGN), mask=inside, other=0.0)


@triton.jit
def product(a, b, acc, one, UPCAST: tl.constexpr):
    """acc + a @ b for float32 `acc`: products accumulated from 0 and then added, two accumulations and not one.

    Triton turns `acc += tl.dot(a, b)` into one accumulation that starts at `acc`, which would make chains as long as
    the sample. A factor of `one`, 1.0 and unknown to the compiler, keeps the addition out (and costs nothing: it is
    the addition's multiply-add). UPCAST: the interpreter has no bfloat16 products.
    """
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return acc + tl.dot(a, b, input_precision="ieee") * one


@triton.jit
def run_ends(chunk, chunks):
    """Whether a float32 sum ends with this one of a sample's `chunks`: it is the last, or PIECES are in the sum."""
    return (chunk == chunks - 1) | (chunk % PIECES == PIECES - 1)


@triton.jit
def add_sample(total, rest, factor, gradient, one, PAIRS: tl.constexpr):
    """(total, rest) after the addition of a sample's factor times its float32 `gradient`.

    PAIRS: both are float32, and their sum is what float64 would hold (`bounds`, "Pairs"). Otherwise `total` is float64
    and `rest` stays as it is. `one` is that of `product`.
    """
    if PAIRS:
        # Adding 0 makes the product one float32, compiled or not: it cannot be fused with the additions below.
        value = factor * gradient + (one - 1.0)
        before = total
        total = before + value
        of_value = total - before
        rest += (before - (total - of_value)) + (value - of_value)
    else:
        total += factor.to(tl.float64) * gradient.to(tl.float64)
    return total, rest


@triton.jit
def renewed(total, rest, sample, PAIRS: tl.constexpr):
    """A pair after `sample`, added or left out: every RENEWED-th time its sum is brought back to `total`."""
    if PAIRS:  # noqa: SIM102 (decided when compiled)
        if sample % RENEWED == RENEWED - 1:
            before = total
            total = before + rest
            rest = rest - (total - before)
    return total, rest


@triton.jit
def float64_total(total, rest, PAIRS: tl.constexpr):
    """The sum of `add_sample`, in float64."""
    if PAIRS:
        return total.to(tl.float64) + rest.to(tl.float64)
    else:
        return total


@triton.jit
def squares_above_zero(values):
    """Float32 squares that are 0 for 0 only, and else too large by 2⁻¹²⁵: more than underflow takes from one.

    Their sum over a row is 0 if and only if all of the row is, which adds nothing to a gradient.
    """
    return values * values + tl.where(values != 0.0, 2.0 * TINIEST, 0.0)


@triton.jit
def upper_norms(squares, width, SMALLEST: tl.constexpr):
    """‖row‖ + δ√n in float64, not below, of rows of n features from float64 sums of their float32 squares.

    The squares' own rounding is the caller's; what underflow took from n of them is here.
    """
    one = tl.full((), 1.0, tl.float64)
    return tl.sqrt(squares + one * (2.0 * TINIEST) * width) + one * SMALLEST * tl.sqrt(one * width)


@triton.jit
def sum_of_products(a, b, GROUP: tl.constexpr):
    """Σ a·b of float32 tiles, in float64 over groups of GROUP neighbours in a row, each added in float32."""
    groups = tl.reshape(a * b, (a.shape[0], a.shape[1] // GROUP, GROUP))
    return tl.sum(tl.sum(tl.sum(groups, axis=2).to(tl.float64), axis=1), axis=0)


@triton.jit
def roundings_of(n, CHAIN: tl.constexpr, PER_TERM: tl.constexpr):
    """Roundings that a term meets in a sum of n by `product`, all in float32, in pieces of CHAIN terms; float64.

    A piece counts whole, however few of its terms are there: which products share a block is the tensor core's. n must
    be a size of the layer; for frames see `bounds.sum_roundings`.
    """
    return (CHAIN * PER_TERM + 1.0) + ((n + CHAIN - 1) // CHAIN).to(tl.float64)


@triton.jit
def lost(entries):
    """What underflow can take from the norm of a gradient, in the norm and in the sum: 2⁻⁹³√entries, in float64.

    Each of the two flushes less than 2·2⁻¹²⁶ of a product and its addition, and a sample has fewer than 2³¹ frames.
    The frames are not counted: below 2⁻⁷⁵ a norm's square is the smallest float32 in any case.
    """
    one = tl.full((), 1.0, tl.float64)
    return one * (4.0 * TINIEST * 2.0**31) * tl.sqrt(one * entries)


@triton.jit
def gamma(roundings):
    """κu/(1−κu) in float64; infinite if κu is so large that there is no bound."""
    nu = roundings * tl.full((), UNIT, tl.float64)
    return tl.where(nu < 0.5, nu / (1.0 - nu), float("inf"))


@triton.jit
def error_of(magnitude, entries, ROUNDINGS: tl.constexpr):
    """e of a norm: its own error and that of the sum, at most γ√magnitude each, and what underflow takes."""
    relative = gamma(tl.full((), ROUNDINGS, tl.float64))
    # the magnitude may be too small by `relative`
    error = 2.0 * relative / (1.0 - relative) * tl.sqrt(magnitude)
    return error + tl.where(magnitude == 0.0, 0.0, lost(entries))


@triton.jit
def float64_of(high, low):
    """The float64 with these two halves of its bits: Triton passes Python floats as float32."""
    upper = high.to(tl.int64) << 32
    return (upper | (low.to(tl.int64) & 0xFFFFFFFF)).to(tl.float64, bitcast=True)


@triton.jit
def upper_square(square, error):
    """(√square + error)² of float64 values ≥ 0 as float32, rounded up; NaN and infinity are kept."""
    norm = tl.sqrt(square * SLACK) + error
    return round_up(norm * norm * SLACK)


@triton.jit
def round_up(exact):
    """The least float32 that is not below a float64 ≥ 0; NaN and infinity are kept."""
    nearest = exact.to(tl.float32)
    # the next float32 above a non-negative one has the next bit pattern
    above = (nearest.to(tl.int32, bitcast=True) + 1).to(tl.float32, bitcast=True)
    return tl.where(nearest.to(tl.float64) < exact, above, nearest)
