"""Memory whose surroundings are watched: inputs among NaNs, outputs between guards.

Under AddressSanitizer there are no guards of our own: its red zones begin where a tensor ends.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

GUARD = 0 if "asan" in os.environ.get("LD_PRELOAD", "") else 64  # bytes, and a multiple of a cache line
_PATTERN = 0xA5
_empty = torch.empty


class Strided:
    """What the native wrappers read of a tensor, with any strides: torch has no negative ones."""

    def __init__(self, buffer: Tensor, offset: int, shape: Sequence[int], strides: Sequence[int]) -> None:
        self.buffer, self.shape, self.dtype = buffer, torch.Size(shape), buffer.dtype
        self._strides, self._offset = tuple(strides), offset

    def __len__(self) -> int:
        return self.shape[0]

    def data_ptr(self) -> int:
        return self.buffer.data_ptr() + self._offset * self.buffer.element_size()

    def stride(self) -> tuple[int, ...]:
        return self._strides

    def dim(self) -> int:
        return len(self.shape)


def strided(
    dense: Tensor, order: Sequence[int], step: int, gaps: Sequence[int], reverse: Sequence[bool]
) -> Strided:
    """A copy of a tensor in memory that is NaN elsewhere.

    Args:
        dense: the values.
        order: its axes, the outermost in memory first.
        step: stride of the innermost axis.
        gaps: by axis, the elements that are left out behind each of its entries.
        reverse: by axis, whether its entries lie in descending order.
    """
    strides, extent = [0] * dense.dim(), step
    for axis in reversed(order):
        strides[axis] = extent
        extent = extent * max(1, dense.shape[axis]) + gaps[axis]
    reach = sum((size - 1) * stride for size, stride in zip(dense.shape, strides, strict=True))
    margin = GUARD // dense.element_size()
    count = reach + 1 if dense.numel() else 0
    buffer = torch.full((count + 2 * margin,), math.nan, dtype=dense.dtype)
    flipped = [axis for axis, wanted in enumerate(reverse) if wanted]
    if dense.numel():
        buffer.as_strided(dense.shape, strides, margin).copy_(dense.flip(flipped))
    start = margin + sum((dense.shape[axis] - 1) * strides[axis] for axis in flipped if dense.numel())
    signed = [-stride if wanted else stride for stride, wanted in zip(strides, reverse, strict=True)]
    return Strided(buffer, start, dense.shape, signed)


class Guarded:
    """Tensors with guards before and behind them."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor that holds the guards' pattern."""
        size = math.prod(shape) * dtype.itemsize
        block = _empty(size + 2 * GUARD, dtype=torch.uint8).fill_(_PATTERN)
        self._blocks.append(block)
        return block[GUARD : GUARD + size].view(dtype).view(tuple(shape))

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor."""
        made = self.empty(tensor.shape, tensor.dtype)
        made.copy_(tensor)
        return made

    def check(self) -> None:
        """Raise AssertionError if a guard was written to."""
        for block in self._blocks if GUARD else ():
            for end in (block[:GUARD], block[-GUARD:]):
                assert bool((end == _PATTERN).all()), "memory next to an output was written to"

    @contextmanager
    def outputs(self) -> Iterator[None]:
        """Within it what torch.empty, zeros and full allocate has guards, which are checked at its end."""

        def shape_of(size: tuple[Any, ...]) -> tuple[int, ...]:
            return tuple(size[0]) if size and not isinstance(size[0], int) else size

        def empty(*size: Any, dtype: torch.dtype = torch.float32, **_: Any) -> Tensor:
            return self.empty(shape_of(size), dtype)

        def zeros(*size: Any, dtype: torch.dtype = torch.float32, **_: Any) -> Tensor:
            return self.empty(shape_of(size), dtype).zero_()

        def full(size: Any, value: float, *, dtype: torch.dtype = torch.float32, **_: Any) -> Tensor:
            return self.empty(shape_of((size,)), dtype).fill_(value)

        with mock.patch.multiple(torch, empty=empty, zeros=zeros, full=full):
            yield
        self.check()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits, NaNs included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(
        (a.contiguous().view(-1).view(torch.uint8) == b.contiguous().view(-1).view(torch.uint8)).all()
    )
