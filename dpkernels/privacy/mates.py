"""The mates check: does what an example adds change with what else is in its batch, in the arithmetic of training?

The self-check compares a batch with one example alone, which other shapes round otherwise: in half precision by as
much as a small gradient is. Here the shapes stay, and with them the kernels and the order of every sum; only the
*content* of the other examples changes. What an example adds may then change by no more than it does when the very
same batch is repeated: on a CPU not at all, on a GPU by atomic additions. So it can be asked in any dtype, under
autocast, and of compiled code: of the very code that training runs.
"""

import math
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn

from dpkernels.nn import Record, Tape
from dpkernels.privacy.checks import check_losses, trained_parameters
from dpkernels.privacy.self_check import (
    Difference,
    LossFunction,
    SelfCheckError,
    SelfCheckReport,
    checked_modes,
    private_backward,
    private_gradient,
    with_rows,
)

LIMIT = 1e-6
"""Of the example's gradient: what may change where repeating the batch changes nothing."""
_TIMES_REPEATED = 10


def check_mates(model: nn.Module, tape: Tape, loss_fn: LossFunction, batch: Any, *, samples: int = 3) -> None:
    """Whether an example's loss and gradient stay when the other examples of its batch are others.

    The others change places, and what is floating-point in them is halved; lengths, masks and labels move along.

    Args:
        model: the private model.
        tape: its tape.
        loss_fn: loss_fn(model, batch) -> [B].
        batch: as for `self_check`; at least two examples, or nothing is asked.
        samples: of how many examples.

    Raises:
        SelfCheckError: one changed by more than `LIMIT` of its gradient, and ten times more than by repeating.
    """
    trained = trained_parameters(model)
    with closing(checked_modes(model, tape, loss_fn, batch)) as modes:
        for mode in modes:
            _check(model, tape, trained, loss_fn, batch, samples, mode)


def _check(
    model: nn.Module,
    tape: Tape,
    trained: dict[str, nn.Parameter],
    loss_fn: LossFunction,
    batch: Any,
    samples: int,
    mode: str,
) -> None:
    losses, records = _run(model, tape, loss_fn, batch)
    repeated_losses, repeated = _run(model, tape, loss_fn, batch)
    size = len(losses)
    for sample in range(min(samples, size) if size > 1 else 0):
        other_losses, others = _run(model, tape, loss_fn, with_other_mates(batch, sample, size))
        own = private_gradient(records, trained, sample, size)
        norm, loss = _norm(own), abs(float(losses[sample]))
        repeating = _distance(private_gradient(repeated, trained, sample, size), own)
        repeating += abs(float(repeated_losses[sample] - losses[sample]))
        changed = _distance(private_gradient(others, trained, sample, size), own)
        changed += abs(float(other_losses[sample] - losses[sample]))
        limit = max(LIMIT * (norm + loss), _TIMES_REPEATED * repeating)
        if not changed <= limit:
            what = Difference("all trained parameters", sample, changed / max(norm, 1e-30), norm, mode)
            raise SelfCheckError(
                f"self-check: with other examples beside it, example {sample} of the batch has another loss or "
                f"gradient ({mode} mode): they change by {changed:.3g}, its gradient being {norm:.3g}, and by "
                f"{repeating:.3g} when the same batch is repeated. Something mixes examples: a statistic over the "
                "batch, or a layer that does so in the arithmetic that was asked for only, as in half precision. "
                "(These numbers are NOT PRIVATE.)",
                SelfCheckReport([what], limit / max(norm, 1e-30)),
            )


def with_other_mates(batch: Any, sample: int, size: int) -> Any:
    """The batch in which all examples but `sample` have changed places, and are half of what they were."""
    others = [row for row in range(size) if row != sample]
    moved = iter(others[1:] + others[:1])
    order = [row if row == sample else next(moved) for row in range(size)]

    def changed(rows: Tensor) -> Tensor:
        found = rows[torch.tensor(order, device=rows.device)]
        if found.is_floating_point():
            scale = torch.full((size,), 0.5, dtype=found.dtype, device=found.device)
            scale[sample] = 1
            found = found * scale.view(-1, *[1] * (found.dim() - 1))
        return found

    return with_rows(batch, size, changed, lambda texts: [texts[row] for row in order])


def _run(model: nn.Module, tape: Tape, loss_fn: LossFunction, batch: Any) -> tuple[Tensor, list[Record]]:
    losses = loss_fn(model, batch)
    check_losses(losses)
    return losses.detach(), private_backward(tape, losses)


def _norm(gradient: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(part.square().sum()) for part in gradient.values()))


def _distance(found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float((found[name] - part).square().sum()) for name, part in own.items()))
