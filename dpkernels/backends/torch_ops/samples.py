"""One sample at a time: what the compositions share.

Every sample is computed by calls whose shapes, strides and alignment depend on that sample alone: BLAS and
torch's reductions choose their order by shape, alignment and thread count, so a batched product or sum could
give one sample other bits next to other examples. Bounds and their derivation: `dpkernels.backends.bounds`.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dpkernels.backends.bounds import SLACK, gamma, upper_square


def frames_of(lengths: Tensor | None, batch: int, frames: int) -> list[int]:
    """Each sample's own number of frames; all of them where no lengths are given."""
    return [frames] * batch if lengths is None else [int(n) for n in lengths.tolist()]


def live(factors: Tensor) -> Iterator[tuple[int, float]]:
    """(sample, factor) of the samples with a factor other than 0; the others are not read."""
    return ((i, c) for i, c in enumerate(factors.tolist()) if c != 0.0)


def sample(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """One sample as a contiguous matrix, aligned as a fresh allocation is, from anywhere in a batch."""
    matrix = rows.to(dtype).contiguous()
    return matrix.clone() if matrix.data_ptr() % 64 else matrix


def vector(values: list[Tensor], like: Tensor) -> Tensor:
    """The 0-d values as one vector, of float64 where there are none."""
    return torch.stack(values) if values else like.new_zeros(0, dtype=torch.float64)


def square_of(values: Tensor) -> Tensor:
    """Σ values² in float64, as a 0-d tensor."""
    wide = values.double().flatten()
    return torch.dot(wide, wide)


def upper_in_float64(values: list[Tensor], terms: list[Tensor], roundings: list[int], like: Tensor) -> Tensor:
    """‖values_i‖² rounded up, for float64 sums of `roundings` terms whose norms add up to at most `terms`.

    Twice γ: the norm's own rounding and the weighted sum's, both float64; what float32 inputs leave is 10⁻¹³
    of the terms.
    """
    bounds = [2.0 * gamma(n + 4, torch.float64) * SLACK * t for n, t in zip(roundings, terms, strict=True)]
    return upper_square(vector([square_of(v) for v in values], like), vector(bounds, like))


def sum_of_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(Σ_t rows_t, a bound ≥ Σ_t ‖rows_t‖ by Cauchy and Schwarz) of float64 rows [L, p]."""
    return rows.sum(0), square_of(rows).sqrt() * math.sqrt(len(rows))
