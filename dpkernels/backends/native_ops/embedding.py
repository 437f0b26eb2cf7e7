"""Embeddings by the native library, on CPU tensors."""

from torch import Tensor

from dpkernels.backends.native_ops import native
from dpkernels.backends.native_ops.calls import DenseSum, function, norms, view


def embedding_norm_sq(ids: Tensor, g: Tensor, *, padding_idx: int | None = None) -> Tensor:
    """Σ_v ‖Σ_{t: ids_it = v} g_it‖², rounded up; see `dpkernels.ops.embedding_norm_sq`."""
    out, dense = norms(len(g)), ids.contiguous()
    padding = -1 if padding_idx is None else padding_idx
    function("embedding_norm_sq")(dense.data_ptr(), view(g), padding, native.threads(), out.data_ptr())
    return out


def embedding_weighted_sum(
    ids: Tensor, g: Tensor, factors: Tensor, out: Tensor, *, padding_idx: int | None = None
) -> None:
    """out[v] += Σ_i c_i Σ_{t: ids_it = v} g_it; see `dpkernels.ops.embedding_weighted_sum`."""
    total, weights, dense = DenseSum(out), factors.double().contiguous(), ids.contiguous()
    padding = -1 if padding_idx is None else padding_idx
    function("embedding_weighted_sum")(
        dense.data_ptr(),
        view(g),
        padding,
        weights.data_ptr(),
        native.threads(),
        total.pointer,
        total.dtype,
        len(out),
    )
    total.finish()
