"""LoRA by the native library, on CPU tensors."""

import torch
from torch import Tensor

from dpkernels.backends.native_ops import native
from dpkernels.backends.native_ops.calls import DenseSum, dense, function, norms, pointer, view


def lora_norm_sq(
    x: Tensor, h: Tensor, g: Tensor, dh: Tensor, *, scaling: float = 1.0, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(‖dh_iᵀx_i‖², s²‖g_iᵀh_i‖²), rounded up; see `dpkernels.ops.lora_norm_sq`."""
    out_a, out_b, lengths = norms(len(x)), norms(len(x)), dense(lengths)
    function("lora_norm_sq")(
        view(x),
        view(h),
        view(g),
        view(dh),
        scaling,
        pointer(lengths),
        native.threads(),
        out_a.data_ptr(),
        out_b.data_ptr(),
    )
    return out_a, out_b


def lora_weighted_sum(
    x: Tensor,
    h: Tensor,
    g: Tensor,
    dh: Tensor,
    factors: Tensor,
    out_a: Tensor,
    out_b: Tensor,
    *,
    scaling: float = 1.0,
    lengths: Tensor | None = None,
) -> None:
    """out_a += Σ_i c_i dh_iᵀx_i, out_b += s Σ_i c_i g_iᵀh_i; see `dpkernels.ops.lora_weighted_sum`."""
    sum_a, sum_b = DenseSum(out_a), DenseSum(out_b.to(out_a.dtype))
    weights, lengths = factors.double().contiguous(), dense(lengths)
    function("lora_weighted_sum")(
        view(x),
        view(h),
        view(g),
        view(dh),
        scaling,
        weights.data_ptr(),
        pointer(lengths),
        native.threads(),
        sum_a.pointer,
        sum_b.pointer,
        sum_a.dtype,
    )
    sum_a.finish()
    sum_b.finish()
    if sum_b.out is not out_b:
        out_b.copy_(sum_b.out)


def lora_gradients(
    x: Tensor, h: Tensor, g: Tensor, dh: Tensor, *, scaling: float = 1.0
) -> tuple[Tensor, Tensor]:
    """dh_iᵀx_i and s g_iᵀh_i; see `dpkernels.ops.lora_gradients`."""
    batch, rank, dtype = len(x), h.shape[2], torch.promote_types(x.dtype, torch.float32)
    out_a = torch.empty(batch, rank, x.shape[2], dtype=dtype)
    out_b = torch.empty(batch, g.shape[2], rank, dtype=dtype)
    function("lora_gradients")(
        view(x),
        view(h),
        view(g),
        view(dh),
        scaling,
        native.threads(),
        out_a.data_ptr(),
        out_b.data_ptr(),
    )
    return out_a, out_b
