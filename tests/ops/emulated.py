"""The CUDA sources, compiled for a CPU with the headers of emulated_cuda/ in place of CUDA's."""

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from dpkernels.backends import native

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "csrc/cuda/chacha20.cu",
    "csrc/cuda/optim.cu",
    "bench/native/optim_bench.cu",
    "csrc/common/status.cpp",
)
FLAGS = (
    "-x",
    "c++",
    "-std=c++20",
    "-O2",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fPIC",
    "-shared",
    "-pthread",
)
FOLDERS = ("tests/ops/emulated_cuda", "csrc", "bench/native")


@functools.cache
def library() -> native.Library:
    """`libdpkernels_cuda.so` and bench/native, emulated; skips the test where no compiler can make it."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    probe = ["-x", "c++", "-std=c++20", "-fsyntax-only", "-"]
    if subprocess.run(
        [compiler, *probe], input=b"#include <barrier>\n", capture_output=True, check=False
    ).returncode:
        pytest.skip("g++ has no <barrier>")
    target = Path(tempfile.mkdtemp(prefix="dpkernels-emulated-")) / "libdpkernels_cuda.so"
    include = [f"-I{folder}" for folder in FOLDERS] + ["-include", "cuda_runtime.h"]
    command = [compiler, *FLAGS, *include, '-DDPK_VERSION="emulated"', "-o", str(target), *SOURCES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = native._load("cuda", target)
    shutil.rmtree(target.parent)  # it stays mapped
    assert found.handle is not None, found.reason
    return found
