"""Definitions of the clipping factors, rounded down, so that c·√norm_sq ≤ C exactly."""

import math
from fractions import Fraction

import torch
from torch import Tensor

from dpkernels.reference._definitions import definition


def _factor(norm_sq: float, max_grad_norm: float) -> float:
    if not math.isfinite(norm_sq) or norm_sq < 0.0:
        return 0.0
    if Fraction(norm_sq) <= Fraction(max_grad_norm) ** 2:
        return 1.0
    norm = math.nextafter(math.sqrt(norm_sq), math.inf)
    return min(1.0, math.nextafter(max_grad_norm / norm, 0.0))


@definition
def clip_factors(norm_sq: Tensor, max_grad_norm: float) -> Tensor:
    """min(1, C/√norm_sq), each step rounded down, 1 where norm_sq ≤ C²; 0 where NaN, infinite or negative."""
    factors = [_factor(n, max_grad_norm) for n in norm_sq.tolist()]
    exact = torch.tensor(factors, dtype=torch.float64, device=norm_sq.device)
    nearest = exact.float()
    return torch.where(nearest > exact, nearest.nextafter(nearest.new_zeros(())), nearest)


@definition
def automatic_clip_factors(norm_sq: Tensor, max_grad_norm: float, stability: float) -> Tensor:
    """C/(√norm_sq + γ), each step rounded down; 0 where norm_sq is NaN, infinite or negative."""
    factors = []
    for square in norm_sq.tolist():
        usable = math.isfinite(square) and square >= 0.0
        norm = math.nextafter(math.sqrt(square), math.inf) if usable else math.inf
        factors.append(
            max(0.0, math.nextafter(max_grad_norm / math.nextafter(norm + stability, math.inf), 0.0))
        )
    exact = torch.tensor(factors, dtype=torch.float64, device=norm_sq.device)
    nearest = exact.float()
    return torch.where(nearest > exact, nearest.nextafter(nearest.new_zeros(())), nearest)
