"""Faults of C++ that a sanitizer is to find, each with the tests in which it does."""

from __future__ import annotations

from dataclasses import dataclass

from tests.plant.data import Fault


@dataclass(frozen=True)
class NativeFault:
    """A fault, and words of the report that must be written about it."""

    fault: Fault
    says: str


ADDRESS_FAULTS = (
    NativeFault(
        Fault(
            "a frame too many is read",
            "csrc/cpu/embedding.cpp",
            "for (int64_t t = 0; t < frames; ++t)",
            "for (int64_t t = 0; t <= frames; ++t)",
            "tests/ops/test_native.py::test_threads_change_no_bit",
        ),
        "heap-buffer-overflow",
    ),
    NativeFault(
        Fault(
            "a counter's limit overflows",
            "csrc/common/chacha20_arguments.h",
            "blocks > limit - counter)",
            "static_cast<int32_t>(blocks) + INT32_MAX < static_cast<int32_t>(counter))",
            "tests/ops/test_chacha20.py",
        ),
        "signed integer overflow",
    ),
)
THREAD_FAULTS = (
    NativeFault(
        Fault(
            "a job is announced without the lock",
            "csrc/common/parallel.cpp",
            "      const std::lock_guard<std::mutex> lock(mutex_);\n      job_ = &job;",
            "      job_ = &job;",
            "tests/ops/test_native.py::test_threads_change_no_bit",
        ),
        "data race",
    ),
    NativeFault(
        Fault(
            "two jobs share the pool",
            "csrc/common/parallel.cpp",
            "if (busy_.exchange(true, std::memory_order_acquire)) return false;",
            "busy_.store(true);",
            "tests/ops/test_threads.py::test_several_callers_at_once",
        ),
        "data race",
    ),
)
