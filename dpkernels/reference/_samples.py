"""Helpers of all reference implementations: a sample's frames, live samples, and rounding up to float32."""

from collections.abc import Iterator

import torch
from torch import Tensor


def own_frames(lengths: Tensor | None, batch: int, frames: int) -> list[int]:
    """Return each sample's number of frames, which is `frames` if lengths is None."""
    return [frames] * batch if lengths is None else [int(n) for n in lengths.tolist()]


def live(factors: Tensor) -> Iterator[tuple[int, float]]:
    """Yield (sample, factor) of the samples that a weighted sum reads; one with factor 0 is skipped, not multiplied."""
    return ((i, c) for i, c in enumerate(factors.tolist()) if c != 0.0)


def round_up(squares: list[Tensor], like: Tensor) -> Tensor:
    """Round the float64 squares, one a sample, up to a float32 vector on `like`'s device."""
    exact = torch.stack(squares) if squares else like.new_zeros(0, dtype=torch.float64)
    nearest = exact.float()
    return torch.where(nearest < exact, nearest.nextafter(nearest.new_tensor(torch.inf)), nearest)
