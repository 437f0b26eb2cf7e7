"""What holds for every backend; the same functions must catch the faults that the tests plant."""

import math
from fractions import Fraction

import torch
from torch import Tensor

from dpkernels import ops
from tests.ops.cases import Case
from tests.ops.tolerances import (
    CLIP_ROUNDING,
    FLOAT32_ROUNDING,
    GRAM_SHARE,
    NORM_ABOVE,
    SUM_OFF,
    TRUTH_ROUNDING,
)

# c is rounded to float32 (2⁻²⁴) from a quotient off by a few 2⁻⁵³: it is never smaller than this share.
SHARE = 1 - Fraction(1, 2**22)
LEAST_NORMAL = Fraction(2) ** -126


def never_below(case: Case, norms: list[Tensor] | None = None, **options: object) -> None:
    """Every norm ≥ the exact square; `norms`: of the case, where they were computed before."""
    for parameter, norm_sq in enumerate(case.norms(**options) if norms is None else norms):
        assert norm_sq.shape == (case.batch,)
        assert norm_sq.dtype == torch.float32
        for i in range(case.batch):
            exact = float(case.gradients(i)[parameter].square().sum())
            terms = case.scale(i)[parameter]
            least = exact - TRUTH_ROUNDING * terms * (terms * TRUTH_ROUNDING + exact**0.5)
            assert float(norm_sq[i]) >= least, f"sample {i}: {float(norm_sq[i])} < {exact}"


def not_far_above(
    case: Case, dtype: torch.dtype, norms: list[Tensor] | None = None, **options: object
) -> float:
    """Every norm ≤ (‖G‖ + tolerance·S)², and GRAM_SHARE more by Gram; the mean relative excess of the squares."""
    share = GRAM_SHARE if options.get("method") == "gram" else 0.0
    excess = []
    for parameter, norm_sq in enumerate(case.norms(**options) if norms is None else norms):
        for i in range(case.batch):
            norm = float(case.gradients(i)[parameter].norm())
            most = (norm * (1 + share) ** 0.5 + NORM_ABOVE[dtype] * case.scale(i)[parameter]) ** 2
            most *= 1 + FLOAT32_ROUNDING
            assert float(norm_sq[i]) <= most, f"sample {i}: {float(norm_sq[i])} > {most}"
            if norm:
                excess.append(float(norm_sq[i]) / norm**2 - 1)
    return sum(excess) / len(excess) if excess else 0.0


def within(case: Case, dtype: torch.dtype, **options: object) -> float:
    """Both: the same norms are never below and not far above."""
    norms = case.norms(**options)
    never_below(case, norms)
    return not_far_above(case, dtype, norms, **options)


def added_within(case: Case, max_grad_norm: float) -> None:
    """What one sample adds to the sum has norm ≤ C, over all of the op's parameters."""
    squares = torch.stack([n.double() for n in case.norms()]).sum(0)
    factors = ops.clip_factors(squares, max_grad_norm)
    for i in range(case.batch):
        only = torch.where(torch.arange(case.batch) == i, factors, torch.zeros_like(factors))
        added = torch.cat([out.flatten() for out in case.sums(only)])
        assert float(added.norm()) <= max_grad_norm * CLIP_ROUNDING, f"sample {i} adds {float(added.norm())}"


def sums_match(case: Case, dtype: torch.dtype, factors: Tensor, start: float = 0.0) -> None:
    """Weighted sums with a float64 out = Σ c_i G_i, to the rounding of each sample's own accumulation."""
    for parameter, out in enumerate(case.sums(factors, start=start)):
        truth = torch.full_like(out, start)
        allowed = TRUTH_ROUNDING * (1 + abs(start))
        for i in range(case.batch):
            if float(factors[i]):
                truth += float(factors[i]) * case.gradients(i)[parameter]
                allowed += abs(float(factors[i])) * case.scale(i)[parameter] * SUM_OFF[dtype]
        assert out.shape == truth.shape
        assert float((out - truth).norm()) <= allowed


def alone_is_the_same(case: Case, **options: object) -> None:
    """A sample's norm has the same bits in its batch as by itself, cut to its own length."""
    together = case.norms(**options)
    for i in range(case.batch):
        for mine, in_batch in zip(case.alone(i).norms(**options), together, strict=True):
            assert torch.equal(mine[0], in_batch[i]), (
                f"sample {i}: {float(mine[0])!r}, {float(in_batch[i])!r}"
            )


def factors_within(norm_sq: Tensor, limit: float, factors: Tensor | None = None) -> None:
    """c² · norm_sq ≤ C² in exact arithmetic, and c not needlessly small; `factors`: those computed before."""
    factors = ops.clip_factors(norm_sq, limit) if factors is None else factors
    assert factors.dtype == torch.float32
    assert factors.shape == norm_sq.shape
    for square, factor in zip(norm_sq.tolist(), factors.tolist(), strict=True):
        if not math.isfinite(square) or square < 0:
            assert factor == 0.0
            continue
        v, c, most = Fraction(square), Fraction(factor), Fraction(limit)
        assert 0 <= c <= 1
        assert c * c * v <= most * most, f"{factor} · √{square} > {limit}"
        if v <= most * most * SHARE:
            assert c == 1
        elif c >= LEAST_NORMAL:
            assert c * c * v >= most * most * SHARE * SHARE


def automatic_factors_within(
    norm_sq: Tensor, limit: float, stability: float, factors: Tensor | None = None
) -> None:
    """c·(√norm_sq + γ) ≤ C in exact arithmetic, and c not needlessly small; `factors`: those computed before."""
    factors = ops.automatic_clip_factors(norm_sq, limit, stability) if factors is None else factors
    assert factors.dtype == torch.float32
    assert factors.shape == norm_sq.shape
    for square, factor in zip(norm_sq.tolist(), factors.tolist(), strict=True):
        if not math.isfinite(square) or square < 0:
            assert factor == 0.0
            continue
        v, c, most = Fraction(square), Fraction(factor), Fraction(limit)
        # c·√v ≤ C − c·γ, squared
        rest = most - c * Fraction(stability)
        assert rest >= 0
        assert c * c * v <= rest * rest, f"{factor} · (√{square} + {stability}) > {limit}"
        if LEAST_NORMAL <= c < Fraction(torch.finfo(torch.float32).max):
            least = most * SHARE - c * Fraction(stability)
            assert least <= 0 or c * c * v >= least * least * SHARE
