"""Clip factors: the factor by which each sample's gradient is scaled in the sum."""

import torch
from torch import Tensor

from dpkernels.ops import _check, _library

_clip_factors = _library.define(
    "clip_factors",
    "(Tensor norm_sq, float max_grad_norm) -> Tensor",
    fake=lambda norm_sq, max_grad_norm: _library.norms(norm_sq),
)

_automatic_clip_factors = _library.define(
    "automatic_clip_factors",
    "(Tensor norm_sq, float max_grad_norm, float stability) -> Tensor",
    fake=lambda norm_sq, max_grad_norm, stability: _library.norms(norm_sq),
)


def _check_norms(norm_sq: Tensor, max_grad_norm: float) -> None:
    if norm_sq.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"norm_sq: expected float32 or float64; given {norm_sq.dtype}; add squares in float32 or wider"
        )
    _check.shape("norm_sq", norm_sq, (None,), "[B]")
    _check.positive("max_grad_norm", max_grad_norm)


def clip_factors(norm_sq: Tensor, max_grad_norm: float) -> Tensor:
    """The factor that bounds each sample's gradient norm by C: c_i = min(1, C/√norm_sq_i), rounded down.

    c_i·√norm_sq_i ≤ C holds exactly, not up to rounding. A sample whose norm is NaN or infinite has factor exactly 0,
    and the weighted sums do not read it. The same holds for a negative norm_sq, which no norm op returns.

    Args:
        norm_sq: [B] float32 or float64, each sample's squared norm over *all* trained parameters.
        max_grad_norm: C > 0, finite, in units of the gradient's norm.

    Returns:
        [B] float32 in [0, 1].

    Raises:
        TypeError: norm_sq is neither float32 nor float64 (bfloat16 norms are off by 0.4 %).
        ValueError: norm_sq is not a vector, or max_grad_norm is not a finite number above 0.

    Source: Abadi et al. 2016, arXiv:1607.00133, algorithm 1.
    """
    _check_norms(norm_sq, max_grad_norm)
    result: Tensor = _clip_factors(norm_sq, float(max_grad_norm))
    return result


def automatic_clip_factors(norm_sq: Tensor, max_grad_norm: float, stability: float) -> Tensor:
    """The factor that brings each sample's gradient to a norm just below C: c_i = C/(√norm_sq_i + γ), rounded down.

    c_i·(√norm_sq_i + γ) ≤ C holds exactly, so a sample adds less than C, however small or large its gradient. Its
    direction counts, and hardly its size: there is no norm to tune. NaN, infinite and negative norm_sq get exactly 0.

    Args:
        norm_sq: [B] float32 or float64, each sample's squared norm over *all* trained parameters.
        max_grad_norm: C > 0, finite, in units of the gradient's norm.
        stability: γ > 0, finite, in the same units: a gradient of norm γ is scaled to C/2.

    Returns:
        [B] float32 in [0, C/γ].

    Raises:
        TypeError: norm_sq is neither float32 nor float64.
        ValueError: norm_sq is not a vector, or max_grad_norm or stability is not a finite number above 0.

    Source: Bu et al. 2022, arXiv:2206.07136 (AUTO-S).
    """
    _check_norms(norm_sq, max_grad_norm)
    _check.positive("stability", stability)
    result: Tensor = _automatic_clip_factors(norm_sq, float(max_grad_norm), float(stability))
    return result
