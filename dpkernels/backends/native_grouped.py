"""Weighted sums of many layers by one call of the native library. csrc/grouped_kernels.h states what it computes."""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpkernels.backends import native, native_ops, registry
from dpkernels.backends.native_sweep import _Bytes12, _Noise
from dpkernels.backends.torch_grouped import Layer, add_layer, layers, total_norm_sq

__all__ = ["clip_and_noise", "total_norm_sq"]

_KINDS = ("linear", "bias", "lora", "embedding", "layer_norm", "depthwise_conv1d")


class _Layer(ctypes.Structure):
    """dpk_layer."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("out_dtype", ctypes.c_int32),
        *((name, native_ops._Tensor) for name in ("x", "h", "g", "dh")),
        ("ids", ctypes.c_void_p),
        ("padding_idx", ctypes.c_int64),
        ("vocabulary", ctypes.c_int64),
        ("scaling", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("kernel_size", "stride", "padding", "dilation")),
        ("out", ctypes.c_void_p),
        ("out_b", ctypes.c_void_p),
    )


class _Sum(ctypes.Structure):
    """dpk_noised_sum."""

    _fields_ = (("sum", ctypes.c_void_p), ("count", ctypes.c_int64), ("nonce", _Bytes12))


@functools.cache
def _function(name: str, row: type[ctypes.Structure], common: Any) -> Callable[..., None]:
    """dpk_cpu_<name>(rows, their number, what is common to them, threads)."""
    arguments = [ctypes.POINTER(row), ctypes.c_int64, common, ctypes.c_int32]
    return native.library("cpu").function(f"dpk_cpu_{name}", arguments)


def _row(layer: Layer, kept: list[Tensor]) -> _Layer:
    """One layer's entry; what it points to besides the layer's own tensors is put into `kept`."""
    kind = layer.family
    row = _Layer(_KINDS.index(kind), native.element_type(layer.outs[0].dtype))
    row.out = layer.outs[0].data_ptr()
    names = {"bias": ("g",), "lora": ("x", "h", "g", "dh"), "embedding": ("", "g")}.get(kind, ("x", "g"))
    for name, tensor in zip(names, layer.tensors, strict=True):
        if name:
            setattr(row, name, native_ops._view(tensor))
    if kind == "embedding":
        kept.append(layer.tensors[0].contiguous())
        row.ids, row.vocabulary = kept[-1].data_ptr(), len(layer.outs[0])
        row.padding_idx = layer.options["padding_idx"]
    elif kind == "lora":
        row.scaling, row.out_b = layer.options["scaling"], layer.outs[1].data_ptr()
    elif kind == "depthwise_conv1d":
        row.kernel_size = layer.outs[0].shape[-1]
        row.stride, row.padding, row.dilation = layer.options.values()
    return row


def clip_and_noise(
    xs: list[Tensor],
    gs: list[Tensor],
    kinds: list[str],
    factors: Tensor,
    outs: list[Tensor],
    hs: list[Tensor],
    dhs: list[Tensor],
    scalings: list[float],
    padding_idxs: list[int],
    strides: list[int],
    paddings: list[int],
    dilations: list[int],
    key: Tensor,
    nonces: Tensor,
    noise_scale: float,
    grid: float,
    divisor: float,
) -> None:
    """out += Σ_i c_i g_iᵀx_i for every layer, then noise; see `dpkernels.ops.clip_and_noise`."""
    kept: list[Tensor] = []
    rows = []
    for layer in layers(xs, gs, kinds, outs, hs, dhs, scalings, padding_idxs, strides, paddings, dilations):
        # A family that another backend serves is summed by that one: the norm's bound is on what it adds.
        if registry.implementation(layer.sum_op, "cpu") is getattr(native_ops, layer.sum_op):
            rows.append(_row(layer, kept))
        else:
            add_layer(layer, factors)
    if rows:
        weights, table = factors.to(torch.float64).contiguous(), (_Layer * len(rows))(*rows)
        _function("clip_and_noise", _Layer, ctypes.c_void_p)(
            table, len(rows), weights.data_ptr(), native.threads()
        )
    if not key.numel():
        return
    streams = bytes(nonces.tolist())
    sums = (_Sum * len(outs))(
        *(
            _Sum(out.data_ptr(), out.numel(), _Bytes12(*streams[12 * i : 12 * (i + 1)]))
            for i, out in enumerate(outs)
        )
    )
    noise = _Noise(bytes(key.tolist()), noise_scale, grid, divisor, 0, 0)
    _function("noise_sums", _Sum, ctypes.POINTER(_Noise))(sums, len(outs), noise, native.threads())
