"""Embeddings: norms and weighted sums of the per-sample gradients, whose row v is Σ_{t: ids_it = v} g_it."""

import torch
from torch import Tensor

from dpkernels.ops import _check, _library


def check_norm_values(ids: Tensor, *rest: Tensor, padding_idx: int | None = None) -> None:
    """Check that no id is negative, on the CPU only. A norm takes no table, so there is no upper limit."""
    if ids.device.type == "cpu" and ids.numel() and int(ids.min()) < 0:
        raise ValueError(f"ids: given values from {int(ids.min())}; pass 0 ≤ ids < rows of the table")


def check_sum_values(
    ids: Tensor, g: Tensor, factors: Tensor, out: Tensor, *, padding_idx: int | None = None
) -> None:
    """Check that all ids are rows of the table, on the CPU only."""
    if ids.device.type != "cpu" or ids.numel() == 0:
        return
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= out.shape[0]:
        raise ValueError(
            f"ids: given values from {least} to {most}, but out has {out.shape[0]} rows; pass 0 ≤ ids < rows"
        )


_norm_sq = _library.define(
    "embedding_norm_sq",
    "(Tensor ids, Tensor g, *, int? padding_idx=None) -> Tensor",
    fake=lambda ids, g, *, padding_idx=None: _library.norms(g),
    check=check_norm_values,
)
_weighted_sum = _library.define(
    "embedding_weighted_sum",
    "(Tensor ids, Tensor g, Tensor factors, Tensor(a!) out, *, int? padding_idx=None) -> ()",
    fake=lambda ids, g, factors, out, *, padding_idx=None: None,
    check=check_sum_values,
)


def check_norm(ids: Tensor, g: Tensor, *, padding_idx: int | None = None, rows: int | None = None) -> None:
    """Check shapes, dtypes, devices, and that padding_idx is None, -1 or a row; rows: the table's, if known."""
    _check.floats(g=g)
    _check.shape("g", g, (None, None, None), "[B, T, d]")
    if ids.dtype != torch.int64:
        raise TypeError(f"ids: expected int64; given {ids.dtype}; convert it: ids.long()")
    _check.shape("ids", ids, (g.shape[0], g.shape[1]), "[B, T]")
    _check.same_device(g=g, ids=ids)
    if padding_idx is not None and (padding_idx < -1 or (rows is not None and padding_idx >= rows)):
        table = "" if rows is None else f" of {rows} rows"
        raise ValueError(f"padding_idx: given {padding_idx}; pass a row{table}, counted from 0, or None")


def check_sum(
    ids: Tensor, g: Tensor, factors: Tensor, out: Tensor, *, padding_idx: int | None = None
) -> None:
    """Check the norm's arguments, factors float32 [B], and out [V, d], from which V is taken."""
    _check.shape("out", out, (None, None), "[V, d]")
    check_norm(ids, g, padding_idx=padding_idx, rows=out.shape[0])
    _check.weighted_sum(factors, g, out=(out, (out.shape[0], g.shape[2]), "[V, d]"))


def embedding_norm_sq(ids: Tensor, g: Tensor, *, padding_idx: int | None = None) -> Tensor:
    """Squared norm of each sample's gradient of the table, rounded up: Σ_v ‖Σ_{t: ids_it = v} g_it‖².

    Args:
        ids: [B, T] int64, 0 ≤ ids. B, T may be 0.
        g: [B, T, d] gradients of the looked-up rows; bfloat16, float16 or float32 (float64 in tests).
        padding_idx: the id that contributes 0, and whose g is not read; None or -1: no such id.

    Returns:
        [B] float32, in squared units of g; not below the exact square, nor below the square of the gradient
        that `embedding_weighted_sum` adds for the sample, divided by its factor.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes or devices do not fit, or padding_idx is not a row; on the CPU, an id is negative.

    Source: the gradient of y_t = W[ids_t]; Bu et al. 2022, arXiv:2210.00038.
    """
    check_norm(ids, g, padding_idx=padding_idx)
    result: Tensor = _norm_sq(ids, g, padding_idx=padding_idx)
    return result


def embedding_weighted_sum(
    ids: Tensor, g: Tensor, factors: Tensor, out: Tensor, *, padding_idx: int | None = None
) -> None:
    """Add the clipped gradients to a sum, in place: out[v] += Σ_i c_i Σ_{t: ids_it = v} g_it.

    Args:
        ids: [B, T] int64, 0 ≤ ids < V.
        g: [B, T, d] gradients of the looked-up rows; bfloat16, float16 or float32 (float64 in tests).
        factors: [B] float32, c_i from `clip_factors`; the g of a sample with factor 0 is not read.
        out: [V, d] float32 or float64, added to; row padding_idx is left alone.
        padding_idx: the id that contributes 0, and whose g is not read; None or -1: no such id.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes or devices do not fit, or padding_idx is outside the table; on the CPU, an id is outside the
            table. On a GPU, where the check would wait for the device, such an id is not added to any row.

    Source: Bu et al. 2022, arXiv:2210.00038 (book-keeping).
    """
    check_sum(ids, g, factors, out, padding_idx=padding_idx)
    _weighted_sum(ids, g, factors, out, padding_idx=padding_idx)
