"""Flat clipping: one norm a sample over all trained parameters, and what one sample can change in the sum."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dpkernels.nn import Record, norms_sq

# Relative to C. See rounding_slack for all three.
LEAST_SLACK = 2.0**-20
_PIECES = 2**9
_CANCELLATION = 2**17


def total_norm_sq(records: Sequence[Record], batch_size: int, device: torch.device) -> Tensor:
    """Σ over records of their squared norms: [B] float64, rounded up. A parameter without a record adds 0."""
    return add_up(norms_sq(records), batch_size, device)


def add_up(norms: Iterable[Tensor], batch_size: int, device: torch.device) -> Tensor:
    """Σ of [B] upper bounds: [B] float64, an upper bound itself.

    R additions in float64 lose at most R·2⁻⁵³ of the sum, which the factor 1 + (R + 1)·2⁻⁵² more than gives
    back. NaN and infinity stay what they are.
    """
    total, count = torch.zeros(batch_size, dtype=torch.float64, device=device), 0
    for norm_sq in norms:
        total += norm_sq.to(device=device, dtype=torch.float64)
        count += 1
    return total * (1 + (count + 1) * 2.0**-52)


def batch_bound(units: int, sample_rate: float, *, per_unit: int = 1, capacity: int | None = None) -> int:
    """A public bound on the examples of a logical batch.

    The capacity or the whole data set where these are smaller; else m = q·N + 30·√(q·N) + 500 units, which
    Poisson sampling exceeds with probability below e⁻⁴⁰⁰ (Chernoff: exp(−t²/(2(μ + t/3))), t = 30√μ + 500),
    less than any δ in float64 can tell from 0. The optimizer refuses a larger batch.
    """
    mean = units * sample_rate
    bound = min(units, math.ceil(mean + 30 * math.sqrt(mean) + 500))
    if capacity is not None:
        bound = min(bound, capacity)
    return bound * per_unit


def rounding_slack(examples: int) -> float:
    """s with: one example more or less changes the float64 sum of clipped gradients by at most (1 + s)·C.

    The example's own contribution is at most C: clip_factors and the ops see to that. Beyond it, the example
    can change how the others' additions round: each addition rounds by at most 2⁻⁵³ of the partial sum.

    A long example is added in pieces (of at least 64 frames, or a token of an embedding), at most P of them to
    an entry, and they may cancel: a piece can be far above C. How far is bounded by the ops' own rounding
    bounds: a norm is stated as at least e ≥ (2κ + 1)·2⁻²⁴·S, S = Σ_t ‖x_t‖‖g_t‖ (csrc/cpu/bounds.h), so that
    c·S ≤ C/(e/S) = K·C with K ≤ 2¹⁷ where there are two pieces of 64 frames or more (κ ≥ 66), and P·K ≤ 2²³
    for an embedding. A partial sum is then below (n + K)·C, a sum of n·P additions within n·P·(n + K)·2⁻⁵³·C
    of the exact one, and two neighbouring sums differ by twice that more than exact ones; 2⁻⁵¹ in place of
    2⁻⁵² leaves a factor of two for terms of second order. P = 2⁹ is 32,768 frames, or 512 equal tokens.

    It holds for gradients of float32 and narrower; float64 models (for tests) have no such K. What it does
    not count: an example that changes the *shape* of a batch can change how the others' forward and backward
    (and gradients formed there by batched products) round (docs/privacy.md says how much that was measured to be).
    """
    return max(LEAST_SLACK, examples * _PIECES * (examples + _CANCELLATION) * 2.0**-51)


def sensitivity(max_grad_norm: float, examples: int, per_unit: int = 1) -> float:
    """L2 sensitivity of the sum to one unit: per_unit·C·(1 + rounding_slack)."""
    return per_unit * max_grad_norm * (1 + rounding_slack(examples))
