"""The private data loader: the user's DataLoader, its batches replaced by Poisson-sampled logical batches."""

import dis
import math
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NoReturn, Protocol

import numpy as np
from torch.utils.data import DataLoader

from dpkernels.privacy.sampling.own_batch import OwnBatch, form_of, on_devices_of, own_batch

_UNPACKS = {dis.opmap["UNPACK_SEQUENCE"], dis.opmap["UNPACK_EX"]}


class Sampler(Protocol):
    """What draws logical batches."""

    def draw(self) -> np.ndarray:
        """Indices of one logical batch."""
        ...


def micro_batches(
    indices: np.ndarray,
    physical_batch_size: int,
    lengths: np.ndarray | None = None,
    physical_frames: int | None = None,
) -> list[list[int]]:
    """Split a logical batch into micro-batches of at most `physical_batch_size`, of like lengths where these
    are known.

    Longest first: what runs out of memory does so at once. With `physical_frames` a micro-batch also holds at most
    that many frames, padding included (examples × the longest's length), but always one example: short examples go
    together in larger numbers.

    It sees the batch that was drawn and nothing else, puts every example of it into exactly one micro-batch, and is a
    function of the two: what is sampled, and what each example adds to the sum, do not depend on it.
    """
    if lengths is not None:
        # as float64: minus an unsigned number is a large one
        indices = indices[np.argsort(-lengths[indices].astype(np.float64), kind="stable")]
    parts, start = [], 0
    while start < len(indices):
        size = physical_batch_size
        if lengths is not None and physical_frames is not None:
            size = max(1, min(size, physical_frames // max(math.ceil(lengths[indices[start]]), 1)))
        parts.append(indices[start : start + size].tolist())
        start += size
    return parts


class LogicalBatch:
    """One Poisson-sampled batch: `len()` micro-batches, possibly 0, read once by iterating.

    How many examples it holds is not private: see `PrivacyEngine`.

    Attributes:
        parts: the examples of each micro-batch by their index in the data set, in order. NOT PRIVATE.

    Args:
        parts, fetch, collate: the next micro-batch as the workers made it; one as this process makes it.
        attempt: which attempt at the batch this is; optimizer.recover() and zero_grad() begin another.
    """

    def __init__(
        self,
        parts: list[list[int]],
        fetch: Callable[[], Any],
        collate: Callable[[list[int]], Any],
        attempt: Callable[[], int] = lambda: 0,
    ) -> None:
        self.parts = parts
        self._left = len(parts)
        self._fetch = fetch
        self._collate = collate
        self._attempt = attempt
        self._given: set[int] = set()  # in the attempt `_given_in`
        self._given_in = attempt()
        self._started = False

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: Any) -> NoReturn:
        raise TypeError(
            f"logical_batch[{index!r}]: the private loader gives logical batches, each made of micro-batches: write "
            "`for logical_batch in loader: for batch in logical_batch: ...`, and optimizer.step() after the inner loop"
        )

    def collate(self, part: list[int]) -> Any:
        """These examples of the batch as a micro-batch of their own, read anew in this process.

        For parts whose backward failed (see `dpkernels.privacy.back_propagate`): back-propagated beside the one that
        iterating gave, an example would count twice.

        Raises:
            ValueError: indices that this logical batch does not hold; or one that is given twice, or was given before,
                by this or by iterating, and neither optimizer.recover() nor zero_grad() was called since.
        """
        strange = set(part).difference(*self.parts)
        if strange:
            raise ValueError(
                f"LogicalBatch.collate: {sorted(strange)[:5]} are not among this logical batch's examples; only "
                "what was sampled can be processed"
            )
        if len(set(part)) < len(part):
            raise ValueError(
                "LogicalBatch.collate: an example is given twice; it would count twice in the sum, and be accounted "
                "once; give each once"
            )
        repeated = self._given_now().intersection(part)
        if repeated:
            raise ValueError(
                f"LogicalBatch.collate: {sorted(repeated)[:5]} were given already, by collate or by iterating; "
                "back-propagated again, they would count twice in the sum, and be accounted once. After a failure call "
                "optimizer.recover(), which says what is to be done again, or optimizer.zero_grad() and do all parts"
            )
        self._given.update(part)
        return self._collate(part)

    def _given_now(self) -> set[int]:
        """The examples that were given in this attempt."""
        if self._attempt() != self._given_in:
            self._given, self._given_in = set(), self._attempt()
        return self._given

    def __iter__(self) -> Iterator[Any]:
        caller = sys._getframe(1)
        if caller.f_code.co_code[caller.f_lasti] in _UNPACKS:  # for the message's sake
            raise TypeError(
                "`x, y = logical_batch`, or `for x, y in loader`: the private loader gives logical batches, each made "
                "of micro-batches, possibly none, and those are what collate_fn makes. Write\n"
                "    for logical_batch in loader:\n"
                "        for x, y in logical_batch:\n"
                "            optimizer.backward(losses)  # [B], one loss an example\n"
                "        optimizer.step()\n"
                "        optimizer.zero_grad()"
            )
        return self._read()

    def _read(self) -> Iterator[Any]:
        if self._started:
            raise RuntimeError(
                "a logical batch is read once: processing its examples a second time in the same step would "
                "double their contribution. Keep list(logical_batch) if it is needed for anything else."
            )
        self._started = True
        while self._left:
            part = self.parts[len(self.parts) - self._left]
            self._left -= 1
            batch = self._fetch()
            self._given_now().update(part)
            yield batch

    def skip_rest(self) -> None:
        """Read and drop what was not read, so that the workers' queue stays in step."""
        self._started = True
        while self._left:
            self._left -= 1
            self._fetch()


class _Plan:
    """The logical batches of one pass, drawn when first needed: by the prefetching workers or by the training loop.

    What was drawn is handed out, whatever becomes of the pass: draws that an earlier one left unread come first. A pass
    is broken off for reasons that may know of the data, as when reading one of its examples fails, so that leaving out
    what was drawn by then would be another sampling than the one that is accounted for.
    """

    def __init__(
        self,
        sampler: Sampler,
        steps: int,
        split: Callable[[np.ndarray], list[list[int]]],
        unread: deque[list[list[int]]],
    ) -> None:
        self._sampler = sampler
        self._split = split
        self._left_over = list(unread)
        self._to_draw = steps - len(unread)
        self._unread = unread

    def feed(self) -> Iterator[list[int]]:
        """All micro-batches of the pass in order: what torch's DataLoader pulls, ahead of the training
        loop."""
        for parts in self._left_over:
            yield from parts
        while self._to_draw > 0:
            yield from self._draw()

    def _draw(self) -> list[list[int]]:
        self._to_draw -= 1
        parts = self._split(self._sampler.draw())
        self._unread.append(parts)
        return parts

    def next_parts(self, read_ahead: Callable[[], None]) -> list[list[int]]:
        """The micro-batches of the next logical batch, as indices; it stays the next one until `hand_out`."""
        while not self._unread:
            read_ahead()
        return self._unread[0]

    def hand_out(self) -> None:
        """The next logical batch is given to the training loop."""
        self._unread.popleft()


class DPDataLoader:
    """Iterates Poisson-sampled logical batches over the user's dataset.

    Each item is a `LogicalBatch` of micro-batches of at most `physical_batch_size` examples, made by the
    user's `collate_fn` and workers. An empty logical batch is a step like any other: call `optimizer.step()`
    for it too.

    Args:
        data_loader: the user's; its batch_size is the expected batch size.
        sampler: draws the indices of a logical batch.
        physical_batch_size: largest micro-batch.
        epoch_steps: logical batches in one pass.
        total_steps: where given, one pass runs from the steps already taken to this total.
        lengths: sizes of the examples [N]; micro-batches then hold examples of like sizes.
        physical_frames: largest micro-batch in those sizes, padding included.
        before_pass: called when a pass begins; raises where it may not.
        on_batch: told of each logical batch before it is handed out: its examples.
        attempt: see `LogicalBatch`.
        steps_taken: how many steps the run has behind it.
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
        physical_frames: int | None = None,
        before_pass: Callable[[], None],
        on_batch: Callable[[int], None],
        steps_taken: Callable[[], int],
        attempt: Callable[[], int] = lambda: 0,
    ) -> None:
        self.dataset = data_loader.dataset
        self.batch_size = data_loader.batch_size
        self.collate_fn = data_loader.collate_fn
        self.physical_batch_size = physical_batch_size
        self.physical_frames = physical_frames
        self.epoch_steps = epoch_steps
        self.total_steps = total_steps
        self._sampler = sampler
        self._lengths = None if lengths is None else np.asarray(lengths)
        self._before_pass = before_pass
        self._on_batch = on_batch
        self._attempt = attempt
        self._steps_taken = steps_taken
        self._plan: _Plan | None = None
        self._unread: deque[list[list[int]]] = deque()
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
            # Not the given one: workers would draw augmentations from a seed that is known.
            generator=None,
            prefetch_factor=data_loader.prefetch_factor,
            persistent_workers=data_loader.persistent_workers,
        )

    def __len__(self) -> int:
        """Logical batches in one pass: round(1/q), or `steps` where make_private was given it."""
        return self.epoch_steps if self.total_steps is None else self.total_steps

    def __iter__(self) -> Iterator[LogicalBatch]:
        """A pass: logical batches, each drawn once and to be stepped on once.

        A pass may be left after a step, and another begun, which goes on with what was drawn; the iterator of the one
        before it then ends with an error, since the workers serve one pass at a time.

        Raises:
            RuntimeError: a logical batch that was handed out got no step().
        """
        self._before_pass()
        steps = self.epoch_steps
        if self.total_steps is not None:
            steps = max(self.total_steps - self._steps_taken(), 0)
        plan = _Plan(self._sampler, steps, self._split, self._unread)
        self._plan = plan
        batches = iter(self._loader)
        ahead: deque[Any] = deque()

        def check_current() -> None:
            if self._plan is not plan:
                raise RuntimeError(
                    "another pass over this loader was begun since, and what was drawn goes on there: its workers "
                    "serve one pass at a time. Use one iterator, `for logical_batch in loader:`, and leave it before "
                    "the next"
                )

        def fetch() -> Any:
            check_current()
            return ahead.popleft() if ahead else next(batches)

        def read_ahead() -> None:
            # Reading one micro-batch makes the loader draw at least to the logical batch it belongs to; past
            # the last micro-batch it draws whatever empty logical batches are left.
            with suppress(StopIteration):
                ahead.append(next(batches))

        for _ in range(steps):
            check_current()
            parts = plan.next_parts(read_ahead)
            self._on_batch(sum(map(len, parts)))
            plan.hand_out()
            batch = LogicalBatch(parts, fetch, self._read, self._attempt)
            yield batch
            batch.skip_rest()

    def own_batch(self, *, like: Any = None, examples: int = 3) -> OwnBatch | str:
        """Examples of the data set as the self-check asks them, of the form of `like` and on its devices where one is
        given; or, in words, what cannot be asked so."""
        if self.physical_batch_size == 1 and like is not None:
            return "beside longer examples: a micro-batch holds one example, and nothing pads it"
        own = own_batch(self.dataset, self.collate_fn, lengths=self._lengths, examples=max(examples, 2))
        if isinstance(own, str) or like is None:
            return own
        if form_of(own.batch) != form_of(like):
            return (
                f"what padding does: the loader's batches ({form_of(own.batch)}) are of another form than the one "
                f"given ({form_of(like)}), whose examples cannot be collated alone. Leave the batch out, with a "
                "loss_fn that takes what the loader yields, or give singles"
            )
        return replace(
            own,
            batch=on_devices_of(own.batch, like),
            singles=[on_devices_of(single, like) for single in own.singles],
        )

    def _read(self, part: list[int]) -> Any:
        """A micro-batch as the workers make it, in this process."""
        together = getattr(self.dataset, "__getitems__", None)  # as torch's own fetcher does
        return self.collate_fn(together(part) if together else [self.dataset[index] for index in part])

    def _split(self, indices: np.ndarray) -> list[list[int]]:
        return micro_batches(indices, self.physical_batch_size, self._lengths, self.physical_frames)


class _Feed:
    """The batch sampler that torch's DataLoader sees: the micro-batches of the pass under way."""

    def __init__(self, owner: DPDataLoader) -> None:
        self._owner = owner

    def __iter__(self) -> Iterator[list[int]]:
        plan = self._owner._plan
        assert plan is not None  # set by DPDataLoader.__iter__ before it iterates the inner loader
        return plan.feed()
