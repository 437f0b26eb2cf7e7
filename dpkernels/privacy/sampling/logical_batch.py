"""A logical batch: splitting it into micro-batches, and reading these."""

import dis
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np

from dpkernels.deprecation import renamed_argument
from dpkernels.privacy.sampling.units import Units

_UNPACKS = {dis.opmap["UNPACK_SEQUENCE"], dis.opmap["UNPACK_EX"]}


def micro_batches(
    indices: np.ndarray,
    physical_batch_size: int,
    lengths: np.ndarray | None = None,
    max_padded_frames: int | None = None,
    *,
    physical_frames: int | None = None,
) -> list[list[int]]:
    """Split a logical batch into micro-batches of at most `physical_batch_size`, of similar lengths if these are known.

    The longest examples come first, so that a lack of memory shows at once. With `max_padded_frames` a micro-batch also
    holds at most that many frames, padding included (number of examples × length of the longest), but at least one
    example: a micro-batch of short examples holds more of them.

    The split depends only on the drawn batch and the lengths, and puts every example into exactly one micro-batch. It
    changes neither the sampling nor the contribution of an example to the sum. `physical_frames` is the deprecated name
    of `max_padded_frames`.
    """
    max_padded_frames = renamed_argument(
        "physical_frames", physical_frames, "max_padded_frames", max_padded_frames
    )
    if lengths is not None:
        # As float64, since the negative of an unsigned number is a large positive one.
        indices = indices[np.argsort(-lengths[indices].astype(np.float64), kind="stable")]
    parts, start = [], 0
    while start < len(indices):
        size = physical_batch_size
        if lengths is not None and max_padded_frames is not None:
            size = max(1, min(size, max_padded_frames // max(math.ceil(lengths[indices[start]]), 1)))
        parts.append(indices[start : start + size].tolist())
        start += size
    return parts


class LogicalBatch:
    """One Poisson-sampled batch: `len()` micro-batches, possibly 0, read once by iterating.

    Its number of examples is NOT PRIVATE.

    Attributes:
        parts: the examples of each micro-batch by their index in the data set, in order. NOT PRIVATE.

    Args:
        parts: as above.
        fetch: returns the next micro-batch from the workers.
        collate: collates the examples of these indices in this process.
        attempt: returns the number of the attempt at the batch; optimizer.recover() and zero_grad() change it.
        units: the speakers, where they are clipped as speakers; every micro-batch then holds whole ones.
        announce: called before a micro-batch is handed out, with its number of examples and that of each speaker in it.
    """

    def __init__(
        self,
        parts: list[list[int]],
        fetch: Callable[[], Any],
        collate: Callable[[list[int]], Any],
        attempt: Callable[[], int] = lambda: 0,
        units: Units | None = None,
        announce: Callable[[int, int], None] = lambda examples, unit: None,
    ) -> None:
        self.parts = parts
        self._units = units
        self._drawn = {} if units is None else units.drawn(parts)
        self._announce = announce
        self._remaining = len(parts)
        self._fetch = fetch
        self._collate = collate
        self._attempt = attempt
        self._given: set[int] = set()  # in the attempt `_given_attempt`
        self._given_attempt = attempt()
        self._started = False

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: Any) -> NoReturn:
        raise TypeError(
            f"logical_batch[{index!r}]: the private loader yields logical batches, which consist of micro-batches: "
            "write `for logical_batch in loader: for batch in logical_batch: ...`, and call optimizer.step() after the "
            "inner loop"
        )

    def collate(self, part: list[int]) -> Any:
        """A micro-batch of these examples of the logical batch, read again in this process.

        Use it for parts whose backward failed (see `dpkernels.privacy.back_propagate`). An example that is
        back-propagated both from here and from iterating would count twice.

        Raises:
            ValueError: an index that is not in this logical batch; an index given twice, or returned before by this
                method or by iterating without a call of optimizer.recover() or zero_grad() since; a part of a
                speaker, where speakers are clipped as speakers.
        """
        unknown = set(part).difference(*self.parts)
        if unknown:
            raise ValueError(
                f"LogicalBatch.collate: {sorted(unknown)[:5]} are not among this logical batch's examples; only "
                "sampled examples can be processed"
            )
        if len(set(part)) < len(part):
            raise ValueError(
                "LogicalBatch.collate: an example is given twice; it would count twice in the sum and once in ε; "
                "give each once"
            )
        repeated = self._given_in_attempt().intersection(part)
        if repeated:
            raise ValueError(
                f"LogicalBatch.collate: {sorted(repeated)[:5]} were given already, by collate or by iterating; "
                "back-propagated again, they would count twice in the sum and once in ε. After a failure call "
                "optimizer.recover(), which returns whether all parts are to be repeated, or optimizer.zero_grad() "
                "and repeat all parts"
            )
        unit = self.unit_of(part)
        self._given.update(part)
        batch = self._collate(part)
        self._announce(len(part), unit)
        return batch

    def unit_of(self, part: list[int]) -> int:
        """The number of examples that are clipped together in this part: 1, or those that each speaker has.

        Raises:
            ValueError: speakers are clipped as speakers, and the part does not hold whole ones, equally many of each.
        """
        return 1 if self._units is None else self._units.size_of(part, self._drawn)

    def _given_in_attempt(self) -> set[int]:
        """The examples that were handed out in this attempt."""
        if self._attempt() != self._given_attempt:
            self._given, self._given_attempt = set(), self._attempt()
        return self._given

    def __iter__(self) -> Iterator[Any]:
        caller = sys._getframe(1)
        if caller.f_code.co_code[caller.f_lasti] in _UNPACKS:  # only for a clearer message
            raise TypeError(
                "`x, y = logical_batch`, or `for x, y in loader`: the private loader yields logical batches, which "
                "consist of micro-batches, possibly none; collate_fn makes the micro-batches. Write\n"
                "    for logical_batch in loader:\n"
                "        for x, y in logical_batch:\n"
                "            optimizer.backward(losses)  # [B], one loss for each example\n"
                "        optimizer.step()\n"
                "        optimizer.zero_grad()"
            )
        return self._read()

    def _read(self) -> Iterator[Any]:
        if self._started:
            raise RuntimeError(
                "a logical batch can only be read once: processing its examples a second time in the same step would "
                "double their contribution. Keep list(logical_batch) if you need it for anything else."
            )
        self._started = True
        while self._remaining:
            part = self.parts[len(self.parts) - self._remaining]
            self._remaining -= 1
            batch = self._fetch()
            self._given_in_attempt().update(part)
            self._announce(len(part), self.unit_of(part))
            yield batch

    def skip_rest(self) -> None:
        """Read and drop the remaining micro-batches, so that the workers' queue stays aligned."""
        self._started = True
        while self._remaining:
            self._remaining -= 1
            self._fetch()
