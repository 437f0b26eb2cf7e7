"""The batch-independence check: does what an example adds change with the rest of its batch, as training computes it?

The self-check compares a batch with one example alone, which other shapes round otherwise: in half precision by as
much as a small gradient is. Here the shapes stay, and with them the kernels, the order of every sum and, under one
seed, all random draws; only the *content* of the other examples changes. What an example adds may then change by no
more than it does when the very same batch is repeated: on a CPU not at all, on a GPU by atomic additions. So it can be
asked in any dtype, under autocast, of compiled code and with dropout: of the very code that training runs.

The same batch is asked again after the others: a model that keeps something of what it saw (a queue, a running
statistic, in buffers or not) answers otherwise.
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
    as_it_is,
    explained,
    private_backward,
    private_gradient,
    settle_axes,
    watched,
)

LIMIT = 1e-6
"""Of the example's gradient, and of its loss: what may change where repeating the batch changes nothing."""
_TIMES_REPEATED = 10
# Of the same: what repeating may change on a GPU, where additions have no order.
_REPEATED_ON_GPU = 1e-2
Found = TypeVar("Found")


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
    """Whether an example's loss and gradient stay when the other examples of its batch are others.

    The others change places, each entry of them that is floating-point is halved or kept at random, and one becomes a
    copy of the example itself where that changes no shape in the model; lengths, masks and labels move along. The
    modules are asked in the modes that they are in, dropout included: call it as the model trains.

    Args:
        model: the private model.
        tape: its tape.
        loss_fn: loss_fn(model, batch) -> [B].
        batch: as for `self_check`; at least two examples.
        singles, rows: as for `self_check`.
        samples: of how many examples.

    Raises:
        SelfCheckError: a gradient changed by more than `LIMIT` of it and ten times more than by repeating, or a loss;
            or the same batch gave another one under the same random draws.
        ValueError: fewer than two examples, or a batch in which nothing can be exchanged.
    """
    probe = _Probe(model, tape, loss_fn, trained_parameters(model), secret_seed())
    with as_it_is(model):
        with same_draws(probe.seed):
            settle_axes(model, tape, loss_fn, batch)
        mode = "train" if model.training else "eval"
        _check(probe, batch, lambda size: rows_of(batch, size, singles=singles, like=rows), samples, mode)


def _check(probe: _Probe, batch: Any, rows_for: Callable[[int], Rows], samples: int, mode: str) -> None:
    losses, own, shapes = probe.run(batch, range(samples), lambda _, gradient: _narrowed(gradient))
    size = len(losses)
    if size < 2:
        raise ValueError(
            f"batch holds {size} example; give at least two: alone, an example depends on no other"
        )

    rows = rows_for(size)

    def distance(sample: int, gradient: Mapping[str, Tensor]) -> float:
        return math.hypot(*(float((gradient[name] - part).norm()) for name, part in own[sample].items()))

    same_losses, repeated, _ = probe.run(batch, own, distance)
    repeats = LIMIT if losses.device.type == "cpu" else _REPEATED_ON_GPU
    wholes = {sample: (_norm(own[sample]), abs(float(losses[sample]))) for sample in own}
    by_repeating = {s: (repeated[s], _moved(same_losses[s], losses[s])) for s in own}
    for sample in own:
        limits = tuple(repeats * _finite(whole) for whole in wholes[sample])
        _compare(_ANOTHER_TIME, sample, mode, wholes[sample], by_repeating[sample], limits)

    rounding = {
        s: tuple(
            max(LIMIT * _finite(a), _TIMES_REPEATED * b)
            for a, b in zip(wholes[s], by_repeating[s], strict=True)
        )
        for s in own
    }
    for sample in own:
        for copy in [*(row for row in range(size) if row != sample), None]:
            other = with_other_examples(batch, sample, rows, copy)
            with explained(mode, IN_ANOTHER_ORDER):
                other_losses, changed, other_shapes = probe.run(other, [sample], distance)
            if other_shapes == shapes:
                break
        change = changed[sample], _moved(other_losses[sample], losses[sample])
        _compare(_BESIDE_OTHERS, sample, mode, wholes[sample], change, rounding[sample])
    last_losses, last, _ = probe.run(batch, own, distance)
    for sample in own:
        change = last[sample], _moved(last_losses[sample], losses[sample])
        _compare(_ANOTHER_TIME, sample, mode, wholes[sample], change, rounding[sample])


