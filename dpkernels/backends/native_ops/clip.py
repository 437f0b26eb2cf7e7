"""Clip factors by the native library, on CPU tensors."""

from torch import Tensor

from dpkernels.backends.native_ops import native
from dpkernels.backends.native_ops.calls import function, norms


def clip_factors(norm_sq: Tensor, max_grad_norm: float) -> Tensor:
    """min(1, C/√norm_sq) rounded down; see `dpkernels.ops.clip_factors`."""
    out, dense = norms(len(norm_sq)), norm_sq.contiguous()
    function("clip_factors")(
        dense.data_ptr(), native.element_type(dense.dtype), len(dense), max_grad_norm, out.data_ptr()
    )
    return out


def automatic_clip_factors(norm_sq: Tensor, max_grad_norm: float, stability: float) -> Tensor:
    """C/(√norm_sq + γ) rounded down; see `dpkernels.ops.automatic_clip_factors`."""
    out, dense = norms(len(norm_sq)), norm_sq.contiguous()
    function("automatic_clip_factors")(
        dense.data_ptr(),
        native.element_type(dense.dtype),
        len(dense),
        max_grad_norm,
        stability,
        out.data_ptr(),
    )
    return out
