"""Bytes of tensors that are alive while code runs, and their peak.

`LiveMemory` intercepts every operation, also those in a backward and in custom autograd functions, and counts a storage
from the operation that returned it until it is freed. It does not count temporary memory within one operation.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# torch's CUDA allocator, in bytes: every tensor is rounded up to a multiple of the first; from the second on, memory
# comes from CUDA in multiples of the third, and what is left over is not cut off where it is at most the fourth.
_BLOCK, _LARGE, _SEGMENT, _NOT_CUT = 512, 10 * 2**20, 2 * 2**20, 2**20


def cuda_size(nbytes: int) -> int:
    """Bytes that torch's CUDA allocator counts for a tensor of `nbytes` bytes, in a block newly obtained from CUDA."""
    block = -(-nbytes // _BLOCK) * _BLOCK
    segment = -(-block // _SEGMENT) * _SEGMENT
    return segment if block >= _LARGE and segment - block <= _NOT_CUT else block


class LiveMemory(TorchDispatchMode):
    """Bytes of the tensors made within it that are still alive, and their highest sum.

    A storage counts once, however many views share it. Earlier tensors count only after a call of `count`.

    Args:
        size_of: bytes of a storage -> bytes that count for it, as `cuda_size`; None: as they are.

    Attributes:
        live: bytes alive now.
        peak: their maximum since the beginning, or since `restart`.
    """

    def __init__(self, size_of: Callable[[int], int] | None = None) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._size_of = size_of or int
        self._counted: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and count what it returned."""
        result = func(*args, **(kwargs or {}))
        returned = [t for t in tree_leaves(result) if isinstance(t, Tensor) and not self._knows(t)]
        if returned:
            inputs = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            for tensor in returned:
                if id(tensor.untyped_storage()) not in inputs:
                    self.count(tensor)
        return result

    def _knows(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        known = self._counted.get(id(storage))
        return known is not None and known() is storage

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage, if it is not counted yet, until it is freed."""
        if self._knows(tensor):
            return
        storage = tensor.untyped_storage()
        key = id(storage)
        size = self._size_of(storage.nbytes())

        def freed(_: Any) -> None:
            self.live -= size
            del self._counted[key]

        self._counted[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)

    def restart(self) -> None:
        """Reset the peak to the bytes alive now."""
        self.peak = self.live


def held_bytes(tensors: Iterable[Tensor], size_of: Callable[[int], int] = int) -> int:
    """Bytes of the tensors' storages, each counted once, by `size_of` as in `LiveMemory`."""
    storages = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(size_of(storage.nbytes()) for storage in storages.values())
