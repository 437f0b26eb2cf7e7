"""Helpers of the compositions, which compute one sample at a time.

The shapes, strides and alignment of a sample's calls depend on that sample alone. BLAS and torch's reductions choose
their order by shape, alignment and thread count, so a sample's bits in a batched product or sum could depend on the
other samples. `dpkernels.backends.bounds` derives the bounds.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from dpkernels.backends.bounds import SLACK, gamma, upper_square


def frames_of(lengths: Tensor | None, batch: int, frames: int) -> list[int]:
    """Return each sample's number of frames, which is `frames` if lengths is None."""
    return [frames] * batch if lengths is None else [int(n) for n in lengths.tolist()]


def live(factors: Tensor) -> Iterator[tuple[int, float]]:
    """Yield (sample, factor) of the samples with a factor other than 0; the others are not read."""
    return ((i, c) for i, c in enumerate(factors.tolist()) if c != 0.0)


def sample(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return one sample, from any place in a batch, as a contiguous matrix with the alignment of a new allocation."""
    matrix = rows.to(dtype).contiguous()
    return matrix.clone() if matrix.data_ptr() % 64 else matrix


def own_frames(*rows: Tensor) -> Tensor:
    """Which frames of one sample add to its gradient, Σ_t over products of `rows` [L, n_k]: [L] bool.

    A frame adds nothing if one of its rows is all zero. Without those frames everything that a norm is decided by (its
    form, the pieces of its sums, its bound) is the sample's own, whatever its padding is and wherever that is. Where
    a row that is not finite faces a zero row, all frames count: 0·NaN must stay NaN.
    """
    # Mostly the first entries show it, an n-th of what there is to read; then only frames that begin with 0 are read.
    own = torch.stack([(row[:, :1] != 0).any(1) for row in rows]).all(0)
    if bool(own.all()):
        return own
    doubtful = ~own
    own[doubtful] = torch.stack([(row[doubtful] != 0).any(1) for row in rows]).all(0)
    finite = all(bool(row[~own].isfinite().all()) for row in rows)
    return own if finite else torch.ones_like(own)


def of_frames(own: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the `own` frames of one sample, as `sample` does."""
    return sample(rows if bool(own.all()) else rows[own], dtype)


def vector(values: list[Tensor], like: Tensor) -> Tensor:
    """Return the 0-d values as one vector; an empty one is float64."""
    return torch.stack(values) if values else like.new_zeros(0, dtype=torch.float64)


def square_of(values: Tensor) -> Tensor:
    """Return Σ values² in float64, as a 0-d tensor."""
    wide = values.double().flatten()
    return torch.dot(wide, wide)


def upper_in_float64(values: list[Tensor], terms: list[Tensor], roundings: list[int], like: Tensor) -> Tensor:
    """‖values_i‖² rounded up, for float64 sums of `roundings` terms whose norms add up to at most `terms`.

    The bound is twice γ, for the rounding of the norm and of the weighted sum, both in float64; for float32 inputs it
    is about 10⁻¹³ of the terms.
    """
    bounds = [2.0 * gamma(n + 4, torch.float64) * SLACK * t for n, t in zip(roundings, terms, strict=True)]
    return upper_square(vector([square_of(v) for v in values], like), vector(bounds, like))


def upper_of_sums(samples: Iterable[Tensor], like: Tensor) -> Tensor:
    """‖Σ_t rows_t‖² rounded up, of every sample's float64 rows [L, p], which are looked at one sample at a time."""
    values, terms, roundings = [], [], []
    for rows in samples:
        values.append(rows.sum(0))
        terms.append(square_of(rows).sqrt() * math.sqrt(len(rows)))  # ≥ Σ_t ‖rows_t‖, by Cauchy and Schwarz
        roundings.append(len(rows))
    return upper_in_float64(values, terms, roundings, like)
