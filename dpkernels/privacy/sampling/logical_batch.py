"""A logical batch: the micro-batches that it is split into, and reading them."""

import dis
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np

_UNPACKS = {dis.opmap["UNPACK_SEQUENCE"], dis.opmap["UNPACK_EX"]}


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
