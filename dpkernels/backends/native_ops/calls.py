"""Conversion of CPU tensors to the native library's arguments.

`dpkernels.ops` checks the arguments; this module converts tensors to pointers, sizes and strides. Any strides work:
only `lengths`, `ids` and a non-contiguous `out` are copied. csrc/cpu_kernels.h defines each function, and
csrc/cpu/bounds.h proves that no norm is below the exact one.
"""

import ctypes
import functools
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpkernels.backends.native_ops import native


class CTensor(ctypes.Structure):
    """dpk_tensor of csrc/cpu_kernels.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_int64 * 3),
        ("stride", ctypes.c_int64 * 3),
        ("dtype", ctypes.c_int32),
    )


TENSOR_FORMAT = "Pqqqqqqi4x"
"""A CTensor, for `struct`, which packs its fields in a fraction of the time of assigning them."""
_TENSOR = struct.Struct(f"@{TENSOR_FORMAT}")
assert _TENSOR.size == ctypes.sizeof(CTensor)

_T = ctypes.POINTER(CTensor)
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
    "automatic_clip_factors": (_P, _I32, _I64, _F64, _F64, _P),
    "linear_weighted_sum": (_T, _T, _P, _P, _I32, _P, _I32),
    "bias_weighted_sum": (_T, _P, _P, _I32, _P, _I32),
    "lora_weighted_sum": (_T, _T, _T, _T, _F64, _P, _P, _I32, _P, _P, _I32),
    "lora_gradients": (_T, _T, _T, _T, _F64, _I32, _P, _P),
    "embedding_weighted_sum": (_P, _T, _I64, _P, _I32, _P, _I32, _I64),
    "layer_norm_weighted_sum": (_T, _T, _P, _P, _I32, _P, _I32),
    "depthwise_conv1d_weighted_sum": (_T, _T, _P, *_CONV, _I32, _P, _I32),
}


@functools.cache
def function(op: str) -> Callable[..., None]:
    """Return dpk_cpu_<op>."""
    return native.library("cpu").function(f"dpk_cpu_{op}", _ARGUMENTS[op])


def tensor_fields(tensor: Tensor) -> tuple[int, ...]:
    """Return the fields of a 3-d tensor's dpk_tensor, for TENSOR_FORMAT; the tensor must outlive the call."""
    return (tensor.data_ptr(), *tensor.shape, *tensor.stride(), native.element_type(tensor.dtype))


def view(tensor: Tensor) -> CTensor:
    """Return a 3-d tensor as dpk_tensor; the tensor must outlive the call."""
    return CTensor.from_buffer_copy(_TENSOR.pack(*tensor_fields(tensor)))


def pointer(tensor: Tensor | None) -> int | None:
    """Return the tensor's address, or None (NULL) for None."""
    return None if tensor is None else tensor.data_ptr()


def dense(lengths: Tensor | None) -> Tensor | None:
    """Return the lengths contiguous; the copy must outlive the call."""
    return None if lengths is None else lengths.contiguous()


def norms(batch: int) -> Tensor:
    """Return uninitialised memory for the norm of each sample."""
    return torch.empty(batch, dtype=torch.float32)


class DenseSum:
    """A dense copy of a non-contiguous `out`, copied back at the end; a contiguous `out` itself."""

    def __init__(self, out: Tensor) -> None:
        self.out = out
        self.dense = out.contiguous()
        self.pointer = self.dense.data_ptr()
        self.dtype = native.element_type(out.dtype)

    def finish(self) -> None:
        """Copy the sum back if it is a copy."""
        if self.dense is not self.out:
            self.out.copy_(self.dense)
