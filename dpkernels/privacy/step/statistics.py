"""Statistics of the last applied step. NOT PRIVATE."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dpkernels.privacy.step.strategies import Clipped


@dataclass(frozen=True)
class StepStats:
    """Statistics of the last applied step. NOT PRIVATE: for whoever trains, never for a report to others.

    Attributes:
        examples: examples in the logical batch.
        clip_rate: share of the examples that were clipped (0 for an empty batch); under per-layer clipping, in any
            layer; under automatic clipping, of those that were made smaller; under adaptive clipping, by the step's C.
        mean_norm: mean norm of their whole gradients before clipping, over the finite norms.
        non_finite: number of examples with a non-finite norm, which contributed exactly 0 (under per-layer clipping:
            in the layers where the norm was not finite).
    """

    examples: int
    clip_rate: float
    mean_norm: float
    non_finite: int

    def __repr__(self) -> str:
        return (
            f"StepStats(NOT PRIVATE: examples={self.examples}, clip_rate={self.clip_rate:.3f}, "
            f"mean_norm={self.mean_norm:.4g}, non_finite={self.non_finite})"
        )


def statistics(seen: Sequence[Clipped]) -> StepStats:
    """The statistics of a logical batch from its micro-batches' norms and factors. NOT PRIVATE."""
    if not seen:
        return StepStats(0, 0.0, 0.0, 0)
    norm_sq = torch.cat([part.norm_sq.cpu() for part in seen])
    factors = torch.cat([part.factors.cpu() for part in seen])
    finite = torch.isfinite(norm_sq)
    mean = norm_sq[finite].sqrt().mean().item() if bool(finite.any()) else 0.0
    clipped = ((factors < 1) & finite).sum().item()
    return StepStats(len(norm_sq), clipped / len(norm_sq), mean, int((~finite).sum().item()))
