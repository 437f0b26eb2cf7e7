"""The mates check: does what an example adds change with what else is in its batch, in the arithmetic of training?

The self-check compares a batch with one example alone, which other shapes round otherwise: in half precision by as
much as a small gradient is. Here the shapes stay, and with them the kernels and the order of every sum; only the
*content* of the other examples changes. What an example adds may then change by no more than it does when the very
same batch is repeated: on a CPU not at all, on a GPU by atomic additions. So it can be asked in any dtype, under
autocast, and of compiled code: of the very code that training runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dpkernels.nn import Tape
from dpkernels.privacy.checks import check_losses, trained_parameters
from dpkernels.privacy.probing import LossFunction, checked_modes, private_backward, private_gradient
from dpkernels.privacy.rows import with_rows
from dpkernels.privacy.self_check import Difference, SelfCheckError, SelfCheckReport

LIMIT = 1e-6
"""Of the example's gradient, and of its loss: what may change where repeating the batch changes nothing."""
_TIMES_REPEATED = 10
Found = TypeVar("Found")


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
        SelfCheckError: a gradient changed by more than `LIMIT` of it and ten times more than by repeating, or a loss.
    """
    probe = _Probe(model, tape, loss_fn, trained_parameters(model))
    with closing(checked_modes(model, tape, loss_fn, batch)) as modes:
        for mode in modes:
            _check(probe, batch, samples, mode)


def _check(probe: _Probe, batch: Any, samples: int, mode: str) -> None:
    losses, own = probe.run(batch, range(samples), lambda _, gradient: _narrowed(gradient))
    size = len(losses)
    if size < 2:
        return

    def distance(sample: int, gradient: Mapping[str, Tensor]) -> float:
        return math.hypot(*(float((gradient[name] - part).norm()) for name, part in own[sample].items()))

    same_losses, repeating = probe.run(batch, own, distance)
    for sample in own:
        other_losses, changed = probe.run(with_other_mates(batch, sample, size), [sample], distance)
        loss, same_loss, other_loss = (float(of[sample]) for of in (losses, same_losses, other_losses))
        for what, whole, by_repeating, change in (
            ("all trained parameters", _norm(own[sample]), repeating[sample], changed[sample]),
            ("the loss", abs(loss), abs(same_loss - loss), abs(other_loss - loss)),
        ):
            limit = max(LIMIT * whole, _TIMES_REPEATED * by_repeating)
            if change <= limit:  # a NaN is not
                continue
            whole = max(whole, 1e-30)
            raise SelfCheckError(
                f"self-check: with other examples beside it, example {sample} of the batch has another gradient or "
                f"loss ({mode} mode): {what} changed by {change:.3g} of {whole:.3g}, and by {by_repeating:.3g} when "
                "the same batch was repeated. Something mixes examples: a statistic over the batch, or a layer that "
                "does so in the arithmetic that was asked for only, as in half precision. (These numbers are NOT "
                "PRIVATE.)",
                SelfCheckReport([Difference(what, sample, change / whole, whole, mode)], limit / whole),
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


@dataclass(frozen=True)
class _Probe:
    """One private backward, and what is asked of it."""

    model: nn.Module
    tape: Tape
    loss_fn: LossFunction
    trained: dict[str, nn.Parameter]

    def run(
        self, batch: Any, samples: Iterable[int], see: Callable[[int, dict[str, Tensor]], Found]
    ) -> tuple[Tensor, dict[int, Found]]:
        """Losses [B], and `see(sample, its private gradient in float64)`; the records end with the call, since those
        of a large model are as large as its activations.
        """
        losses = self.loss_fn(self.model, batch)
        check_losses(losses)
        size = len(losses)
        records = private_backward(self.tape, losses)
        return losses.detach(), {
            sample: see(sample, private_gradient(records, self.trained, sample, size))
            for sample in samples
            if sample < size
        }


def _narrowed(gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In float32, half the memory: rounded by at most 6·10⁻⁸ of the norm, far below `LIMIT`."""
    return {name: part.float() for name, part in gradient.items()}


def _norm(gradient: Mapping[str, Tensor]) -> float:
    return math.hypot(*(float(part.double().norm()) for part in gradient.values()))
