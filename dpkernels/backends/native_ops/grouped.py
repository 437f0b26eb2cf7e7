"""Weighted sums of many layers by one call of the native library. csrc/grouped_kernels.h defines the computation.

There is no native call for the norms of many layers: `torch_ops.grouped` adds the results of each family's op.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dpkernels.backends import registry
from dpkernels.backends.layer import GroupedLayer
from dpkernels.backends.native_ops import native
from dpkernels.backends.native_ops.calls import CTensor, view
from dpkernels.backends.torch_ops.grouped import add_layer

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

_OUTS = ("out", "out_b")


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


@functools.cache
def _function() -> Callable[..., None]:
    arguments = [ctypes.POINTER(_Layer), ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32]
    return native.library("cpu").function("dpk_cpu_weighted_sums", arguments)


def _row(layer: GroupedLayer, kept: list[Tensor]) -> _Layer:
    """Return one layer's entry; `kept` receives the copies that it points to."""
    number, names, sizes = KINDS[layer.kind]
    first = layer.outs[0]
    row = _Layer(number, native.element_type(first.dtype))
    for name, tensor in zip(names, layer.tensors, strict=True):
        if name == "ids":
            kept.append(tensor.contiguous())
            row.ids = kept[-1].data_ptr()
        else:
            setattr(row, name, view(tensor))
    for name, value in layer.options.items():
        setattr(row, name, value)
    for name, dimension in sizes.items():
        setattr(row, name, first.shape[dimension])
    for name, out in zip(_OUTS, layer.outs, strict=False):
        setattr(row, name, out.data_ptr())
    return row


def weighted_sums(layers: Sequence[GroupedLayer], factors: Tensor) -> None:
    """out += Σ_i c_i g_iᵀx_i for every layer; see `dpkernels.ops.weighted_sums`."""
    kept: list[Tensor] = []
    rows = []
    native_kinds: dict[str, bool] = {}
    for layer in layers:
        if layer.kind not in native_kinds:
            # Another backend adds the families that it serves, because a norm bounds the sum of its own backend.
            chosen = registry.implementation(layer.sum_op, "cpu")
            native_kinds[layer.kind] = layer.kind in KINDS and (
                chosen is registry.function("native", layer.sum_op)
            )
        if native_kinds[layer.kind]:
            rows.append(_row(layer, kept))
        else:
            add_layer(layer, factors)
    if rows:
        weights, table = factors.to(torch.float64).contiguous(), (_Layer * len(rows))(*rows)
        _function()(table, len(rows), weights.data_ptr(), native.threads())
