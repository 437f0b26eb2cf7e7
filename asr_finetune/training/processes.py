"""The processes that torchrun started: they train one model, and rank 0 speaks and writes for all."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist

from dpkernels.privacy import Ranks, StepStats, join_processes, ranks_of


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that torchrun (or `accelerate launch`) started, each with a GPU of its own if there are any.

    Without torchrun, or within a program that has joined them, nothing is started or ended. Ranks after the first print
    no warnings: those of rank 0 stand for all.
    """
    started = join_processes()
    ranks = ranks_of(None)
    try:
        with warnings.catch_warnings():
            if not ranks.is_first:
                warnings.simplefilter("ignore")
            yield ranks
    finally:
        if started:
            dist.destroy_process_group()


def of_all(parts: Sequence[StepStats | None]) -> StepStats | None:
    """The statistics of a logical batch from those of its parts on the ranks. NOT PRIVATE."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    examples = sum(part.examples for part in known)
    finite = sum(part.examples - part.non_finite for part in known)
    return StepStats(
        examples=examples,
        clip_rate=sum(part.clip_rate * part.examples for part in known) / max(examples, 1),
        mean_norm=sum(part.mean_norm * (part.examples - part.non_finite) for part in known) / max(finite, 1),
        non_finite=sum(part.non_finite for part in known),
    )
