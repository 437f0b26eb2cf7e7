"""The complete self-check: of the given batch, and of a batch that the loader's collate_fn makes."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpkernels.nn import Tape
from dpkernels.privacy.sampling.loader import DPDataLoader
from dpkernels.privacy.sampling.rows import Rows
from dpkernels.privacy.self_check.batch_independence import check_batch_independence
from dpkernels.privacy.self_check.check import self_check
from dpkernels.privacy.self_check.findings import SelfCheckReport, merged
from dpkernels.privacy.self_check.probing import LossFunction


def whole_check(
    model: nn.Module,
    tape: Tape,
    loader: DPDataLoader,
    note: Callable[[Tensor], None],
    loss_fn: LossFunction,
    batch: Any,
    *,
    singles: Sequence[Any] | None,
    samples: int,
    tolerance: float | None,
) -> SelfCheckReport:
    """Implements `PrivacyEngine.self_check`, with its arguments, errors and warnings. `note` is called with the losses.

    Batch independence is checked last, since the messages of the other checks locate a fault better.
    """
    if batch is None and singles is not None:
        raise TypeError("self_check: singles are the examples of a batch, each alone; give the batch, too")
    batches: list[tuple[Any, Sequence[Any] | None]] = [] if batch is None else [(batch, singles)]
    unchecked: list[str] = []
    rows: Rows | None = None
    if singles is None:
        collated = loader.own_batch(like=batch, examples=samples)
        if isinstance(collated, str):
            unchecked.append(collated)
        else:
            batches.append((collated.batch, collated.singles))
            rows = collated.rows
    if not batches:
        raise ValueError(f"self_check cannot check {unchecked[0]}; give a batch")
    reports = [
        self_check(
            model, tape, loss_fn, given, singles=alone, rows=rows, samples=samples, tolerance=tolerance
        )
        for given, alone in batches
    ]
    with torch.enable_grad(), tape.paused():
        note(loss_fn(model, batches[0][0]))
    for given, alone in batches:
        check_batch_independence(model, tape, loss_fn, given, singles=alone, rows=rows, samples=samples)
    report = merged(reports, unchecked)
    if report.unchecked:
        warnings.warn("self_check passed, but could not check: " + "; ".join(report.unchecked), stacklevel=3)
    return report