_BESIDE_OTHERS = (
    "with other examples beside it, example {sample} of the batch has another gradient or loss",
    "Something mixes examples: a statistic over the batch, or a layer that does so in the arithmetic that was asked "
    "for only, as in half precision.",
)
_ANOTHER_TIME = (
    "asked again with the same batch and the same random draws, example {sample} has another gradient or loss",
    "Something is kept from forward to forward (a queue, a running statistic, a counter), or is drawn from a "
    "generator of the model's own: what one example leaves there changes what others add.",
)


def _compare(
    said: tuple[str, str],
    sample: int,
    mode: str,
    wholes: tuple[float, ...],
    changes: tuple[float, ...],
    limits: tuple[float, ...],
) -> None:
    """Raise where the gradient, or the loss, changed by more than its limit; a NaN did."""
    happened, cause = said
    for what, whole, change, limit in zip(_ASKED, wholes, changes, limits, strict=True):
        if not change <= limit:
            whole = max(whole, 1e-30)
            raise SelfCheckError(
                f"self-check: {happened.format(sample=sample)} ({mode} mode): {what} changed by {change:.3g} of "
                f"{whole:.3g}, where {limit:.3g} is rounding. {cause} (These numbers are NOT PRIVATE.)",
                SelfCheckReport([Difference(what, sample, change / whole, whole, mode)], limit / whole),
            )


_ASKED = ("all trained parameters", "the loss")


def with_other_examples(batch: Any, sample: int, rows: Rows, copy: int | None = None) -> Any:
    """The batch with other examples around `sample`: they change places, each of their floating-point entries is halved
    or kept at random (no layer that forgets the scale forgets that), and the row `copy` is the sample's own: whatever
    is the same in any order, and whole numbers, change too.
    """
    if not rows.axes:
        raise ValueError(
            f"batch: a {type(batch).__name__} in which nothing has {rows.size} rows, one an example, so that no other "
            "examples can be put beside one; give tensors, or dicts, tuples, lists and dataclasses of them, batch first"
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
        for own in {sample, sample if copy is None else copy}:
            scale.select(axis, own).fill_(1)
        return part * scale.to(part)

    return rows.changed(rows.taken(batch, order), halved, list)


@dataclass(frozen=True)
class _Probe:
    """One private backward, and what is asked of it."""

    model: nn.Module
    tape: Tape
    loss_fn: LossFunction
    trained: dict[str, nn.Parameter]
    seed: int

    def run(
        self, batch: Any, samples: Iterable[int], see: Callable[[int, dict[str, Tensor]], Found]
    ) -> tuple[Tensor, dict[int, Found], list[torch.Size]]:
        """Losses [B], `see(sample, its private gradient in float64)` of the samples, and the shapes of the modules'
        outputs. The records end with the call, since those of a large model are as large as its activations.
        """
        shapes: list[torch.Size] = []
        with same_draws(self.seed):
            with watched(self.model, lambda _, output: shapes.append(output.shape)):
                losses = self.loss_fn(self.model, batch)
            check_losses(losses)
            records = private_backward(self.tape, losses)
        size = len(losses)
        seen = {
            sample: see(sample, private_gradient(records, self.trained, sample, size))
            for sample in samples
            if sample < size
        }
        return losses.detach(), seen, shapes


def _moved(loss: Tensor, before: Tensor) -> float:
    """How far a loss moved: not at all where both are the same infinity, which marks an impossible target."""
    return 0.0 if bool(loss == before) else abs(float(loss - before))


def _finite(whole: float) -> float:
    """What a share of is rounding: of an infinite loss, nothing."""
    return whole if math.isfinite(whole) else 0.0


def _narrowed(gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In float32, half the memory: rounded by at most 6·10⁻⁸ of the norm, far below `LIMIT`."""
    return {name: part.float() for name, part in gradient.items()}


def _norm(gradient: Mapping[str, Tensor]) -> float:
    return math.hypot(*(float(part.double().norm()) for part in gradient.values()))
