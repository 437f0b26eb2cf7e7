"""What every reference implementation shares: cutting out one sample, and handing a float64 square back as float32."""

from collections.abc import Iterator

import torch
from torch import Tensor


def own_frames(lengths: Tensor | None, batch: int, frames: int) -> list[int]:
    """Each sample's own number of frames; all of them where no lengths are given."""
    return [frames] * batch if lengths is None else [int(n) for n in lengths.tolist()]


def live(factors: Tensor) -> Iterator[tuple[int, float]]:
    """(sample, factor) of the samples a weighted sum reads: a factor of 0 means not read, not times 0."""
    return ((i, c) for i, c in enumerate(factors.tolist()) if c != 0.0)


def round_up(squares: list[Tensor], like: Tensor) -> Tensor:
    """The float64 squares, one a sample, as a float32 vector on `like`'s device, none below its square."""
    exact = torch.stack(squares) if squares else like.new_zeros(0, dtype=torch.float64)
    nearest = exact.float()
    return torch.where(nearest < exact, nearest.nextafter(nearest.new_tensor(torch.inf)), nearest)
