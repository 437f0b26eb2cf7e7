"""The batch-independence check: an example's contribution must not change with the rest of its batch.

The self-check compares a batch with one example alone. Their shapes differ and so their rounding: in half precision by
as much as a small gradient. In this check the shapes stay the same, and with them the kernels, the order of every sum
and, under one seed, all random draws; only the *content* of the other examples changes. An example's contribution may
then change by no more than under a repetition of the same batch: on a CPU not at all, on a GPU by atomic additions. So
the check works in any dtype, under autocast, for compiled code and with dropout: for the same code as in training.

The first batch is repeated after the changed ones: a model that keeps values of the examples (a queue, a running
statistic, in buffers or not) then gives another result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dpkernels.nn import Tape
from dpkernels.privacy.guards.preconditions import check_losses, trained_parameters
from dpkernels.privacy.rng.model_draws import same_draws, secret_seed
from dpkernels.privacy.sampling.rows import Rows, rows_of
from dpkernels.privacy.self_check.findings import Difference, SelfCheckError, SelfCheckReport
from dpkernels.privacy.self_check.probing import (
    IN_ANOTHER_ORDER,
    LossFunction,
    explained,
    in_own_modes,
    private_backward,
    private_gradient,
    settle_axes,
    watched,
)

LIMIT = 1e-6
"""Largest relative change of an example's gradient and loss, if repeating the batch changes nothing."""
_TIMES_REPEATED = 10
# Largest relative change by repeating on a GPU, where additions have no fixed order.
_REPEATED_ON_GPU = 1e-2
Result = TypeVar("Result")


def check_batch_independence(
    model: nn.Module,
    tape: Tape,
    loss_fn: LossFunction,
    batch: Any,
    *,
    singles: Sequence[Any] | None = None,
    rows: Rows | None = None,
    samples: int = 3,
) -> None:
    """Check that an example's loss and gradient stay the same beside other examples.

    The other examples change places, each of their floating-point entries is halved or kept at random, and one of them
    becomes a copy of the example itself if this changes no shape in the model; lengths, masks and labels move with
    their examples. The modules keep their modes, dropout included: call this check in the mode of training.

    Args:
        model: the private model.
        tape: its tape.
        loss_fn: loss_fn(model, batch) -> [B].
        batch: as for `self_check`; at least two examples.
        singles, rows: as for `self_check`.
        samples: number of examples to check.

    Raises:
        SelfCheckError: a gradient or loss changed by more than `LIMIT`, relatively, and by more than ten times its
            change by repeating; or the same batch gave another gradient or loss under the same random draws.
        ValueError: fewer than two examples, or a batch whose examples cannot be exchanged.
    """
    probe = _Probe(model, tape, loss_fn, trained_parameters(model), secret_seed())
    with in_own_modes(model):
        with same_draws(probe.seed):
            settle_axes(model, tape, loss_fn, batch)
        mode = "train" if model.training else "eval"
        _check(probe, batch, lambda size: rows_of(batch, size, singles=singles, like=rows), samples, mode)


def _check(probe: _Probe, batch: Any, rows_for: Callable[[int], Rows], samples: int, mode: str) -> None:
    losses, gradients, shapes = probe.run(batch, range(samples), lambda _, gradient: _narrowed(gradient))
    size = len(losses)
    if size < 2:
        raise ValueError(
            f"batch holds {size} example; give at least two, since one alone depends on no other example"
        )

    rows = rows_for(size)

    def distance(sample: int, gradient: Mapping[str, Tensor]) -> float:
        return math.hypot(
            *(float((gradient[name] - part).norm()) for name, part in gradients[sample].items())
        )

    same_losses, repeated, _ = probe.run(batch, gradients, distance)
    repeats = LIMIT if losses.device.type == "cpu" else _REPEATED_ON_GPU
    totals = {sample: (_norm(gradients[sample]), abs(float(losses[sample]))) for sample in gradients}
    by_repeating = {s: (repeated[s], _moved(same_losses[s], losses[s])) for s in gradients}
    for sample in gradients:
        limits = tuple(repeats * _finite(total) for total in totals[sample])
        _compare(_ANOTHER_TIME, sample, mode, totals[sample], by_repeating[sample], limits)

    rounding = {
        s: tuple(
            max(LIMIT * _finite(a), _TIMES_REPEATED * b)
            for a, b in zip(totals[s], by_repeating[s], strict=True)
        )
        for s in gradients
    }
    for sample in gradients:
        for copy in [*(row for row in range(size) if row != sample), None]:
            other = with_other_examples(batch, sample, rows, copy)
            with explained(mode, IN_ANOTHER_ORDER):
                other_losses, changed, other_shapes = probe.run(other, [sample], distance)
            if other_shapes == shapes:
                break
        change = changed[sample], _moved(other_losses[sample], losses[sample])
        _compare(_BESIDE_OTHERS, sample, mode, totals[sample], change, rounding[sample])
    last_losses, last, _ = probe.run(batch, gradients, distance)
    for sample in gradients:
        change = last[sample], _moved(last_losses[sample], losses[sample])
        _compare(_ANOTHER_TIME, sample, mode, totals[sample], change, rounding[sample])


