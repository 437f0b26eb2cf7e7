"""The native library without its arithmetic, so that a step on small tensors takes the host's time and no other."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from dpkernels.backends.native_ops import calls, grouped, native, optim

_FLOAT = ctypes.sizeof(ctypes.c_float)
_CACHES = (calls.function, grouped.function, optim._function)


def _no_norms(layers: Any, count: int, batch: int, threads: int, out: int) -> None:
    ctypes.memset(out, 0, _FLOAT * batch)


def _no_factors(norm_sq: int, dtype: int, count: int, max_grad_norm: float, out: int) -> None:
    ctypes.memset(out, 0, _FLOAT * count)


def _nothing(*arguments: Any) -> None:
    pass


STUBS: dict[str, Callable[..., None]] = {
    "dpk_cpu_total_norm_sq": _no_norms,
    "dpk_cpu_clip_factors": _no_factors,
    "dpk_cpu_weighted_sums": _nothing,
    "dpk_cpu_noise_adamw": _nothing,
}
"""What takes the place of the kernels of a step with grouped norms and sums, flat clipping and AdamW: zeros, at once.
The arguments of each call are prepared as ever; the cipher of the noise's secrets stays."""


@contextmanager
def kernels_stubbed() -> Iterator[None]:
    """Context in which the functions of STUBS take no time."""
    loaded = native.Library.function

    def function(self: native.Library, name: str, argtypes: Sequence[Any]) -> Callable[..., None]:
        return STUBS.get(name) or loaded(self, name, argtypes)

    with mock.patch.object(native.Library, "function", function):
        _forget()
        try:
            yield
        finally:
            _forget()


def _forget() -> None:
    for cache in _CACHES:
        cache.cache_clear()
