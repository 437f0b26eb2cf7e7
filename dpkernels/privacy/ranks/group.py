"""The processes of one private run, and the few facts that they tell one another besides gradients and parameters."""

import hashlib
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist

from dpkernels.errors import UserError

T = TypeVar("T")

# Operations in which all ranks must meet. A rank that enters another one is reported by name.
SET_UP, STEP, STATE, LOAD = "make_private", "optimizer.step", "optimizer.state_dict", "load_state_dict"
SHARD, WAIT = "shard_frozen", "wait_for_ranks"
_OPERATIONS = (SET_UP, STEP, STATE, LOAD, SHARD, WAIT)
_HINTS = {
    SET_UP: "Start every rank with the same script, data, arguments and versions, and build the model after "
    "torch.manual_seed, with one seed for all",
    STEP: "Every rank has to take each logical batch of the loader, and call step() once for it",
    STATE: "Call it at the same step on every rank",
    LOAD: "Load the same checkpoint on every rank",
    SHARD: "Load the same weights on every rank, and choose the same trained parameters, before the model is sharded",
}


BEFORE_WAITING: "WeakKeyDictionary[Any, Callable[[], None]]" = WeakKeyDictionary()
"""By process group, what a process does before it waits for the others of it, until all wait: see `gathers`."""

_BROKEN: "WeakSet[Any]" = WeakSet()
"""Process groups in which this process left an exchange before its end: see `Ranks.exchanging`."""


_FORKED = (
    "this process was forked from a process of a run on several: it is none of them. Train in the processes that "
    "torchrun started"
)


class RanksError(UserError, RuntimeError):
    """The processes of a run do not agree, or one of them failed; the message says whether a step was counted."""


class Ranks:
    """The processes of a run. One process, without torch.distributed, is the case of size 1, in which nothing is sent.

    Facts travel between CPUs, so that no GPU has to be synchronised for them; gradients and parameters travel over the
    group's backend for their device. A group of NCCL alone gets a gloo group of the same processes beside it.

    Args:
        group: the process group; None for one process.

    Attributes:
        rank: this process's number within the group.
        size: number of processes.
        group: the group that gradients and parameters travel over, or None.
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self._pid = os.getpid()
        self._facts: dist.ProcessGroup | None = None
        if group is not None and self.size > 1:
            members = dist.get_process_group_ranks(group)
            self._first = members[0]
            self._facts = group if torch.device("cpu") in group._device_types else _over_cpus(group, members)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("Ranks belongs to a process group and is never pickled or copied")

    @property
    def is_first(self) -> bool:
        """Whether this process is rank 0, which draws the sampling key and writes the ledger."""
        return self.rank == 0

    def check_unchanged(self) -> None:
        """Raise RuntimeError if the process group is not that of make_private: torch.distributed was initialised,
        ended or initialised again since, or this process was forked."""
        if self.size == 1:
            if self.group is None:
                check_joined(None)
            return
        if os.getpid() != self._pid:
            raise RuntimeError(_FORKED)
        alive = dist.is_initialized() and dist.get_rank(self.group) == self.rank
        if not alive or dist.get_world_size(self.group) != self.size:
            raise RuntimeError(
                f"the process group changed since make_private, which ran on {self.size} processes: sampling, divisor "
                "and noise belong to these. Start the run again; it resumes from its last checkpoint"
            )

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """An exchange that the other ranks wait for: after an exception within it, this process sends nothing more.

        The others still wait for this rank's part of it. They would take whatever it sends next for that part (gloo
        accepts a message that is too short, and ends the process at one that is too long), so that they have to reach
        their timeout instead.

        Raises:
            RanksError: an earlier exchange was left, or this process was forked from the one that joined the group.
        """
        if self.size == 1:
            yield
            return
        if os.getpid() != self._pid:
            raise RanksError(_FORKED)
        if self.group in _BROKEN:
            raise RanksError(
                f"rank {self.rank} left an earlier exchange with the other ranks before its end, and exchanges nothing "
                "more: start the run again; it resumes from its last checkpoint"
            )
        try:
            yield
        except BaseException:
            _BROKEN.add(self.group)
            raise

    @contextmanager
    def meeting(self, operation: str, facts: Callable[[], Mapping[str, Any]] = dict) -> Iterator[None]:
        """Meet all ranks after the checks in this block; an exception that one rank's block raises ends all of them.

        Args:
            operation: one of those above.
            facts: what must be equal on all ranks, by name; read after the block.

        Raises:
            Exception: what the block raised, on the rank whose block raised it.
            RanksError: another rank's block raised; ranks are in different operations, or their facts differ.
        """
        if self.size == 1:
            yield
            return
        error: Exception | None = None
        values: Mapping[str, Any] = {}
        try:
            yield
            values = facts()
        except Exception as refusal:  # noqa: BLE001  every rank has to learn of it, whatever it is
            error = refusal
        self._agree(operation, error, values)

    def _agree(self, operation: str, error: Exception | None, facts: Mapping[str, Any]) -> None:
        digest = int.from_bytes(hashlib.sha256(repr(sorted(facts.items())).encode()).digest()[:7], "little")
        mine = torch.tensor([_OPERATIONS.index(operation), int(error is not None), digest])
        all_ranks = torch.empty(self.size, len(mine), dtype=torch.int64)
        self._told(dist.all_gather, list(all_ranks), mine)
        operations, refused, digests = all_ranks.T.tolist()
        if len(set(operations)) > 1:
            where = ", ".join(f"rank {r} in {_OPERATIONS[o]}" for r, o in enumerate(operations))
            raise RanksError(
                f"the ranks are in different operations: {where}. Every rank has to call each of "
                f"{', '.join(_OPERATIONS)} as often as the others, and in the same order: take it out of `if rank == 0`"
            )
        if any(refused):
            self._refuse(operation, error, refused)
        if len(set(digests)) > 1:
            self.check_same(operation, facts)
            raise RanksError(
                f"{operation}: the ranks' facts have other digests. Nothing was released. {_HINTS[STEP]}"
            )

    def _refuse(self, operation: str, error: Exception | None, refused: list[int]) -> NoReturn:
        said: list[Any] = [None] * self.size
        self._told(
            dist.all_gather_object, said, None if error is None else f"{type(error).__name__}: {error}"
        )
        if error is not None:
            raise error
        reasons = "; ".join(f"rank {rank}: {said[rank]}" for rank, no in enumerate(refused) if no)
        raise RanksError(f"{operation} was refused on another rank, and so on this one: {reasons}")

    def first(self, function: Callable[[], T]) -> T:
        """The result of `function` on rank 0, where alone it is called; its exception is raised on every rank.

        The result is pickled.
        """
        if self.size == 1:
            return function()
        told: list[Any] = [None]
        failure: Exception | None = None
        with self.exchanging():  # an interrupt may come while the others wait for the result
            if self.is_first:
                try:
                    told = [(True, function())]
                except Exception as error:  # noqa: BLE001  as above
                    failure, told = error, [(False, _sendable(error))]
            self._told(dist.broadcast_object_list, told, self._first)
        if failure is not None:
            raise failure
        succeeded, result = told[0]
        if not succeeded:
            raise result
        return result

    def check_same(self, operation: str, facts: Mapping[str, Any]) -> None:
        """Raise RanksError, on every rank, naming what differs between this rank's facts and those of another."""
        by_rank = self.gathered(dict(facts))
        names = {name: None for facts_of_rank in by_rank for name in facts_of_rank}
        absent = object()
        differing = [n for n in names if any(f.get(n, absent) != by_rank[0].get(n, absent) for f in by_rank)]
        if differing:
            shown = "; ".join(
                f"{name}: "
                + ", ".join(f"{f.get(name, 'none')!s:.60} on rank {r}" for r, f in enumerate(by_rank))
                for name in differing[:5]
            )
            more = f"; and {len(differing) - 5} more" if len(differing) > 5 else ""
            raise RanksError(
                f"{operation}: the ranks differ in what must be the same on all ({shown}{more}). Nothing was released. "
                f"{_HINTS[operation]}"
            )

    def gathered(self, value: T) -> list[T]:
        """The value of every rank, by rank. They are pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        self._told(dist.all_gather_object, values, value)
        return values

    def numbers(self, mine: int) -> list[int]:
        """The number of every rank, by rank; `BEFORE_WAITING` is not called."""
        all_ranks = torch.empty(self.size, 1, dtype=torch.int64)
        self._sent(dist.all_gather, list(all_ranks), torch.tensor([mine]))
        numbers: list[int] = all_ranks.flatten().tolist()
        return numbers

    def _told(self, collective: Callable[..., Any], *arguments: Any) -> None:
        if self.group in BEFORE_WAITING:
            BEFORE_WAITING[self.group]()
        self._sent(collective, *arguments)

    def _sent(self, collective: Callable[..., Any], *arguments: Any) -> None:
        with self.exchanging():
            try:
                collective(*arguments, group=self._facts)
            except RuntimeError as error:
                raise RanksError(
                    f"rank {self.rank} lost the others: one of them ended, or none answered for "
                    f"{timeout_of(self._facts).total_seconds():.0f} s (the timeout of init_process_group). Start the "
                    f"run again; it resumes from its last checkpoint. torch's error: {error}"
                ) from error


def _sendable(error: Exception) -> Exception:
    """The error itself, or its message if it does not survive pickling: every rank must get one of them."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  an exception's own code is called
        return RanksError(f"{type(error).__name__} on rank 0: {error}")
    return error


