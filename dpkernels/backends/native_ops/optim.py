"""The fused step by the native libraries, on CPU and CUDA tensors. csrc/optim_kernels.h defines the computation."""

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dpkernels.backends.native_ops import native

Bytes12 = ctypes.c_uint8 * 12


class _Tensor(ctypes.Structure):
    """dpk_optim_tensor."""

    _fields_ = (
        ("parameter", ctypes.c_void_p),
        ("sum", ctypes.c_void_p),
        ("first", ctypes.c_void_p),
        ("second", ctypes.c_void_p),
        ("gradient", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("step", ctypes.c_double),
        ("dtype", ctypes.c_int32),
        ("nonce", Bytes12),
        ("rounding_nonce", Bytes12),
    )


class Noise(ctypes.Structure):
    """dpk_noise."""

    _fields_ = (
        ("key", ctypes.c_char_p),
        ("noise_scale", ctypes.c_double),
        ("grid", ctypes.c_double),
        ("divisor", ctypes.c_double),
        ("maximize", ctypes.c_int32),
        ("stochastic_rounding", ctypes.c_int32),
    )


class _Adam(ctypes.Structure):
    """dpk_adam."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps", "weight_decay")),
        ("decoupled", ctypes.c_int32),
    )


class _Sgd(ctypes.Structure):
    """dpk_sgd."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("lr", "momentum", "dampening", "weight_decay")),
        ("nesterov", ctypes.c_int32),
    )


@functools.cache
def _function(device_type: str, op: str) -> Callable[..., None]:
    options = _Adam if op == "noise_adamw" else _Sgd
    last = ctypes.c_int32 if device_type == "cpu" else ctypes.c_void_p  # threads, or the stream
    arguments = [
        ctypes.POINTER(_Tensor),
        ctypes.c_int64,
        ctypes.POINTER(Noise),
        ctypes.POINTER(options),
        last,
    ]
    return native.library(device_type).function(f"dpk_{device_type}_{op}", arguments)


_ROW = struct.Struct(f"@PPPPPqdi12s12s{ctypes.sizeof(_Tensor) - 84}x")
"""One _Tensor, packed at once: assigning its fields one at a time takes several times as long."""
assert _ROW.size == ctypes.sizeof(_Tensor)


def _table(
    params: Sequence[Tensor],
    sums: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    grads: Sequence[Tensor],
    steps: Sequence[float],
    nonces: Tensor,
    rounding_nonces: Tensor,
) -> ctypes.Array[_Tensor]:
    def addresses(tensors: Sequence[Tensor]) -> Sequence[int]:
        return [tensor.data_ptr() for tensor in tensors] if tensors else [0] * len(params)

    columns = [addresses(tensors) for tensors in (params, sums, firsts, seconds, grads)]
    kinds = {dtype: native.element_type(dtype) for dtype in {param.dtype for param in params}}
    secrets = raw(nonces)
    rounding = raw(rounding_nonces) or bytes(len(secrets))
    rows = bytearray(_ROW.size * len(params))
    for i, (param, step, *row) in enumerate(zip(params, steps, *columns, strict=True)):
        nonce = slice(12 * i, 12 * i + 12)
        fields = (*row, param.numel(), step, kinds[param.dtype], secrets[nonce], rounding[nonce])
        _ROW.pack_into(rows, _ROW.size * i, *fields)
    return (_Tensor * len(params)).from_buffer(rows)


def raw(secret: Tensor) -> bytes:
    """Return a secret's bytes."""
    return secret.numpy().tobytes()


def _run(op: str, device: torch.device, table: ctypes.Array[_Tensor], noise: Noise, options: Any) -> None:
    function = _function(device.type, op)
    if device.type == "cpu":
        function(table, len(table), noise, options, native.threads())
    else:
        with torch.cuda.device(device):
            function(table, len(table), noise, options, torch.cuda.current_stream().cuda_stream)


def _noise(
    key: Tensor, noise_scale: float, grid: float, divisor: float, maximize: bool, rounding_nonces: Tensor
) -> Noise:
    return Noise(raw(key), noise_scale, grid, divisor, int(maximize), int(rounding_nonces.numel() > 0))


def noise_adamw(
    params: list[Tensor],
    sums: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grads: list[Tensor],
    steps: list[float],
    key: Tensor,
    nonces: Tensor,
    rounding_nonces: Tensor,
    noise_scale: float,
    grid: float,
    divisor: float,
    maximize: bool,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> None:
    """Noise and AdamW in one pass; see `dpkernels.ops.noise_adamw`."""
    table = _table(params, sums, exp_avgs, exp_avg_sqs, grads, steps, nonces, rounding_nonces)
    noise = _noise(key, noise_scale, grid, divisor, maximize, rounding_nonces)
    _run(
        "noise_adamw",
        params[0].device,
        table,
        noise,
        _Adam(lr, beta1, beta2, eps, weight_decay, int(decoupled)),
    )


def noise_sgd(
    params: list[Tensor],
    sums: list[Tensor],
    momentum_buffers: list[Tensor],
    grads: list[Tensor],
    steps: list[float],
    key: Tensor,
    nonces: Tensor,
    rounding_nonces: Tensor,
    noise_scale: float,
    grid: float,
    divisor: float,
    maximize: bool,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    """Noise and SGD in one pass; see `dpkernels.ops.noise_sgd`."""
    table = _table(params, sums, momentum_buffers, [], grads, steps, nonces, rounding_nonces)
    noise = _noise(key, noise_scale, grid, divisor, maximize, rounding_nonces)
    _run(
        "noise_sgd",
        params[0].device,
        table,
        noise,
        _Sgd(lr, momentum, dampening, weight_decay, int(nesterov)),
    )
