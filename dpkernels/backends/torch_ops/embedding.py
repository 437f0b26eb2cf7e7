"""Embeddings composed from PyTorch."""

import math

import torch
from torch import Tensor

from dpkernels.backends.torch_ops.samples import live, of_frames, own_frames, square_of, upper_in_float64


def _kept(ids: Tensor, g: Tensor, padding_idx: int | None) -> tuple[Tensor, Tensor]:
    """Return the ids that are not padding, and their rows of g."""
    if padding_idx is None or padding_idx < 0:
        return ids, g
    keep = ids != padding_idx
    return ids[keep], g[keep]


def _rows_by_id(ids: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return (distinct ids, g summed over equal ids [distinct, d])."""
    distinct, place = ids.unique(return_inverse=True)
    return distinct, g.new_zeros(len(distinct), g.shape[1]).index_add_(0, place, g)


def embedding_norm_sq(ids: Tensor, g: Tensor, *, padding_idx: int | None = None) -> Tensor:
    """Σ_v ‖Σ_{t: ids_it = v} g_it‖², in float64; see `dpkernels.ops.embedding_norm_sq`."""
    values, terms, roundings = [], [], []
    for i in range(len(ids)):
        rows, kept = _kept(ids[i], g[i], padding_idx)
        own = own_frames(kept)
        wide = of_frames(own, kept, torch.float64)
        values.append(_rows_by_id(rows[own], wide)[1])
        terms.append(square_of(wide).sqrt() * math.sqrt(len(wide)))
        roundings.append(len(wide))
    return upper_in_float64(values, terms, roundings, g)


def embedding_weighted_sum(
    ids: Tensor, g: Tensor, factors: Tensor, out: Tensor, *, padding_idx: int | None = None
) -> None:
    """out[v] += Σ_i c_i Σ_{t: ids_it = v} g_it; see `dpkernels.ops.embedding_weighted_sum`."""
    kept = [(c, *_kept(ids[i], g[i], padding_idx)) for i, c in live(factors)]
    if not kept:
        return
    # only the rows that occur, because a float64 copy of the table would exceed the memory of the step
    distinct = torch.cat([rows for _, rows, _ in kept]).unique()
    total = out.new_zeros(len(distinct), out.shape[1], dtype=torch.float64)
    for c, rows, values in kept:
        # each sample is summed first, so that terms that cancel within it do not round another sample's gradient
        sample_ids, sums = _rows_by_id(rows, values.double())
        total.index_add_(0, torch.searchsorted(distinct, sample_ids), sums, alpha=c)
    out.index_add_(0, distinct, total.to(out.dtype))
