"""All that a self-check asks: of the batch that was given, and of one that the loader's own collate_fn makes."""

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
    """What `PrivacyEngine.self_check` does; arguments, errors and warnings as there. `note` is told of the losses.

    Batch independence is checked last: what fails alone says more about where.
    """
    if batch is None and singles is not None:
        raise TypeError("self_check: singles are a batch's examples alone; give the batch, too")
    asked: list[tuple[Any, Sequence[Any] | None]] = [] if batch is None else [(batch, singles)]
    unchecked: list[str] = []
    rows: Rows | None = None
    if singles is None:
        own = loader.own_batch(like=batch, examples=samples)
        if isinstance(own, str):
            unchecked.append(own)
        else:
            asked.append((own.batch, own.singles))
            rows = own.rows
    if not asked:
        raise ValueError(f"self_check cannot ask {unchecked[0]}; give a batch")
    reports = [
        self_check(model, tape, loss_fn, one, singles=alone, rows=rows, samples=samples, tolerance=tolerance)
        for one, alone in asked
    ]
    with torch.enable_grad(), tape.paused():
        note(loss_fn(model, asked[0][0]))
    for one, alone in asked:
        check_batch_independence(model, tape, loss_fn, one, singles=alone, rows=rows, samples=samples)
    report = merged(reports, unchecked)
    if report.unchecked:
        warnings.warn("self_check passed, and could not ask: " + "; ".join(report.unchecked), stacklevel=3)
    return report
