"""Gathers of sharded weights on request: no rank has to gather as often, or in the same order, as the others.

fully_shard's all-gather is a collective: all ranks have to call it for the same module at the same time. In a private
run they do not. A rank may have no example, fewer micro-batches than another, one that it repeats in halves, or a
backward more (the row check has nothing to compare in a micro-batch of one example). Gathers out of step would wait
forever, or, where two modules have the same shapes, hand one module's weights to the other without an error.

So a rank first says which module it needs. All ranks then take part in the gathers of all modules that were named, and
a rank that needs none of them drops the result. A rank that has finished its part of a batch waits within
`optimizer.step()`, and takes part until all have come there:

    rank 0   needs block 3                  needs block 4                  in step()
    rank 1   needs block 3                  in step(): takes part          in step()
    rank 2   in step(): takes part          in step(): takes part          in step()

A request is a number that each rank sends to the others, CPU to CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from dpkernels.privacy.ranks.exchange import ALL_GATHER
from dpkernels.privacy.ranks.group import BEFORE_WAITING, Ranks, RanksError
from dpkernels.privacy.ranks.sharded import ShardedModule, local_part

_NONE = -1


class Gathers:
    """Gathers on request for the sharded modules of all models that train over one process group.

    Args:
        ranks: the processes. Whenever one of them waits for the others, it takes part in their gathers.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._added = 0
        # A model holds what gathers its modules, so that these entries end with it.
        self._gatherers: WeakValueDictionary[int, _Gather] = WeakValueDictionary()
        BEFORE_WAITING[ranks.group] = self.serve

    def add(self, modules: Sequence[ShardedModule]) -> None:
        """Replace the all-gathers of these modules, which all ranks add in the same order."""
        for module in modules:
            if module.slots:
                gather = self._gatherers[self._added] = _Gather(self, self._added, module)
                module.module.set_custom_all_gather(gather)
                self._added += 1

    def serve(self) -> None:
        """Take part in the gathers of the others, until no rank needs one."""
        while self.take_part(_NONE, _nothing):
            pass

    def take_part(self, mine: int, gather: Callable[[], None]) -> bool:
        """Say which module this rank needs, and take part in all gathers; whether there was any."""
        needed = sorted(set(self._ranks.numbers(mine)) - {_NONE})
        with self._ranks.exchanging():  # memory may run out on one rank, which then repeats its micro-batch
            for index in needed:
                if index == mine:
                    gather()
                else:
                    self._gatherers[index].contribute(self._ranks.size)
        return bool(needed)


def gathers_of(ranks: Ranks) -> Gathers:
    """The gathers of this process group."""
    serving = getattr(BEFORE_WAITING.get(ranks.group), "__self__", None)
    return serving if isinstance(serving, Gathers) else Gathers(ranks)


class _Gather:
    """What fully_shard calls in place of its all-gather (`FSDPModule.set_custom_all_gather`)."""

    def __init__(self, gathers: Gathers, index: int, module: ShardedModule) -> None:
        self._gathers = gathers
        self._index = index
        self._name = module.name or "the model"
        self._weights = module.weights()
        self._checked = False

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        if not self._checked:
            self._check_layout(input_tensor)
        self._gathers.take_part(self._index, lambda: _all_gather(output_tensor, input_tensor, group))

    def contribute(self, ranks: int) -> None:
        """Take part in a gather that other ranks need."""
        source = _flat(self._weights)
        _all_gather(
            source.new_empty(source.numel() * ranks), source, self._weights[0].device_mesh.get_group()
        )

    def _check_layout(self, source: Tensor) -> None:
        """Raise unless fully_shard gathers this module's weights as `contribute` does."""
        expected = _flat(self._weights)
        if expected.dtype != source.dtype or not torch.equal(expected, source):
            raise RuntimeError(
                f"{self._name!r} gathers other values than its own sharded weights: fully_shard was called with "
                "mp_policy or with a list of modules. Use torch.autocast instead of mp_policy, and call fully_shard "
                "for each module (dpkernels.privacy.shard_frozen(model) does so)"
            )
        self._checked = True


def _flat(weights: Sequence[Any]) -> Tensor:
    """This rank's parts of the weights, each padded to the longest rank's, one after another; as bytes if their dtypes
    differ."""
    parts = []
    for weight in weights:
        local = local_part(weight)
        rows = math.ceil(weight.shape[0] / weight.device_mesh.size())
        part = local.new_zeros(rows, *weight.shape[1:])
        part[: local.shape[0]] = local
        parts.append(part.view(-1).to(weight.device_mesh.device_type))
    if len({part.dtype for part in parts}) > 1:
        parts = [part.view(torch.uint8) for part in parts]
    return torch.cat(parts)


def _all_gather(output: Tensor, source: Tensor, group: dist.ProcessGroup) -> None:
    try:
        ALL_GATHER(output, source, group=group)
    except RuntimeError as error:
        raise RanksError(
            "another rank was lost while a sharded weight was gathered. Start the run again, and it resumes from its "
            f"last checkpoint. torch's error: {error}"
        ) from error


def _nothing() -> None:
    """A rank that waits needs no result."""
