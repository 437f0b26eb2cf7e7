"""Whose threads the native loops run on, and that they can: beside torch's, in forks, from several threads at once."""

import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

from dpkernels import ops
from dpkernels.backends import native

pytestmark = pytest.mark.skipif(
    bool(native.unavailable_reason("cpu", "linear")), reason=native.unavailable_reason("cpu", "linear")
)


def _large() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (torch.randn(4, 100, 96, generator=generator), torch.randn(4, 100, 80, generator=generator))


def _run(code: str) -> str:
    given = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert given.returncode == 0, given.stderr
    return given.stdout


@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="this torch is built without OpenMP")
def test_no_threads_of_our_own_beside_torchs() -> None:
    """Two sets of threads on the same cores slow each other down; torch's wait by spinning."""
    counts = _run(
        """
        import os
        import torch
        from dpkernels import ops

        torch.set_num_threads(3)
        torch.randn(512, 512) @ torch.randn(512, 512)
        (torch.randn(1 << 20) + 1).sum()
        before = len(os.listdir("/proc/self/task"))
        x, g = torch.randn(4, 100, 96), torch.randn(4, 100, 80)
        ops.linear_norm_sq(x, g, method="direct")
        print(before, len(os.listdir("/proc/self/task")))
        """
    ).split()
    assert counts[0] == counts[1]


def test_without_an_openmp_runtime_the_library_has_threads_of_its_own() -> None:
    """The library loaded alone, by ctypes, without torch: two threads give the bits of one."""
    path = native.library("cpu").path
    out = _run(
        f"""
        import ctypes, os

        library = ctypes.CDLL({str(path)!r})
        key, nonce, blocks = bytes(32), bytes(12), 1 << 16
        results = []
        for threads in (1, 2):
            out = ctypes.create_string_buffer(64 * blocks)
            status = library.dpk_cpu_chacha20_keystream(
                key, ctypes.c_int64(0), nonce, ctypes.c_int64(blocks), ctypes.c_int32(threads), out
            )
            assert status == 0
            results.append(out.raw)
        assert results[0] == results[1]
        print(len(os.listdir("/proc/self/task")))
        """
    )
    assert int(out) == 2


def test_a_child_of_a_parent_that_ran_only_torch_computes_too() -> None:
    """The parent's first loop may be torch's: the library must have been told of the fork all the same."""
    out = _run(
        """
        import os, signal
        import torch
        from dpkernels import ops
        from dpkernels.backends import native

        native.library("cpu")
        torch.set_num_threads(2)
        torch.randn(512, 512) @ torch.randn(512, 512)
        (torch.randn(1 << 20) + 1).sum()
        x, g = torch.ones(4, 100, 96), torch.ones(4, 100, 80)
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            norms = ops.linear_norm_sq(x, g, method="direct")
            os._exit(0 if norms.isfinite().all() else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """
    )
    assert out.strip() == "0"


@pytest.mark.parametrize("threads", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_torchs_flush_denormal_changes_no_norm(threads: int) -> None:
    """It is a mode of the calling thread alone, and an input read as 0 is no rounding error: 1e-40 · 1e38 is 0.01."""
    out = _run(
        f"""
        import torch
        from dpkernels import ops

        torch.set_num_threads({threads})
        x, g = torch.full((4, 100, 96), 1e-40), torch.full((4, 100, 80), 1e38)
        expected = ops.linear_norm_sq(x, g, method="direct")
        assert torch.set_flush_denormal(True)
        given = ops.linear_norm_sq(x, g, method="direct")
        assert float(torch.tensor(1e-40) * 1.0) == 0.0, "the caller's mode is as it was"
        print(torch.equal(given, expected) and bool((given > 0).all()))
        """
    )
    assert out.strip() == "True"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_computes_the_same() -> None:
    """The parent's threads do not exist in the child: whoever waited for them would wait for ever."""
    x, g = _large()
    expected = ops.linear_norm_sq(x, g, method="direct")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that waits for ever fails the test instead of holding it up
        same = torch.equal(ops.linear_norm_sq(x, g, method="direct"), expected)
        os.write(writer, b"same" if same else b"other")
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        assert stream.read() == b"same"
    os.waitpid(child, 0)


def test_several_callers_at_once() -> None:
    x, g = _large()
    expected = ops.linear_norm_sq(x, g, method="direct")
    given: list[torch.Tensor] = []

    def call() -> None:
        torch.set_num_threads(2)
        given.extend(ops.linear_norm_sq(x, g, method="direct") for _ in range(20))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(given) == 80
    assert all(torch.equal(one, expected) for one in given)
