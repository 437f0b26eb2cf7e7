"""Loading the native libraries: finding them, the ABI check, errors, element types and threads.

The C ABI is `csrc/dpkernels.h`; `dpkernels/lib/` holds `libdpkernels_cpu.so` and, where nvcc was found at
installation, `libdpkernels_cuda.so`. Importing this module loads nothing and needs no torch.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ABI_VERSION = 1
"""DPK_ABI_VERSION of the csrc/dpkernels.h that this Python code was written for."""

FOLDER = Path(__file__).resolve().parents[2] / "lib"

_FIXES = {
    "cpu": "install a C++ compiler and reinstall with DPKERNELS_BUILD=cpu",
    "cuda": "put nvcc on the PATH and reinstall with DPKERNELS_BUILD=cuda",
}

_CUDA_OPS = ("chacha20_keystream", "chacha20_normal", "noise_adamw", "noise_sgd")
"""The ops of the CUDA library; the other ops on a GPU are not C ABI functions."""

# dpk_status in csrc/dpkernels.h; any other failure is a RuntimeError.
_EXCEPTIONS: dict[int, type[Exception]] = {1: ValueError, 2: MemoryError, 3: NotImplementedError}


class NativeLibraryError(RuntimeError):
    """A native library is missing or cannot be used; the message names the reason and the fix."""


@dataclass(frozen=True)
class Library:
    """One library: its `handle` if it is loaded, otherwise the `reason`."""

    device_type: str
    path: Path
    handle: ctypes.CDLL | None
    reason: str = ""

    def function(self, name: str, argtypes: Sequence[Any]) -> Callable[..., None]:
        """Return the C function `name`, which returns a dpk_status; a call raises if the status is not DPK_OK.

        Args:
            name: the name in csrc/dpkernels.h.
            argtypes: the ctypes of the arguments.

        Raises:
            NativeLibraryError: the library is not loaded, or has no such function.
        """
        if self.handle is None:
            raise NativeLibraryError(self.reason)
        try:
            function = getattr(self.handle, name)
        except AttributeError:
            raise NativeLibraryError(
                f"{self.path.name} is older than this code and has no {name}; {_FIXES[self.device_type]}"
            ) from None
        function.argtypes = list(argtypes)
        function.restype = ctypes.c_int32
        message = self.handle.dpk_last_error

        def call(*arguments: Any) -> None:
            status = function(*arguments)
            if status != 0:
                raise _EXCEPTIONS.get(status, RuntimeError)(f"{name}: {message().decode(errors='replace')}")

        return call


def _load(device_type: str, path: Path) -> Library:
    hint = _FIXES[device_type]
    if not path.exists():
        return Library(device_type, path, None, f"{path.name} is not in this installation; {hint}")
    try:
        handle = ctypes.CDLL(str(path))
        for name in ("dpk_version", "dpk_last_error"):
            getattr(handle, name).restype = ctypes.c_char_p
        abi = int(handle.dpk_abi_version())
    except (OSError, AttributeError) as error:
        return Library(device_type, path, None, f"{path.name} does not load ({error}); {hint}")
    if abi != ABI_VERSION:
        reason = f"{path.name} has ABI version {abi}, this Python code needs {ABI_VERSION}; {hint}"
        return Library(device_type, path, None, reason)
    return Library(device_type, path, handle)


@functools.cache
def library(device_type: str) -> Library:
    """Return the library for a device type, which the first call loads.

    Args:
        device_type: "cpu" or "cuda".

    Raises:
        ValueError: no library exists for this device type.
    """
    if device_type not in _FIXES:
        raise ValueError(
            f"device_type: given {device_type!r}; native libraries exist for {', '.join(_FIXES)}"
        )
    return _load(device_type, FOLDER / f"libdpkernels_{device_type}.so")


def unavailable_reason(device_type: str, op: str = "") -> str:
    """Return why native code cannot serve an op on such a device; "" if it can, provided that it has the op."""
    if device_type not in _FIXES:
        return f"there is no native library for {device_type}"
    if device_type == "cuda" and op not in _CUDA_OPS:
        return f"the CUDA library serves only {', '.join(_CUDA_OPS)}"
    return library(device_type).reason


@functools.cache
def element_type(dtype: torch.dtype) -> int:
    """Return the dpk_dtype of a torch dtype.

    Raises:
        TypeError: the C ABI has no such element type.
    """
    import torch

    codes = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3, torch.int64: 4}
    if dtype not in codes:
        raise TypeError(f"dtype: given {dtype}; pass one of {', '.join(str(known) for known in codes)}")
    return codes[dtype]


def threads() -> int:
    """Return the number of threads of a CPU kernel: torch.get_num_threads()."""
    import torch

    return torch.get_num_threads()


def isa() -> str:
    """Return the instruction set that CPU kernels use: "baseline", "avx2" or "avx512".

    Raises:
        NativeLibraryError: there is no CPU library.
    """
    handle = library("cpu").handle
    if handle is None:
        raise NativeLibraryError(library("cpu").reason)
    handle.dpk_isa.restype = ctypes.c_char_p
    return str(handle.dpk_isa().decode())


def set_isa(name: str) -> None:
    """Select the instruction set of CPU kernels, for tests and measurements; "" selects the best one.

    Raises:
        ValueError: this CPU does not have that instruction set.
        NativeLibraryError: there is no CPU library.
    """
    library("cpu").function("dpk_set_isa", [ctypes.c_char_p])(name.encode())


def status() -> dict[str, dict[str, Any]]:
    """Return the state of each library, by device type, for `python -m dpkernels`.

    Returns:
        {"cpu" | "cuda": {"file", "loaded", "version", "abi", "isa" (CPU only), "reason"}}.
    """
    rows: dict[str, dict[str, Any]] = {}
    for device_type in _FIXES:
        loaded = library(device_type)
        row: dict[str, Any] = {"file": f"lib/{loaded.path.name}", "loaded": False, "reason": loaded.reason}
        if loaded.handle is not None:
            row |= {"loaded": True, "version": loaded.handle.dpk_version().decode()}
            row |= {"abi": int(loaded.handle.dpk_abi_version())}
            if device_type == "cpu":
                row["isa"] = isa()
        rows[device_type] = row
    return rows
