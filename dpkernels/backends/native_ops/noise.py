"""Noise, grid and division of finished sums by one call of the native library, on CPU tensors."""

import ctypes
import functools
from collections.abc import Callable

from torch import Tensor

from dpkernels.backends.native_ops import native
from dpkernels.backends.native_ops.optim import Bytes12, Noise, raw


class _Sum(ctypes.Structure):
    """dpk_noised_sum."""

    _fields_ = (("sum", ctypes.c_void_p), ("count", ctypes.c_int64), ("nonce", Bytes12))


@functools.cache
def _function() -> Callable[..., None]:
    arguments = [ctypes.POINTER(_Sum), ctypes.c_int64, ctypes.POINTER(Noise), ctypes.c_int32]
    return native.library("cpu").function("dpk_cpu_noise_sums", arguments)


def noise_sums(
    sums: list[Tensor], key: Tensor, nonces: Tensor, noise_scale: float, grid: float, divisor: float
) -> None:
    """sum = round((sum + noise_scale·z)/grid)·grid/divisor; see `dpkernels.ops.noise_sums`."""
    streams = raw(nonces)
    rows = [
        _Sum(total.data_ptr(), total.numel(), Bytes12(*streams[12 * i : 12 * (i + 1)]))
        for i, total in enumerate(sums)
    ]
    noise = Noise(raw(key), noise_scale, grid, divisor, 0, 0)
    _function()((_Sum * len(rows))(*rows), len(rows), noise, native.threads())
