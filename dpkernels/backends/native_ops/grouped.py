"""Norms, and weighted sums, of many layers by one call of the native library each. csrc/grouped_kernels.h defines the
computation. Layers of a family that another backend serves are left to it.
"""

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dpkernels.backends import registry
from dpkernels.backends.layer import GroupedLayer
from dpkernels.backends.native_ops import native
from dpkernels.backends.native_ops.calls import TENSOR_FORMAT, CTensor, norms, tensor_fields
from dpkernels.backends.torch_ops import grouped as composition

KINDS: dict[str, tuple[int, tuple[str, ...], dict[str, int]]] = {
    "linear": (0, ("x", "g"), {}),
    "bias": (1, ("g",), {}),
    "lora": (2, ("x", "h", "g", "dh"), {}),
    "embedding": (3, ("ids", "g"), {"vocabulary": 0}),
    "layer_norm": (4, ("x", "g"), {}),
    "depthwise_conv1d": (5, ("x", "g"), {"kernel_size": 2}),
}
"""The kinds of csrc/grouped_kernels.h: the number DPK_LAYER_*, the fields of dpk_layer that hold the tensors, and those
that hold a size of the out, with the dimension. Options go to the fields of the same names."""


class _Layer(ctypes.Structure):
    """dpk_layer."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("out_dtype", ctypes.c_int32),
        *((name, CTensor) for name in ("x", "h", "g", "dh")),
        ("ids", ctypes.c_void_p),
        ("padding_idx", ctypes.c_int64),
        ("vocabulary", ctypes.c_int64),
        ("scaling", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("kernel_size", "stride", "padding", "dilation")),
        ("out", ctypes.c_void_p),
        ("out_b", ctypes.c_void_p),
    )


_SLOTS = {"x": 0, "h": 1, "g": 2, "dh": 3}
_NUMBERS = ("ids", "padding_idx", "vocabulary", "scaling", "kernel_size", "stride", "padding", "dilation")
_OUTS = ("out", "out_b")
_ROW = struct.Struct(f"@ii{TENSOR_FORMAT * len(_SLOTS)}PqqdqqqqPP")
"""One _Layer, packed at once: assigning its fields one at a time takes several times as long."""
assert _ROW.size == ctypes.sizeof(_Layer)

_NO_TENSOR = (0,) * 8


@functools.cache
def function(op: str) -> Callable[..., None]:
    """Return dpk_cpu_total_norm_sq (which takes layers, batch, threads, out) or dpk_cpu_weighted_sums (factors)."""
    table = [ctypes.POINTER(_Layer), ctypes.c_int64]
    rest = {
        "total_norm_sq": [ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p],
        "weighted_sums": [ctypes.c_void_p, ctypes.c_int32],
    }
    return native.library("cpu").function(f"dpk_cpu_{op}", table + rest[op])


def _row(layer: GroupedLayer, kept: list[Tensor]) -> tuple[Any, ...]:
    """Return the fields of one layer's entry in order; `kept` receives the copies that it points to."""
    number, names, sizes = KINDS[layer.kind]
    tensors: list[tuple[int, ...]] = [_NO_TENSOR] * len(_SLOTS)
    numbers: dict[str, Any] = dict(layer.options)
    for name, tensor in zip(names, layer.tensors, strict=True):
        if name == "ids":
            kept.append(tensor.contiguous())
            numbers["ids"] = kept[-1].data_ptr()
        else:
            tensors[_SLOTS[name]] = tensor_fields(tensor)
    out_dtype = 0
    if layer.outs:
        out_dtype = native.element_type(layer.outs[0].dtype)
        for name, dimension in sizes.items():
            numbers[name] = layer.outs[0].shape[dimension]
    for name, out in zip(_OUTS, layer.outs, strict=False):
        numbers[name] = out.data_ptr()
    x, h, g, dh = tensors
    rest = [numbers.get(name, 0) for name in (*_NUMBERS, *_OUTS)]
    return (number, out_dtype, *x, *h, *g, *dh, *rest)


def _table(layers: Sequence[GroupedLayer], kept: list[Tensor]) -> ctypes.Array[_Layer]:
    rows = bytearray(_ROW.size * len(layers))
    for place, layer in enumerate(layers):
        _ROW.pack_into(rows, _ROW.size * place, *_row(layer, kept))
    return (_Layer * len(layers)).from_buffer(rows)


def _native_kinds(layers: Sequence[GroupedLayer]) -> set[str]:
    """The kinds of these layers that native code serves: a norm bounds the sum of its own backend."""
    return {
        layer.kind
        for layer in {layer.kind: layer for layer in layers}.values()
        if layer.kind in KINDS
        and registry.implementation(layer.sum_op, "cpu") is registry.function("native", layer.sum_op)
    }


def total_norm_sq(layers: Sequence[GroupedLayer]) -> Tensor:
    """Σ over layers of ‖g_iᵀx_i‖² and its like, rounded up; see `dpkernels.ops.total_norm_sq`."""
    served = _native_kinds(layers)
    if any(layer.kind not in served for layer in layers):
        return composition.total_norm_sq(layers)
    kept: list[Tensor] = []
    out, table = norms(len(layers[0].tensors[0])), _table(layers, kept)
    function("total_norm_sq")(table, len(table), len(out), native.threads(), out.data_ptr())
    return out


def weighted_sums(layers: Sequence[GroupedLayer], factors: Tensor) -> None:
    """out += Σ_i c_i g_iᵀx_i for every layer; see `dpkernels.ops.weighted_sums`."""
    kept: list[Tensor] = []
    served = _native_kinds(layers)
    for layer in layers:
        if layer.kind not in served:
            composition.add_layer(layer, factors)
    table = _table([layer for layer in layers if layer.kind in served], kept)
    if len(table):
        weights = factors.to(torch.float64).contiguous()
        function("weighted_sums")(table, len(table), weights.data_ptr(), native.threads())
