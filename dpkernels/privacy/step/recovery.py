"""A logical batch that goes on after a micro-batch ran out of memory, in smaller parts and with the same claim."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpkernels.privacy.sampling.loader import LogicalBatch
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
    """One `optimizer.backward` a micro-batch; one that runs out of device memory is halved and tried again.

    The same examples are summed as without the failure, each once, and nothing else: the sampling is not drawn again,
    no noise is drawn, nothing is released or counted here. Where the failure left the sums as they were, only the
    micro-batch that failed is halved. Where it invalidated them (see `DPOptimizer.recover`), they are dropped, and the
    whole logical batch is done again in parts of at most half that size. Parts are read from the data set anew, in
    this process: random augmentation is drawn again.

    How often that happens follows from the shapes of the data, as time and memory do: it is NOT PRIVATE, and it changes
    the micro-batches' shapes, and with them rounding (docs/privacy.md, "Rounding").

    Args:
        optimizer, logical_batch: as the private loader handed it out, not yet iterated.
        losses_of: micro-batch -> [B] losses.
        say: told of each halving, in a line; default a warning of the logger "dpkernels".

    Returns:
        The losses [B] of each part that is in the sums, detached. NOT PRIVATE.

    Raises:
        torch.OutOfMemoryError: one example alone does not fit.
        Whatever losses_of and optimizer.backward raise.
    """
    say = say or logger.warning
    done: list[tuple[Part, Tensor]] = []
    for planned, batch in zip(list(logical_batch.parts), logical_batch, strict=True):
        todo: list[tuple[Part, Any]] = [(planned, batch)]
        while todo:
            part, made = todo.pop(0)
            losses = _attempt(optimizer, losses_of, logical_batch.collate(part) if made is None else made)
            if isinstance(losses, Tensor):
                done.append((part, losses))
                continue
            invalidated = optimizer.recover()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if len(part) == 1:
                raise torch.OutOfMemoryError(
                    f"one example alone (index {part[0]} of the data set) does not fit into memory; use activation "
                    "checkpointing with strategy='two_pass', or leave out examples of its length. The failure said: "
                    f"{losses}"
                )
            size = (len(part) + 1) // 2
            if invalidated:
                again = [*(earlier for earlier, _ in done), part, *(later for later, _ in todo)]
                todo = [(piece, None) for whole in again for piece in _cut(whole, size)]
                done = []
            else:
                todo = [(piece, None) for piece in _cut(part, size)] + todo
            say(
                f"NOT PRIVATE: a micro-batch of {len(part)} examples ran out of memory; going on with at most {size}"
                + (", from the start of its logical batch" if invalidated else "")
            )
    return [losses for _, losses in done]


def _attempt(optimizer: DPOptimizer, losses_of: Callable[[Any], Tensor], batch: Any) -> Tensor | str:
    """The losses, or what the allocator said. A frame of its own: its locals, and those in the exception's traceback,
    hold the memory that the next attempt needs."""
    try:
        losses = losses_of(batch)
        optimizer.backward(losses)
        return losses.detach()
    except torch.OutOfMemoryError as error:
        return str(error)


def _cut(part: Part, size: int) -> list[Part]:
    return [part[start : start + size] for start in range(0, len(part), size)]
