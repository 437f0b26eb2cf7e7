"""Definition of the embedding ops: row v of sample i's gradient is Σ_t g_it over ids_it = v."""

import torch
from torch import Tensor

from dpkernels.reference._definitions import definition
from dpkernels.reference._samples import live, round_up


def _kept(ids: Tensor, g: Tensor, padding_idx: int | None) -> tuple[Tensor, Tensor]:
    keep = (
        torch.ones_like(ids, dtype=torch.bool)
        if padding_idx is None or padding_idx < 0
        else ids != padding_idx
    )
    return ids[keep], g[keep].double()


def _norm_sq(ids: Tensor, g: Tensor) -> Tensor:
    rows = [g[ids == v].sum(0).square().sum() for v in ids.unique()]
    return torch.stack(rows).sum() if rows else g.new_zeros(())


@definition
def embedding_norm_sq(ids: Tensor, g: Tensor, *, padding_idx: int | None = None) -> Tensor:
    """Σ_v ‖Σ_{t: ids_it = v} g_it‖² in float64, rounded up to float32; v = padding_idx contributes 0."""
    return round_up([_norm_sq(*_kept(ids[i], g[i], padding_idx)) for i in range(len(ids))], g)


@definition
def embedding_weighted_sum(
    ids: Tensor, g: Tensor, factors: Tensor, out: Tensor, *, padding_idx: int | None = None
) -> None:
    """out[v] += Σ_i c_i Σ_{t: ids_it = v} g_it, summed in float64; row padding_idx is not changed."""
    total = torch.zeros_like(out, dtype=torch.float64)
    for i, c in live(factors):
        rows, values = _kept(ids[i], g[i], padding_idx)
        total.index_put_((rows,), c * values, accumulate=True)
    out += total
