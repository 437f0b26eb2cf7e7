"""LayerNorm and RMSNorm weights by the native library, on CPU tensors."""

from torch import Tensor

from dpkernels.backends.native_ops import native
from dpkernels.backends.native_ops.calls import DenseSum, dense, function, norms, pointer, view


def layer_norm_norm_sq(x_hat: Tensor, g: Tensor, *, lengths: Tensor | None = None) -> Tensor:
    """‖Σ_t x̂_it ⊙ g_it‖², rounded up; see `dpkernels.ops.layer_norm_norm_sq`."""
    out, lengths = norms(len(g)), dense(lengths)
    function("layer_norm_norm_sq")(view(x_hat), view(g), pointer(lengths), native.threads(), out.data_ptr())
    return out


def layer_norm_weighted_sum(
    x_hat: Tensor, g: Tensor, factors: Tensor, out: Tensor, *, lengths: Tensor | None = None
) -> None:
    """out += Σ_i c_i Σ_t x̂_it ⊙ g_it; see `dpkernels.ops.layer_norm_weighted_sum`."""
    total, weights, lengths = DenseSum(out), factors.double().contiguous(), dense(lengths)
    function("layer_norm_weighted_sum")(
        view(x_hat),
        view(g),
        weights.data_ptr(),
        pointer(lengths),
        native.threads(),
        total.pointer,
        total.dtype,
    )
    total.finish()