_BESIDE_OTHERS = (
    "with other examples beside it, example {sample} of the batch has another gradient or loss",
    "The model mixes examples: by a statistic over the batch, or by a layer that mixes them only in the dtype of this "
    "check, for example in half precision.",
)
_ANOTHER_TIME = (
    "on a repetition with the same batch and the same random draws, example {sample} has another gradient or loss",
    "The model keeps values from forward to forward (a queue, a running statistic, a counter), or draws from a "
    "generator of its own: values that depend on one example change the contributions of others.",
)


def _compare(
    texts: tuple[str, str],
    sample: int,
    mode: str,
    totals: tuple[float, ...],
    changes: tuple[float, ...],
    limits: tuple[float, ...],
) -> None:
    """Raise SelfCheckError if the gradient or the loss changed by more than its limit, or is NaN."""
    event, cause = texts
    for quantity, total, change, limit in zip(_QUANTITIES, totals, changes, limits, strict=True):
        if not change <= limit:
            total = max(total, 1e-30)
            raise SelfCheckError(
                f"self-check: {event.format(sample=sample)} ({mode} mode): {quantity} changed by {change:.3g} of "
                f"{total:.3g}; rounding explains at most {limit:.3g}. {cause} (These numbers are NOT PRIVATE.)",
                SelfCheckReport([Difference(quantity, sample, change / total, total, mode)], limit / total),
            )


_QUANTITIES = ("all trained parameters", "the loss")


def with_other_examples(batch: Any, sample: int, rows: Rows, copy: int | None = None) -> Any:
    """The batch with other examples around `sample`. They change places, each of their floating-point entries is halved
    or kept at random (no layer is invariant to that, also if it is to a scale), and the row `copy` becomes a copy of
    the sample's, so that whole numbers and values that do not depend on the order change, too.
    """
    if not rows.axes:
        raise ValueError(
            f"batch: no part of this {type(batch).__name__} has {rows.size} rows, one for each example, so its "
            "examples cannot be exchanged; give tensors, or dicts, tuples, lists and dataclasses of them, batch first"
        )
    others = [row for row in range(rows.size) if row != sample]
    moved = iter(others[1:] + others[:1])
    order = [row if row == sample else next(moved) for row in range(rows.size)]
    if copy is not None:
        order[copy] = sample
    generator = torch.Generator().manual_seed(0)

    def halved(part: Tensor, axis: int) -> Tensor:
        if not part.is_floating_point():
            return part
        scale = torch.randint(1, 3, part.shape, generator=generator) / 2
        for row in {sample, sample if copy is None else copy}:
            scale.select(axis, row).fill_(1)
        return part * scale.to(part)

    return rows.changed(rows.taken(batch, order), halved, list)


@dataclass(frozen=True)
class _Probe:
    """Runs private backwards of the model and returns their losses, gradients and shapes."""

    model: nn.Module
    tape: Tape
    loss_fn: LossFunction
    trained: dict[str, nn.Parameter]
    seed: int

    def run(
        self, batch: Any, samples: Iterable[int], see: Callable[[int, dict[str, Tensor]], Result]
    ) -> tuple[Tensor, dict[int, Result], list[torch.Size]]:
        """Losses [B], `see(sample, its private gradient in float64)` for each of the samples, and the shapes of the
        modules' outputs. The records are freed on return, since they are as large as the model's activations.
        """
        shapes: list[torch.Size] = []
        with same_draws(self.seed):
            with watched(self.model, lambda _, output: shapes.append(output.shape)):
                losses = self.loss_fn(self.model, batch)
            check_losses(losses)
            records = private_backward(self.tape, losses)
        size = len(losses)
        results = {
            sample: see(sample, private_gradient(records, self.trained, sample, size))
            for sample in samples
            if sample < size
        }
        return losses.detach(), results, shapes


def _moved(loss: Tensor, before: Tensor) -> float:
    """The change of a loss: 0 if both are the same infinity, which marks an impossible target."""
    return 0.0 if bool(loss == before) else abs(float(loss - before))


def _finite(total: float) -> float:
    """`total`, or 0 if it is infinite: no change of an infinite loss is rounding."""
    return total if math.isfinite(total) else 0.0


def _narrowed(gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradient in float32, for half the memory: rounded by at most 6·10⁻⁸ of the norm, far below `LIMIT`."""
    return {name: part.float() for name, part in gradient.items()}


def _norm(gradient: Mapping[str, Tensor]) -> float:
    return math.hypot(*(float(part.double().norm()) for part in gradient.values()))
