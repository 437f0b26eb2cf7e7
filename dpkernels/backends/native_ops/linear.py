"""Linear layers by the native library, on CPU tensors."""

from torch import Tensor

from dpkernels.backends.native_ops import native
from dpkernels.backends.native_ops.calls import DenseSum, dense, function, norms, pointer, view

_METHODS = {"auto": 0, "gram": 1, "direct": 2}


def linear_norm_sq(x: Tensor, g: Tensor, *, lengths: Tensor | None = None, method: str = "auto") -> Tensor:
    """‖g_iᵀx_i‖², rounded up; see `dpkernels.ops.linear_norm_sq`."""
    out, lengths = norms(len(x)), dense(lengths)
    function("linear_norm_sq")(
        view(x), view(g), pointer(lengths), _METHODS[method], native.threads(), out.data_ptr()
    )
    return out


def linear_weighted_sum(
    x: Tensor, g: Tensor, factors: Tensor, out: Tensor, *, lengths: Tensor | None = None
) -> None:
    """out += Σ_i c_i g_iᵀx_i; see `dpkernels.ops.linear_weighted_sum`."""
    total, weights, lengths = DenseSum(out), factors.double().contiguous(), dense(lengths)
    function("linear_weighted_sum")(
        view(x),
        view(g),
        weights.data_ptr(),
        pointer(lengths),
        native.threads(),
        total.pointer,
        total.dtype,
    )
    total.finish()
