"""Biases by the native library, on CPU tensors."""

from torch import Tensor

from dpkernels.backends.native_ops import native
from dpkernels.backends.native_ops.calls import DenseSum, dense, function, norms, pointer, view


def bias_norm_sq(g: Tensor, *, lengths: Tensor | None = None) -> Tensor:
    """‖Σ_t g_it‖², rounded up; see `dpkernels.ops.bias_norm_sq`."""
    out, lengths = norms(len(g)), dense(lengths)
    function("bias_norm_sq")(view(g), pointer(lengths), native.threads(), out.data_ptr())
    return out


def bias_weighted_sum(g: Tensor, factors: Tensor, out: Tensor, *, lengths: Tensor | None = None) -> None:
    """out += Σ_i c_i Σ_t g_it; see `dpkernels.ops.bias_weighted_sum`."""
    total, weights, lengths = DenseSum(out), factors.double().contiguous(), dense(lengths)
    function("bias_weighted_sum")(
        view(g), weights.data_ptr(), pointer(lengths), native.threads(), total.pointer, total.dtype
    )
    total.finish()
