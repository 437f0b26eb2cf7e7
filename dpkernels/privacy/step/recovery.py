"""Recovery of a logical batch after a micro-batch ran out of memory, in smaller parts and with the same claim."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpkernels.privacy.sampling.logical_batch import LogicalBatch
from dpkernels.privacy.step.optimizer import DPOptimizer

logger = logging.getLogger("dpkernels")

Part = list[int]


def back_propagate(
    optimizer: DPOptimizer,
    logical_batch: LogicalBatch,
    losses_of: Callable[[Any], Tensor],
    *,
    say: Callable[[str], None] | None = None,
) -> list[Tensor]:
    """Call `optimizer.backward` for each micro-batch, and halve and repeat one that runs out of device memory.

    The same examples are summed as without the failure, each once: nothing is sampled again, no noise is drawn, and
    nothing is released or counted here. If the failure left the sums unchanged, only the failed micro-batch is halved.
    If it invalidated them (see `DPOptimizer.recover`), they are dropped, and the whole logical batch is repeated in
    parts of at most half that size. Parts are read from the data set again, in this process: random augmentation is
    drawn again.

    The number of halvings depends on the shapes of the data, like time and memory: it is NOT PRIVATE. It changes the
    micro-batches' shapes, and so the rounding (docs/privacy.md, "Rounding").

    Args:
        optimizer: the private optimizer.
        logical_batch: a batch of the private loader, not yet iterated.
        losses_of: micro-batch -> [B] losses.
        say: called with one line for each halving; default a warning of the logger "dpkernels".

    Returns:
        The losses [B] of each part that is in the sums, detached. NOT PRIVATE.

    Raises:
        torch.OutOfMemoryError: one example alone does not fit.
        Any error of losses_of and optimizer.backward.
    """
    say = say or logger.warning
    done: list[tuple[Part, Tensor]] = []
    for planned, batch in zip(list(logical_batch.parts), logical_batch, strict=True):
        todo: list[tuple[Part, Any]] = [(planned, batch)]
        while todo:
            part, loaded = todo.pop(0)
            losses = _attempt(optimizer, losses_of, logical_batch.collate(part) if loaded is None else loaded)
            if isinstance(losses, Tensor):
                done.append((part, losses))
                continue
            invalidated = optimizer.recover()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            unit = logical_batch.unit_of(part)
            if len(part) == unit > 1:
                raise torch.OutOfMemoryError(
                    f"one speaker alone ({unit} examples, from index {part[0]} of the data set) does not fit into "
                    "memory, and is clipped as a whole; lower max_examples_per_speaker, or use activation "
                    f"checkpointing with strategy='two_pass'. The allocator's error: {losses}"
                )
            if len(part) == 1:
                raise torch.OutOfMemoryError(
                    f"one example alone (index {part[0]} of the data set) does not fit into memory; use activation "
                    "checkpointing with strategy='two_pass', or leave out examples of its length. The allocator's "
                    f"error: {losses}"
                )
            size = (len(part) // unit + 1) // 2 * unit
            if invalidated:
                repeated = [*(earlier for earlier, _ in done), part, *(later for later, _ in todo)]
                todo = [
                    (piece, None)
                    for larger in repeated
                    for piece in _cut(larger, size, logical_batch.unit_of(larger))
                ]
                done = []
            else:
                todo = [(piece, None) for piece in _cut(part, size, unit)] + todo
            say(
                f"NOT PRIVATE: a micro-batch of {len(part)} examples ran out of memory; continuing with at most {size}"
                + (", from the start of its logical batch" if invalidated else "")
            )
    return [losses for _, losses in done]


def _attempt(optimizer: DPOptimizer, losses_of: Callable[[Any], Tensor], batch: Any) -> Tensor | str:
    """The losses, or the allocator's error message. A separate frame: its locals, and those in the exception's
    traceback, hold memory that the next attempt needs."""
    try:
        losses = losses_of(batch)
        optimizer.backward(losses)
        return losses.detach()
    except torch.OutOfMemoryError as error:
        return str(error)


def _cut(part: Part, size: int, unit: int) -> list[Part]:
    """Pieces of at most `size` examples, or of one speaker: `unit` consecutive examples stay together."""
    size = max(size // unit, 1) * unit
    return [part[start : start + size] for start in range(0, len(part), size)]
