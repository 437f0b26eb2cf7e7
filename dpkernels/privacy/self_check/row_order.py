"""The order check: whether the losses of a micro-batch are in the order of its examples.

Only speakers that are clipped as speakers need it: consecutive losses are theirs. Nothing in a batch says which example
a row holds. So examples are read, collated and given to the loss function together, in three orders, and each loss must
move with its example. This finds a data set, a collate_fn or a loss function that sorts, whatever it sorts by, unless
the drawn examples are equal in it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpkernels.nn import Tape
from dpkernels.privacy.guards.preconditions import check_losses
from dpkernels.privacy.rng.model_draws import same_draws, secret_seed
from dpkernels.privacy.self_check.probing import LossFunction, evaluating

EXAMPLES = 32
"""Examples that are drawn. If one in ten differs from the others in what they are sorted by, 32 hold one with 97 %."""

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
_HALF_TOLERANCE = 2.0**-5
"""Relative to the largest loss: what rounding changes if a row stands at another place of its batch."""

_DISTINCT = 4
"""At least so many different losses must there be in the drawn batch, or it would show nothing."""


def order_problem(
    model: nn.Module,
    tape: Tape,
    loss_fn: LossFunction,
    dataset: Any,
    collate: Callable[[list[Any]], Any],
    physical_batch_size: int,
    placed: Callable[[Any], Any],
) -> str | None:
    """Why the losses cannot be taken for those of the examples in their order, as a clause; None if they can.

    Args:
        model, tape: the private model and its tape. The check runs in evaluation mode.
        loss_fn: loss_fn(model, batch) -> [B].
        dataset: map-style; `__getitems__` is used as the loader does.
        collate: the loader's collate_fn.
        physical_batch_size: the most examples that are collated together.
        placed: returns a collated batch in the form and on the devices that loss_fn takes.

    Raises:
        Any error of dataset, collate and loss_fn.
    """
    count = min(EXAMPLES, len(dataset))
    places = secrets.SystemRandom().sample(range(len(dataset)), count)
    seed = secret_seed()

    def losses_in(order: Sequence[int]) -> Tensor:
        with same_draws(seed):
            get_items = getattr(dataset, "__getitems__", None)  # torch's own fetcher does the same
            items = get_items(list(order)) if get_items else [dataset[place] for place in order]
            losses = loss_fn(model, placed(collate(list(items))))
        check_losses(losses)
        return losses.detach().double().cpu()

    size = min(count, max(2, physical_batch_size))
    with torch.no_grad(), tape.paused(), evaluating(model):
        for start in range(0, count - 1, size):
            part = places[start : start + size]
            if len(part) < 2:
                continue
            first = losses_in(part)
            if len(first) != len(part):
                return f"{len(part)} examples have {len(first)} losses"
            tolerance = _tolerance(model, first)
            values = first.sort().values
            if start == 0 and int((values.diff() > tolerance).sum()) + 1 < min(_DISTINCT, len(part)):
                return "the losses of different examples are too alike to tell them apart"
            for order in (range(len(part))[::-1], secrets.SystemRandom().sample(range(len(part)), len(part))):
                again = losses_in([part[place] for place in order])
                if again.shape != first.shape or bool(((again - first[list(order)]).abs() > tolerance).any()):
                    return (
                        "the losses of the same examples, read and collated in another order, are not in that "
                        "order: the data set, collate_fn or loss_fn sorts them, or draws at random"
                    )
    return None


def _tolerance(model: nn.Module, losses: Tensor) -> float:
    narrowest = min(
        (p.dtype for p in model.parameters()), key=lambda dtype: dtype.itemsize, default=torch.float32
    )
    finite = losses[losses.isfinite()].abs()
    scale = float(finite.max()) if len(finite) else 1.0
    return _TOLERANCE.get(narrowest, _HALF_TOLERANCE) * max(scale, 1e-30)
