"""The watch of gathered weights: no forward may write them, and none outlives the micro-batch it was gathered for.

fully_shard replaces the sharded weights of a module by gathered ones while the module computes. The other guards
compare the sharded weights, which stay the same objects throughout a run, so gathered ones are dropped before they
look: a weight that is then another object was replaced by something else. A write to a gathered weight reaches no
sharded one, but it would change what later examples compute for as long as the weight stays gathered.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dpkernels.privacy.guards.parameters import is_power_of_two, sum_of_bits, version_of, written_message
from dpkernels.privacy.ranks.sharded import ShardedModule, Slot, reshard, sharded_modules


class GatheredWatch:
    """Compares the gathered weights of a model at the end of each forward of their module with those at its start.

    Identities and version counters are compared in every forward, and sums of bits in a module's 1st, 2nd, 4th, ...
    forward. fully_shard fills a gathered weight without a change of its version counter, so a backward that writes it
    is found by the counter, too, at the next `check`.

    Args:
        model: the private model. Its gathered weights are dropped.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = sharded_modules(model)
        self._entered: set[str] = set()  # modules whose forward has begun, before they gather
        self._forwards: dict[str, int] = {}
        self._begun: dict[str, list[tuple[Slot, Tensor | None, Tensor | None]]] = {}
        # The versions of all weights that were gathered so far: each is gathered into the same tensor again, whose
        # memory is freed in between.
        self._versions: dict[str, tuple[Tensor, int]] = {}
        for sharded in self._modules:
            module: nn.Module = sharded.module
            module.register_forward_pre_hook(_hook(self, GatheredWatch._enter, sharded), prepend=True)
            module.register_forward_pre_hook(_hook(self, GatheredWatch._begin, sharded))
            module.register_forward_hook(_hook(self, GatheredWatch._end, sharded), prepend=True)

    def check(self) -> None:
        """Raise RuntimeError, by name, if a gathered weight was written since it was first gathered."""
        self._raise_if(
            [name for name, (tensor, then) in self._versions.items() if version_of(tensor) != then]
        )

    def drop(self) -> None:
        """Drop all gathered weights: the modules hold the sharded ones, and the next use gathers them again."""
        if self._modules:
            reshard(self._model)

    def reset(self) -> None:
        """Make the model ready for another forward after one that raised, or whose backward did."""
        inner: set[Any] = set()
        for sharded in self._modules:  # parents first
            if sharded.module not in inner:
                if sharded.name in self._entered:
                    sharded.module.reset_iter_state()
                inner.update(sharded.module.modules())

    def _enter(self, sharded: ShardedModule) -> None:
        self._entered.add(sharded.name)

    def _begin(self, sharded: ShardedModule) -> None:
        forwards = self._forwards[sharded.name] = self._forwards.get(sharded.name, 0) + 1
        compares_bits = is_power_of_two(forwards)
        begun = []
        for slot in sharded.slots:
            tensor = slot.tensor
            if tensor is not None:
                known = self._versions.get(slot.name)
                if known is None or known[0] is not tensor:
                    self._versions[slot.name] = tensor, version_of(tensor)
            begun.append(
                (slot, tensor, sum_of_bits(tensor) if compares_bits and tensor is not None else None)
            )
        self._begun[sharded.name] = begun

    def _end(self, sharded: ShardedModule) -> None:
        written = []
        for slot, tensor, bits in self._begun.pop(sharded.name, ()):
            same = slot.tensor is tensor
            if same and tensor is not None:
                same = version_of(tensor) == self._versions[slot.name][1]
                same = same and (bits is None or bits.equal(_bits(tensor)))
            if not same:
                written.append(slot.name)
        self._raise_if(written)

    def _raise_if(self, written: list[str]) -> None:
        if written:
            raise RuntimeError(written_message(written))


def _bits(tensor: Tensor) -> Tensor:
    bits = sum_of_bits(tensor)
    assert bits is not None  # it had bits when the forward began
    return bits


def _hook(
    watch: GatheredWatch, method: Callable[[GatheredWatch, ShardedModule], None], sharded: ShardedModule
) -> Callable[..., None]:
    """A hook that ends with its watch, and so with the private run."""
    reference = weakref.ref(watch)

    def call(*_: Any) -> None:
        alive = reference()
        if alive is not None:
            method(alive, sharded)

    return call
