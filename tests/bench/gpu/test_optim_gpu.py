"""bench.gpu.optim, as far as a CPU goes: its checks by the emulated kernels, its refusal."""

import ctypes
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.cases import native as native_bench
from bench.gpu import optim as optim_gpu
from dpkernels.backends import native
from dpkernels.backends.native_ops import chacha20 as native_chacha20
from tests.ops import emulated

ROOT = Path(__file__).resolve().parents[3]
needs_native = pytest.mark.skipif(
    native.library("cpu").handle is None, reason=native.library("cpu").reason or "the CPU library loads"
)


def call(name: str, *arguments: object) -> None:
    handle = emulated.library().handle
    assert handle is not None
    native_bench.Bench(handle).call(name, *arguments)


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def fused_step(name: str, given: optim_gpu.Buffers) -> None:
    settings = ctypes.byref(given.noise), ctypes.byref(given.options)
    call(name, given.table, ctypes.c_int64(len(given.table)), *settings, None)


@pytest.mark.slow
@pytest.mark.slow
@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_awkward_buffers_get_the_cpus_bits(dtype: torch.dtype) -> None:
    exact, found = (optim_gpu.awkward("cpu", dtype, most=5000) for _ in range(2))
    exact.library()
    fused_step("dpk_cuda_noise_adamw", found)
    assert optim_gpu.same(found.everything(), exact.everything())
    assert not any(
        bool(tensor.isnan().any()) for tensor in exact.everything()
    )  # its bits are nobody's promise


@pytest.mark.slow
@needs_native
def test_extreme_words_get_the_cpus_bits() -> None:
    words = optim_gpu.extreme_words()
    words = torch.cat((words[:379_000:17], words[-4000:])).contiguous()
    found = torch.full(words.shape, float("nan"), dtype=torch.float64)
    call("bench_box_muller", pointer(words), ctypes.c_int64(len(words)), pointer(found), None)
    assert optim_gpu.same([found], [native_chacha20.box_muller(words)])


@pytest.mark.slow
def test_short_roots_and_quotients_are_correctly_rounded() -> None:
    a, b = (t[::400].contiguous() for t in optim_gpu.all_mantissas())
    assert 1 <= float(b.min()) < float(b.max()) < 4
    roots, quotients = torch.zeros_like(a), torch.zeros_like(a)
    call(
        "bench_short",
        pointer(a),
        pointer(b),
        ctypes.c_int64(len(a)),
        pointer(roots),
        pointer(quotients),
        None,
    )
    assert optim_gpu.same([roots, quotients], optim_gpu.rounded(a, b))


# Random123's known answers for philox4x32-10.
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_is_philox(counter: list[int], key: list[int], answer: list[int]) -> None:
    out = torch.zeros(16, dtype=torch.int32)
    first = [counter[0] // 4, *counter[1:]]
    call("bench_philox", (ctypes.c_uint32 * 4)(*first), (ctypes.c_uint32 * 2)(*key), pointer(out), None)
    own = counter[0] % 4
    assert [word & 0xFFFFFFFF for word in out.tolist()][4 * own : 4 * own + 4] == answer


@needs_native
def test_the_philox_step_draws_unit_normals() -> None:
    """The comparison does the same work: without the noise's stream, nothing differs."""
    buffers = optim_gpu.Buffers(40_000, 2, "cpu")
    for first in buffers.firsts:
        first.zero_()
    for total in buffers.sums:
        total.zero_()
    fused_step("bench_noise_adamw_philox", buffers)
    z = torch.cat(buffers.firsts).double() / (0.1 * 3.0 / 64.0)
    assert abs(float(z.mean())) < 5 / 200
    assert abs(float(z.var()) - 1) < 5 * 2**0.5 / 200


def test_the_build_has_the_librarys_flags() -> None:
    text = (ROOT / "CMakeLists.txt").read_text()
    command = native_bench.command(Path("x.so"), "90a")
    assert "--fmad=false" in command
    assert "--fmad=false" in text
    assert {"-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a"} <= set(command)
    assert "set(CMAKE_CUDA_STANDARD 17)" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert optim_gpu.main([]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err
