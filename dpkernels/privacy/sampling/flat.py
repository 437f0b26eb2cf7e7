"""The loader's part of a flat loop: the micro-batches of all logical batches, one after the other."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from dpkernels.privacy.sampling.logical_batch import LogicalBatch


class FlatSteps(Protocol):
    """What a flat loop does within and between logical batches: the optimizer's `FlatLoop`."""

    def begin(self, after_step: Callable[[], object] | None) -> None:
        """Begin a flat pass."""
        ...

    def take_back(self) -> bool:
        """Close a logical batch whose loop was left before its step."""
        ...

    def give(self, examples: int) -> None:
        """Note that a micro-batch is handed out."""
        ...

    def check_processed(self) -> None:
        """Raise unless every micro-batch that was handed out is in the sums."""
        ...

    def check_closed(self) -> None:
        """Raise unless the logical batch got its step."""
        ...

    def check_rates(self) -> None:
        """Raise if the loop's body changed the learning rate."""
        ...

    def step(self) -> object:
        """Take the step of an empty logical batch."""
        ...


def flatten(batches: Iterable[LogicalBatch], steps: FlatSteps) -> Iterator[Any]:
    """The micro-batches of these logical batches; an empty one gets its step here.

    Raises RuntimeError when the next micro-batch is asked for before this one was back-propagated, or the next logical
    batch before the last one's step, and if the learning rate was changed meanwhile.
    """
    for logical_batch in batches:
        for part, batch in zip(logical_batch.parts, logical_batch, strict=True):
            steps.give(len(part))
            yield batch
            steps.check_processed()
            steps.check_rates()
        if not logical_batch.parts:
            steps.step()
        steps.check_closed()
