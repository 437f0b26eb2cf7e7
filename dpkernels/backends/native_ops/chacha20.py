"""ChaCha20 by the native libraries, on CPU and CUDA tensors."""

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from dpkernels.backends.native_ops import native

_HEAD = [
    ctypes.c_char_p,
    ctypes.c_int64,
    ctypes.c_char_p,
    ctypes.c_int64,
]  # key, counter, nonce, blocks or count
_ARGUMENTS = {
    "dpk_cpu_chacha20_keystream": [*_HEAD, ctypes.c_int32, ctypes.c_void_p],
    "dpk_cpu_box_muller": [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p],
    "dpk_cpu_chacha20_normal": [*_HEAD, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p],
    "dpk_cuda_chacha20_keystream": [*_HEAD, ctypes.c_void_p, ctypes.c_void_p],
    "dpk_cuda_chacha20_normal": [*_HEAD, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p],
}


@functools.cache
def _function(device_type: str, op: str) -> Callable[..., None]:
    name = f"dpk_{device_type}_{op}"
    return native.library(device_type).function(name, _ARGUMENTS[name])


def chacha20_keystream(
    key: bytes, counter: int, nonce: bytes, blocks: int, *, device: torch.device | str = "cpu"
) -> Tensor:
    """`dpkernels.ops.chacha20_keystream` by csrc/cpu/chacha20.cpp or csrc/cuda/chacha20.cu."""
    out = torch.empty(64 * blocks, dtype=torch.uint8, device=device)
    function = _function(out.device.type, "chacha20_keystream")
    if out.device.type == "cpu":
        function(key, counter, nonce, blocks, native.threads(), out.data_ptr())
    else:
        with torch.cuda.device(out.device):
            function(key, counter, nonce, blocks, out.data_ptr(), torch.cuda.current_stream().cuda_stream)
    return out


def chacha20_normal(
    n: int,
    *,
    key: bytes,
    nonce: bytes,
    counter: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`dpkernels.ops.chacha20_normal` by csrc/cpu/chacha20.cpp or csrc/cuda/chacha20.cu."""
    out = torch.empty(n, dtype=dtype, device=device)
    function = _function(out.device.type, "chacha20_normal")
    code = native.element_type(dtype)
    if out.device.type == "cpu":
        function(key, counter, nonce, n, code, native.threads(), out.data_ptr())
    else:
        with torch.cuda.device(out.device):
            function(key, counter, nonce, n, code, out.data_ptr(), torch.cuda.current_stream().cuda_stream)
    return out


def box_muller(words: Tensor) -> Tensor:
    """`dpkernels.reference.chacha20.box_muller` as in csrc/common/chacha20.h; for inspection, CPU only."""
    out = torch.empty(len(words), 2, dtype=torch.float64)
    words = words.contiguous()
    _function("cpu", "box_muller")(words.data_ptr(), len(words), out.data_ptr())
    return out
