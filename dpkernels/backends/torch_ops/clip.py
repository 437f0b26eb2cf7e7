"""Clip factors composed from PyTorch."""

import math
import sys
from fractions import Fraction

import torch
from torch import Tensor

from dpkernels.backends.bounds import round_down


def _square_rounded_down(value: float) -> float:
    square = min(value * value, sys.float_info.max)
    return square if Fraction(square) <= Fraction(value) ** 2 else math.nextafter(square, 0.0)


def clip_factors(norm_sq: Tensor, max_grad_norm: float) -> Tensor:
    """min(1, C/√norm_sq) rounded down; see `dpkernels.ops.clip_factors`."""
    square = norm_sq.double()
    # √ and ÷ round by 2⁻⁵³ each, and the product once more: 2⁻⁵⁰ covers them before the rounding to float32
    factor = (max_grad_norm / square.sqrt() * (1.0 - 2.0**-50)).clamp_max(1.0)
    limit = _square_rounded_down(max_grad_norm)
    factor = torch.where(square <= limit, torch.ones_like(factor), factor)
    usable = square.isfinite() & (square >= 0.0)
    return torch.where(
        usable, round_down(factor), torch.zeros((), dtype=torch.float32, device=norm_sq.device)
    )


def automatic_clip_factors(norm_sq: Tensor, max_grad_norm: float, stability: float) -> Tensor:
    """C/(√norm_sq + γ) rounded down; see `dpkernels.ops.automatic_clip_factors`."""
    square = norm_sq.double()
    # √, + and ÷ round by 2⁻⁵³ each, and the product once more: 2⁻⁵⁰ covers them before the rounding to float32
    factor = max_grad_norm / (square.sqrt() + stability) * (1.0 - 2.0**-50)
    usable = square.isfinite() & (square >= 0.0)
    return torch.where(
        usable, round_down(factor), torch.zeros((), dtype=torch.float32, device=norm_sq.device)
    )
