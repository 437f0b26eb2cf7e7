"""Depthwise conv1d by the native library, on CPU tensors."""

from torch import Tensor

from dpkernels.backends.native_ops import native
from dpkernels.backends.native_ops.calls import DenseSum, function, norms, view


def depthwise_conv1d_norm_sq(
    x: Tensor, g: Tensor, *, kernel_size: int, stride: int = 1, padding: int = 0, dilation: int = 1
) -> Tensor:
    """‖Σ_t g_ct x_ct'‖² over c and j, rounded up; see `dpkernels.ops.depthwise_conv1d_norm_sq`."""
    out = norms(len(x))
    function("depthwise_conv1d_norm_sq")(
        view(x), view(g), kernel_size, stride, padding, dilation, native.threads(), out.data_ptr()
    )
    return out


def depthwise_conv1d_weighted_sum(
    x: Tensor,
    g: Tensor,
    factors: Tensor,
    out: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> None:
    """out[c, 0, j] += Σ_i c_i Σ_t g_ict x_ict'; see `dpkernels.ops.depthwise_conv1d_weighted_sum`."""
    total, weights = DenseSum(out), factors.double().contiguous()
    function("depthwise_conv1d_weighted_sum")(
        view(x),
        view(g),
        weights.data_ptr(),
        out.shape[-1],
        stride,
        padding,
        dilation,
        native.threads(),
        total.pointer,
        total.dtype,
    )
    total.finish()
