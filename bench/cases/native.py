"""CUDA code that only measurements and checks use (bench/native), built by nvcc at its first use.

A build is kept in build/bench under a hash of its sources: `python -m bench.cases.native 90a` makes that of
bench.gpu.optim on a machine without a GPU, to be carried along. `Bench` holds the fused step with Philox in ChaCha20's
place, compiled from the library's template by the library's flags, and single functions of the kernels.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "bench"
SOURCES = ("bench/native/optim_bench.cu", "csrc/common/status.cpp")
# Those of CMakeLists.txt.
FLAGS = (
    "-shared",
    "-std=c++17",
    "-O3",
    "--fmad=false",
    "-Xcompiler=-fPIC,-Wall,-Wextra,-fvisibility=hidden",
    '-DDPK_VERSION="bench"',
    "-Icsrc",
    "-Ibench/native",
)
FOLDERS = ("bench/native", "csrc/common", "csrc/cuda")


class CannotBuild(RuntimeError):
    """There is no nvcc, or it failed."""


def architecture(device: str = "cuda") -> str:
    """The machine code of a GPU: "90a" where that is what the library is built for."""
    major, minor = torch.cuda.get_device_capability(device)
    return "90a" if (major, minor) == (9, 0) else f"{major}{minor}"


def command(target: Path, arch: str) -> list[str]:
    """nvcc's command line; run it in ROOT."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        raise CannotBuild("nvcc is not on the PATH")
    return [nvcc, *FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}", "-o", str(target), *SOURCES]


@dataclass(frozen=True)
class Bench:
    """One build."""

    handle: ctypes.CDLL

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of bench/native/optim_bench.cu.

        Raises:
            RuntimeError: it failed, with its message.
        """
        self.handle.dpk_last_error.restype = ctypes.c_char_p
        if getattr(self.handle, name)(*arguments) != 0:
            raise RuntimeError(f"{name}: {self.handle.dpk_last_error().decode(errors='replace')}")

    def philox_step(self, table: Any, noise: Any, options: Any) -> None:
        """dpk_cuda_noise_adamw with Philox, on the current stream."""
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        arguments = (table, ctypes.c_int64(len(table)), ctypes.byref(noise), ctypes.byref(options), stream)
        self.call("bench_noise_adamw_philox", *arguments)

    def box_muller(self, words: Tensor) -> Tensor:
        """The normals of words [pairs, 2] (uint64 or int64, any device), by the GPU: float64 [pairs, 2] on the CPU."""
        given = words.contiguous().cuda()
        out = torch.full(given.shape, float("nan"), dtype=torch.float64, device=given.device)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        pointers = (
            ctypes.c_void_p(given.data_ptr()),
            ctypes.c_int64(len(given)),
            ctypes.c_void_p(out.data_ptr()),
        )
        self.call("bench_box_muller", *pointers, stream)
        return out.cpu()

    def short(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """√b and a/b of float32 tensors by the update's short sequences on the GPU; on the CPU."""
        given = [t.contiguous().cuda() for t in (a, b)]
        results = [torch.full_like(given[0], float("nan")) for _ in range(2)]
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (*given, *results)]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self.call("bench_short", *pointers[:2], ctypes.c_int64(a.numel()), *pointers[2:], stream)
        return results[0].cpu(), results[1].cpu()

    def philox(self, counter: list[int], key: list[int]) -> list[int]:
        """16 words of Philox4x32-10 from (4·counter[0], counter[1..3]) on."""
        out = torch.zeros(16, dtype=torch.int32, device="cuda")
        words = (ctypes.c_uint32 * 4)(*counter), (ctypes.c_uint32 * 2)(*key)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self.call("bench_philox", *words, ctypes.c_void_p(out.data_ptr()), stream)
        return [word & 0xFFFFFFFF for word in out.tolist()]


def build(arch: str) -> Path:
    """Compile for one architecture, unless this very source was; returns the library.

    Raises:
        CannotBuild: there is no nvcc, or it failed.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(repr((FLAGS, arch)).encode())
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")):
        digest.update(path.read_bytes())
    target = BUILD / f"liboptim_bench-{digest.hexdigest()[:16]}.so"
    if target.exists():
        return target
    done = subprocess.run(command(target, arch), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotBuild(f"nvcc failed: {done.stderr[-2000:]}")
    return target


@functools.cache
def load() -> Bench:
    """Build for the current GPU and load.

    Raises:
        CannotBuild: see `build`.
    """
    return Bench(ctypes.CDLL(str(build(architecture()))))


if __name__ == "__main__":
    print(build(sys.argv[1]))
