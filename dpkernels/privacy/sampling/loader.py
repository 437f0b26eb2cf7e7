"""The private data loader: the user's DataLoader with Poisson-sampled logical batches in place of its batches."""

import hashlib
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch.utils.data import DataLoader

from dpkernels.deprecation import renamed_argument, warn_renamed
from dpkernels.privacy.ranks.pieces import share
from dpkernels.privacy.sampling.canaries import present_part
from dpkernels.privacy.sampling.flat import FlatSteps, flatten
from dpkernels.privacy.sampling.logical_batch import LogicalBatch, micro_batches
from dpkernels.privacy.sampling.own_batch import OwnBatch, form_of, on_devices_of, own_batch
from dpkernels.privacy.sampling.units import Units


class Sampler(Protocol):
    """Draws logical batches."""

    def draw(self) -> np.ndarray:
        """Indices of one logical batch."""
        ...


class _Planned(NamedTuple):
    """A drawn logical batch: this process's micro-batches of it as indices, and of all of it size and digest."""

    parts: list[list[int]]
    drawn: int
    digest: int


class _Plan:
    """The logical batches of one pass, drawn when first needed: by the prefetching workers or by the training loop.

    Every drawn batch is handed out, also if its pass ends early: the next pass begins with the unread draws. The reason
    for an early end may depend on the data, for example if reading an example fails. Dropping the drawn batches would
    then change the sampling that ε accounts for.
    """

    def __init__(
        self,
        sampler: Sampler,
        steps: int,
        split: Callable[[np.ndarray], _Planned],
        unread: deque[_Planned],
    ) -> None:
        self._sampler = sampler
        self._split = split
        self._leftover = list(unread)
        self._to_draw = steps - len(unread)
        self._unread = unread

    def feed(self) -> Iterator[list[int]]:
        """All micro-batches of the pass in order. torch's DataLoader reads them ahead of the training loop."""
        for batch in self._leftover:
            yield from batch.parts
        while self._to_draw > 0:
            yield from self._draw().parts

    def _draw(self) -> _Planned:
        self._to_draw -= 1
        batch = self._split(self._sampler.draw())
        self._unread.append(batch)
        return batch

    def next_batch(self, read_ahead: Callable[[], None]) -> _Planned:
        """The next logical batch; it remains the next one until `hand_out`."""
        while not self._unread:
            read_ahead()
        return self._unread[0]

    def hand_out(self) -> None:
        """Remove the next logical batch: the training loop gets it."""
        self._unread.popleft()


