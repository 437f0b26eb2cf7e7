"""The ops on CPU tensors by the native library: one function an op, with the public op's signature.

Arguments are checked by `dpkernels.ops`; here tensors become pointers, sizes and strides. Any strides are
fine: nothing is copied but `lengths`, `ids` and a non-contiguous `out`. csrc/cpu_kernels.h states what each
function computes, csrc/cpu/bounds.h why a norm is never below the truth.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpkernels.backends import native

_METHODS = {"auto": 0, "gram": 1, "direct": 2}


class _Tensor(ctypes.Structure):
    """dpk_tensor of csrc/cpu_kernels.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_int64 * 3),
        ("stride", ctypes.c_int64 * 3),
        ("dtype", ctypes.c_int32),
    )


_T = ctypes.POINTER(_Tensor)
_P, _I64, _I32, _F64 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_double
_CONV = (_I64, _I64, _I64, _I64)  # kernel_size, stride, padding, dilation
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "linear_norm_sq": (_T, _T, _P, _I32, _I32, _P),
    "bias_norm_sq": (_T, _P, _I32, _P),
    "lora_norm_sq": (_T, _T, _T, _T, _F64, _P, _I32, _P, _P),
    "embedding_norm_sq": (_P, _T, _I64, _I32, _P),
    "layer_norm_norm_sq": (_T, _T, _P, _I32, _P),
    "depthwise_conv1d_norm_sq": (_T, _T, *_CONV, _I32, _P),
    "clip_factors": (_P, _I32, _I64, _F64, _P),
    "linear_weighted_sum": (_T, _T, _P, _P, _I32, _P, _I32),
    "bias_weighted_sum": (_T, _P, _P, _I32, _P, _I32),
    "lora_weighted_sum": (_T, _T, _T, _T, _F64, _P, _P, _I32, _P, _P, _I32),
    "lora_gradients": (_T, _T, _T, _T, _F64, _I32, _P, _P),
    "embedding_weighted_sum": (_P, _T, _I64, _P, _I32, _P, _I32, _I64),
    "layer_norm_weighted_sum": (_T, _T, _P, _P, _I32, _P, _I32),
    "depthwise_conv1d_weighted_sum": (_T, _T, _P, *_CONV, _I32, _P, _I32),
}


@functools.cache
def _function(op: str) -> Callable[..., None]:
    return native.library("cpu").function(f"dpk_cpu_{op}", _ARGUMENTS[op])


def _view(tensor: Tensor) -> _Tensor:
    """A 3-d tensor as dpk_tensor; the tensor must outlive the call."""
    size, stride = (ctypes.c_int64 * 3)(*tensor.shape), (ctypes.c_int64 * 3)(*tensor.stride())
    return _Tensor(tensor.data_ptr(), size, stride, native.element_type(tensor.dtype))


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _dense(lengths: Tensor | None) -> Tensor | None:
    return None if lengths is None else lengths.contiguous()


def _norms(batch: int) -> Tensor:
    return torch.empty(batch, dtype=torch.float32)


class _Sum:
    """A dense stand-in for a non-contiguous `out`, copied back at the end."""

    def __init__(self, out: Tensor) -> None:
        self.out = out
        self.dense = out.contiguous()
        self.pointer = self.dense.data_ptr()
        self.dtype = native.element_type(out.dtype)

    def finish(self) -> None:
        if self.dense is not self.out:
            self.out.copy_(self.dense)


def linear_norm_sq(x: Tensor, g: Tensor, *, lengths: Tensor | None = None, method: str = "auto") -> Tensor:
    """‖g_iᵀx_i‖², rounded up; see `dpkernels.ops.linear_norm_sq`."""
    out, lengths = _norms(len(x)), _dense(lengths)
    _function("linear_norm_sq")(
        _view(x), _view(g), _pointer(lengths), _METHODS[method], native.threads(), out.data_ptr()
    )
    return out


def linear_weighted_sum(
    x: Tensor, g: Tensor, factors: Tensor, out: Tensor, *, lengths: Tensor | None = None
) -> None:
    """out += Σ_i c_i g_iᵀx_i; see `dpkernels.ops.linear_weighted_sum`."""
    total, weights, lengths = _Sum(out), factors.double().contiguous(), _dense(lengths)
    _function("linear_weighted_sum")(
        _view(x),
        _view(g),
        weights.data_ptr(),
        _pointer(lengths),
        native.threads(),
        total.pointer,
        total.dtype,
    )
    total.finish()


def bias_norm_sq(g: Tensor, *, lengths: Tensor | None = None) -> Tensor:
    """‖Σ_t g_it‖², rounded up; see `dpkernels.ops.bias_norm_sq`."""
    out, lengths = _norms(len(g)), _dense(lengths)
    _function("bias_norm_sq")(_view(g), _pointer(lengths), native.threads(), out.data_ptr())
    return out