def ranks_of(group: "dist.ProcessGroup | None") -> Ranks:
    """The processes of a run: those of `group`, by default all that torch.distributed runs.

    Raises:
        RuntimeError: torchrun started several processes, but torch.distributed is not initialised.
        ValueError: this process is not in the group.
    """
    if group is None:
        if not (dist.is_available() and dist.is_initialized()):
            started = int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1
            if started > 1:
                raise RuntimeError(
                    f"torchrun started {started} processes, and torch.distributed is not initialised: each would train "
                    "a model of its own. Call dpkernels.privacy.join_processes() first, or init_process_group() of "
                    "torch.distributed"
                )
            return Ranks()
        group = dist.group.WORLD
    check_joined(group)
    return (
        Ranks(group)
        if dist.get_world_size(group) > 1
        else Ranks(None if group is dist.group.WORLD else group)
    )


def check_joined(group: "dist.ProcessGroup | None") -> None:
    """Raise unless this process is in `group`; for None, unless torch.distributed runs at most one process."""
    if group is None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError(
                f"torch.distributed runs {dist.get_world_size()} processes, and did not when make_private was called: "
                "each would take a step of its own. Call init_process_group() before make_private"
            )
    elif dist.get_rank(group) < 0:
        raise ValueError("process_group: this process is not in it; call make_private in its processes only")


def _over_cpus(group: Any, members: list[int]) -> Any:
    everyone = len(members) == dist.get_world_size()
    return dist.new_group(
        members, timeout=timeout_of(group), backend="gloo", use_local_synchronization=not everyone
    )


def timeout_of(group: Any) -> timedelta:
    """How long an operation of this group waits for the other ranks before it fails."""
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        if options is not None:
            return options._timeout
    return dist.constants.default_pg_timeout