class DPDataLoader:
    """Iterates Poisson-sampled logical batches over the user's dataset.

    Each item is a `LogicalBatch` of micro-batches of at most `physical_batch_size` examples from the user's
    `collate_fn` and workers. An empty logical batch needs a step like any other: call `optimizer.step()` for it
    too.

    Args:
        data_loader: the user's; its batch_size is the expected batch size.
        sampler: draws the indices of a logical batch.
        physical_batch_size: largest micro-batch.
        epoch_steps: logical batches in one pass.
        total_steps: if given, one pass runs from the steps already taken to this total.
        lengths: sizes of the examples [N]; micro-batches then hold examples of similar sizes.
        max_padded_frames: largest micro-batch in the unit of `lengths`, padding included. physical_frames: its
            deprecated name.
        before_pass: called when a pass begins; raises if it must not begin.
        on_batch: called before each logical batch is handed out, with the number of its examples that this process
            gets, and `drawn` and `digest` (of all its examples).
        rank, ranks: this process's number, and the number of processes that share each logical batch.
        attempt: see `LogicalBatch`.
        steps_taken: returns the number of steps taken so far.
        units: the speakers, if they are clipped as speakers. announce: see `LogicalBatch`.
        flat_steps: the optimizer's part of a flat loop; without it `flat` raises.
    """

    def __init__(
        self,
        data_loader: DataLoader,
        sampler: Sampler,
        *,
        physical_batch_size: int,
        epoch_steps: int,
        total_steps: int | None = None,
        lengths: Sequence[int] | np.ndarray | None = None,
        max_padded_frames: int | None = None,
        physical_frames: int | None = None,
        before_pass: Callable[[], None],
        on_batch: Callable[..., None],
        steps_taken: Callable[[], int],
        attempt: Callable[[], int] = lambda: 0,
        rank: int = 0,
        ranks: int = 1,
        units: Units | None = None,
        announce: Callable[[int, int], None] = lambda examples, unit: None,
        flat_steps: FlatSteps | None = None,
    ) -> None:
        self.dataset = data_loader.dataset
        self.batch_size = data_loader.batch_size
        self.collate_fn = data_loader.collate_fn
        self.physical_batch_size = physical_batch_size
        self.max_padded_frames = renamed_argument(
            "physical_frames", physical_frames, "max_padded_frames", max_padded_frames
        )
        self.epoch_steps = epoch_steps
        self.total_steps = total_steps
        self._sampler = sampler
        self._lengths = None if lengths is None else np.asarray(lengths)
        self._before_pass = before_pass
        self._on_batch = on_batch
        self._attempt = attempt
        self._rank, self._ranks = rank, ranks
        self._units, self._announce = units, announce
        self._steps_taken = steps_taken
        self._plan: _Plan | None = None
        self._unread: deque[_Planned] = deque()
        self._flat_steps = flat_steps
        self._unfinished: _Planned | None = None  # the logical batch that a flat loop has begun
        if any(getattr(part, "generator", None) is not None for part in (data_loader, data_loader.sampler)):
            warnings.warn(
                "data_loader: its generator is not used. The batches are drawn with a secret key, and the workers' "
                "seeds are secret, too: draws that follow from a known seed have no privacy. Leave generator= out (in "
                "a test PrivacyEngine(noise_key=...) fixes sampling and noise)",
                stacklevel=4,
            )
        feed = _Feed(self)
        workers = data_loader.num_workers
        self._loader = DataLoader(
            data_loader.dataset,
            batch_sampler=feed,
            collate_fn=data_loader.collate_fn,
            num_workers=workers,
            pin_memory=data_loader.pin_memory,
            timeout=data_loader.timeout,
            worker_init_fn=data_loader.worker_init_fn,
            multiprocessing_context=data_loader.multiprocessing_context if workers else None,
            # The user's generator would give the workers' augmentation a known seed.
            generator=None,
            prefetch_factor=data_loader.prefetch_factor,
            persistent_workers=data_loader.persistent_workers,
        )

    def __len__(self) -> int:
        """Logical batches in a pass that begins now: round(1/q), or the rest of `steps` if make_private was given it.

        A schedule over the whole run, also one that is resumed, takes `total_steps`.
        """
        return self.epoch_steps if self.total_steps is None else self._steps_to_go(self.total_steps)

    def _steps_to_go(self, total: int) -> int:
        return max(total - self._steps_taken(), 0)

    @property
    def physical_frames(self) -> int | None:
        """The deprecated name of `max_padded_frames`."""
        warn_renamed("DPDataLoader.physical_frames", "max_padded_frames")
        return self.max_padded_frames

    def __iter__(self) -> Iterator[LogicalBatch]:
        """One pass over logical batches. Each is drawn once, and optimizer.step() must be called once for each.

        A pass may be left after a step. The next pass continues with the batches already drawn, and the iterator of the
        previous pass raises an error, since the workers serve one pass at a time.

        Raises:
            RuntimeError: step() was not called for a logical batch that was handed out.
        """
        return self._pass()

    def flat(self, *, after_step: Callable[[], object] | None = None) -> Iterator[Any]:
        """One pass over the micro-batches of all logical batches, for a loop of one level:

            for x, y in loader.flat():
                optimizer.backward(losses_of(x, y))  # [B]
                optimizer.step()  # acts at the end of a logical batch, does nothing before
                optimizer.zero_grad()  # the same

        An empty logical batch has no micro-batch: the loop takes its step itself. If the loop is left within a logical
        batch (a break, an exception), nothing of that batch is released, and the next pass begins with it again.

        Args:
            after_step: called after each step that was taken, those of empty logical batches included:
                `scheduler.step`. The loop's body must not change the learning rate, since it runs once for each
                micro-batch, and their number is not private.

        Raises:
            RuntimeError: a micro-batch was not back-propagated, step() was not called, or the body changed the learning
                rate; this loader has no optimizer.
        """
        if self._flat_steps is None:
            raise RuntimeError("flat: only the loader that make_private returned can be iterated so")
        return flatten(self._pass(self._flat_steps, after_step), self._flat_steps)

    def _pass(
        self, flat: FlatSteps | None = None, after_step: Callable[[], object] | None = None
    ) -> Iterator[LogicalBatch]:
        """One pass; flat: the optimizer's part of it, if it is a flat loop's."""
        if self._unfinished is not None and self._flat_steps is not None and self._flat_steps.take_back():
            self._unread.appendleft(self._unfinished)
        self._unfinished = None
        self._before_pass()
        if flat is not None:
            flat.begin(after_step)
        steps = len(self)
        plan = _Plan(self._sampler, steps, self._split, self._unread)
        self._plan = plan
        batches = iter(self._loader)
        ahead: deque[Any] = deque()

        def check_current() -> None:
            if self._plan is not plan:
                raise RuntimeError(
                    "another pass over this loader was begun since, and it continues with the batches already drawn: "
                    "the workers serve one pass at a time. Use one iterator, `for logical_batch in loader:`, and leave "
                    "it before the next"
                )

        def fetch() -> Any:
            check_current()
            return ahead.popleft() if ahead else next(batches)

        def read_ahead() -> None:
            # Reading a micro-batch makes the inner loader draw up to the logical batch that contains it; after the
            # last micro-batch it draws the remaining, empty logical batches.
            with suppress(StopIteration):
                ahead.append(next(batches))

        for _ in range(steps):
            check_current()
            planned = plan.next_batch(read_ahead)
            parts = planned.parts
            self._on_batch(sum(map(len, parts)), drawn=planned.drawn, digest=planned.digest)
            plan.hand_out()
            self._unfinished = None if flat is None else planned
            batch = LogicalBatch(parts, fetch, self._read, self._attempt, self._units, self._announce)
            yield batch
            self._unfinished = None
            batch.skip_rest()

    def own_batch(self, *, like: Any = None, examples: int = 3) -> OwnBatch | str:
        """A batch of the data set's examples for the self-check, of the form of `like` and on its devices if given.

        Returns a sentence that names the check that is not possible, and the reason, if there is no such batch.
        """
        if self.physical_batch_size == 1 and like is not None:
            return "examples beside longer ones: a micro-batch holds one example, which nothing pads"
        dataset, lengths = present_part(self.dataset, self._lengths)
        collated = own_batch(dataset, self.collate_fn, lengths=lengths, examples=max(examples, 2))
        if isinstance(collated, str) or like is None:
            return collated
        if form_of(collated.batch) != form_of(like):
            return (
                f"the effect of padding: the loader's batches ({form_of(collated.batch)}) have another form than the "
                f"given batch ({form_of(like)}), whose examples cannot be collated alone. Leave the batch out, with a "
                "loss_fn that takes the loader's batches, or give singles"
            )
        return replace(
            collated,
            batch=on_devices_of(collated.batch, like),
            singles=[on_devices_of(single, like) for single in collated.singles],
        )

    def _read(self, part: list[int]) -> Any:
        """Read a micro-batch in this process, as the workers do."""
        get_items = getattr(self.dataset, "__getitems__", None)  # torch's own fetcher does the same
        return self.collate_fn(get_items(part) if get_items else [self.dataset[index] for index in part])

    def _split(self, indices: np.ndarray) -> _Planned:
        if self._ranks == 1:
            mine, digest = indices, 0
        else:
            mine = self._mine(indices)
            digest = int.from_bytes(hashlib.sha256(indices.astype("<i8").tobytes()).digest()[:8], "little")
        split = micro_batches if self._units is None else self._units.micro_batches
        parts = split(mine, self.physical_batch_size, self._lengths, self.max_padded_frames)
        return _Planned(parts, len(indices), digest)

    def _mine(self, indices: np.ndarray) -> np.ndarray:
        """This rank's examples of a drawn batch."""
        if self._units is not None:
            return self._units.share(indices, self._lengths, self._ranks)[self._rank]
        weights = np.ones(len(indices)) if self._lengths is None else self._lengths[indices]
        mine: np.ndarray = indices[share(weights.tolist(), self._ranks)[self._rank]]
        return mine


class _Feed:
    """The batch sampler of the inner DataLoader: the micro-batches of the current pass."""

    def __init__(self, owner: DPDataLoader) -> None:
        self._owner = owner

    def __iter__(self) -> Iterator[list[int]]:
        plan = self._owner._plan
        assert plan is not None  # set by DPDataLoader.__iter__ before it iterates the inner loader
        return plan.feed()