def bias_weighted_sum(g: Tensor, factors: Tensor, out: Tensor, *, lengths: Tensor | None = None) -> None:
    """out += Σ_i c_i Σ_t g_it; see `dpkernels.ops.bias_weighted_sum`."""
    total, weights, lengths = _Sum(out), factors.double().contiguous(), _dense(lengths)
    _function("bias_weighted_sum")(
        _view(g), weights.data_ptr(), _pointer(lengths), native.threads(), total.pointer, total.dtype
    )
    total.finish()


def lora_norm_sq(
    x: Tensor, h: Tensor, g: Tensor, dh: Tensor, *, scaling: float = 1.0, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(‖dh_iᵀx_i‖², s²‖g_iᵀh_i‖²), rounded up; see `dpkernels.ops.lora_norm_sq`."""
    out_a, out_b, lengths = _norms(len(x)), _norms(len(x)), _dense(lengths)
    _function("lora_norm_sq")(
        _view(x),
        _view(h),
        _view(g),
        _view(dh),
        scaling,
        _pointer(lengths),
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
    sum_a, sum_b = _Sum(out_a), _Sum(out_b.to(out_a.dtype))
    weights, lengths = factors.double().contiguous(), _dense(lengths)
    _function("lora_weighted_sum")(
        _view(x),
        _view(h),
        _view(g),
        _view(dh),
        scaling,
        weights.data_ptr(),
        _pointer(lengths),
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
    _function("lora_gradients")(
        _view(x),
        _view(h),
        _view(g),
        _view(dh),
        scaling,
        native.threads(),
        out_a.data_ptr(),
        out_b.data_ptr(),
    )
    return out_a, out_b


def embedding_norm_sq(ids: Tensor, g: Tensor, *, padding_idx: int | None = None) -> Tensor:
    """Σ_v ‖Σ_{t: ids_it = v} g_it‖², rounded up; see `dpkernels.ops.embedding_norm_sq`."""
    out, dense = _norms(len(g)), ids.contiguous()
    padding = -1 if padding_idx is None else padding_idx
    _function("embedding_norm_sq")(dense.data_ptr(), _view(g), padding, native.threads(), out.data_ptr())
    return out


def embedding_weighted_sum(
    ids: Tensor, g: Tensor, factors: Tensor, out: Tensor, *, padding_idx: int | None = None
) -> None:
    """out[v] += Σ_i c_i Σ_{t: ids_it = v} g_it; see `dpkernels.ops.embedding_weighted_sum`."""
    total, weights, dense = _Sum(out), factors.double().contiguous(), ids.contiguous()
    padding = -1 if padding_idx is None else padding_idx
    _function("embedding_weighted_sum")(
        dense.data_ptr(),
        _view(g),
        padding,
        weights.data_ptr(),
        native.threads(),
        total.pointer,
        total.dtype,
        len(out),
    )
    total.finish()


def layer_norm_norm_sq(x_hat: Tensor, g: Tensor, *, lengths: Tensor | None = None) -> Tensor:
    """‖Σ_t x̂_it ⊙ g_it‖², rounded up; see `dpkernels.ops.layer_norm_norm_sq`."""
    out, lengths = _norms(len(g)), _dense(lengths)
    _function("layer_norm_norm_sq")(
        _view(x_hat), _view(g), _pointer(lengths), native.threads(), out.data_ptr()
    )
    return out


def layer_norm_weighted_sum(
    x_hat: Tensor, g: Tensor, factors: Tensor, out: Tensor, *, lengths: Tensor | None = None
) -> None:
    """out += Σ_i c_i Σ_t x̂_it ⊙ g_it; see `dpkernels.ops.layer_norm_weighted_sum`."""
    total, weights, lengths = _Sum(out), factors.double().contiguous(), _dense(lengths)
    _function("layer_norm_weighted_sum")(
        _view(x_hat),
        _view(g),
        weights.data_ptr(),
        _pointer(lengths),
        native.threads(),
        total.pointer,
        total.dtype,
    )
    total.finish()


def depthwise_conv1d_norm_sq(
    x: Tensor, g: Tensor, *, kernel_size: int, stride: int = 1, padding: int = 0, dilation: int = 1
) -> Tensor:
    """‖Σ_t g_ct x_ct'‖² over c and j, rounded up; see `dpkernels.ops.depthwise_conv1d_norm_sq`."""
    out = _norms(len(x))
    _function("depthwise_conv1d_norm_sq")(
        _view(x), _view(g), kernel_size, stride, padding, dilation, native.threads(), out.data_ptr()
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
    total, weights = _Sum(out), factors.double().contiguous()
    _function("depthwise_conv1d_weighted_sum")(
        _view(x),
        _view(g),
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


def clip_factors(norm_sq: Tensor, max_grad_norm: float) -> Tensor:
    """min(1, C/√norm_sq) rounded down; see `dpkernels.ops.clip_factors`."""
    out, dense = _norms(len(norm_sq)), norm_sq.contiguous()
    _function("clip_factors")(
        dense.data_ptr(), native.element_type(dense.dtype), len(dense), max_grad_norm, out.data_ptr()
    )
    return out
