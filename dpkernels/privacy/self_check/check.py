"""The self-check: is every example's gradient its own, and does the private backward see the gradient
autograd sees?

For a few examples of a batch, what the private path would add for each of them (factor 1 for it, 0 for the
others) is compared with the gradient of a one-example batch through torch's own layers; for one of them also with the
batch's rows in the reverse order. They differ where an example's gradient depends on the rest of its batch, on the
padding they cause or on their number, where a layer's batch axis is not the first, where the model sorts rows, or
where a norm rule is wrong. It is done in evaluation mode, and again with the modules' own modes but dropout off. Where
the model then still draws at random, each example alone is given its own row of the batch's draws (`draws.py`); where
that cannot be, the report says so, and only the batch-independence check (`batch_independence.py`) goes through it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dpkernels.nn import Tape
from dpkernels.nn.batch.batch_axis import batch_size_of
from dpkernels.privacy.guards.preconditions import check_losses, trained_parameters
from dpkernels.privacy.rng.model_draws import same_draws, secret_seed
from dpkernels.privacy.sampling.loader import DPDataLoader, LogicalBatch
from dpkernels.privacy.sampling.own_batch import size_of
from dpkernels.privacy.sampling.rows import Rows, rows_of
from dpkernels.privacy.self_check.draws import DrawsOfRow, DrawsUnlike, KeptDraws
from dpkernels.privacy.self_check.findings import (
    Compared,
    Difference,
    SelfCheckError,
    SelfCheckReport,
    explain,
    guess_message,
    worst_first,
)
from dpkernels.privacy.self_check.probing import (
    ALONE,
    IN_ANOTHER_ORDER,
    Behaviour,
    LossFunction,
    as_it_is,
    behaviour_of,
    compiled,
    draws_past_torch,
    evaluating,
    explained,
    has_compiled,
    private_backward,
    private_gradient,
    repeatable,
    row_error,
    training_without_dropout,
    watched,
)
from dpkernels.privacy.step.clipping import total_norm_sq

# Relative to a parameter's own gradient: float32 keeps 1e-5 or better through deep models; half precision
# keeps 1e-2.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 6e-2, torch.float16: 2e-2}
# A parameter whose gradient is this small a part of the example's is compared with that part instead:
# rounding only.
_FLOOR = 1e-3
# Norms are rounded up: nothing is taken off for the dtype. What is left is the comparison's own rounding.
_SHORTFALL = 1e-3
# Forwards after a difference, to tell one between examples from one of random draws.
_LOOKED_AT = 50


def self_check(
    model: nn.Module,
    tape: Tape,
    loss_fn: LossFunction,
    batch: Any,
    *,
    singles: Sequence[Any] | None = None,
    rows: Rows | None = None,
    samples: int = 3,
    tolerance: float | None = None,
) -> SelfCheckReport:
    """Compare per-example gradients of the private path with one-by-one gradients.

    Args:
        model: the private model.
        tape: its tape.
        loss_fn: loss_fn(model, batch) -> [B].
        batch: a tensor, or dicts, tuples and lists of tensors, batch first. At least two examples show
            dependence on the rest of the batch; unequal lengths show dependence on padding, when `singles` are given.
        singles: one-example batches of the batch's first examples, each collated alone, so with no padding of
            the rest of its batch. By default slices of `batch`, whose padding stays.
        rows: of another batch of the same form: which parts have one row an example. By default what singles show;
            without them what has as many rows as there are losses.
        samples: how many examples to compare.
        tolerance: largest relative error; default by the narrowest dtype that the model computes in.

    Raises:
        SelfCheckError: the layers that differ, with their numbers.
        ValueError, TypeError: losses of another shape than [B]; nothing in the batch with B rows.
    """
    if not callable(loss_fn) or isinstance(batch, Dataset | DataLoader | DPDataLoader | LogicalBatch):
        raise TypeError(
            f"self_check(loss_fn, batch): got {type(loss_fn).__name__} and {type(batch).__name__}; give a function of "
            "model and batch, and a batch as it takes one: the first micro-batch of a logical batch, or data[:8]"
        )
    if batch_size_of((batch,), {}) == 0:
        raise ValueError(
            "self_check: batch holds no example, so nothing would be compared; give at least two"
        )
    check = _Check(model, tape, trained_parameters(model), loss_fn, batch, singles, rows, samples)
    whole, unchecked, first_module = Compared(), [], None
    accepted = math.inf if tolerance is None else tolerance
    with as_it_is(model), same_draws(secret_seed()):
        misplaced = row_error(model, tape, loss_fn, batch)
    for mode, entered in (("eval", evaluating), ("train", training_without_dropout)):
        with entered(model):
            try:
                found, said = check.asked(mode, tolerance)
            except DrawsUnlike as reason:
                found, said = Compared(), f"gradients alone and in a batch, in {mode} mode: {reason}"
            whole.take(found)
            unchecked += [said] if said else []
            if tolerance is None and whole.dtypes:
                accepted = max(_TOLERANCES[dtype] for dtype in whole.dtypes)
            failed = SelfCheckReport(found.differences, accepted).failures
            if failed and first_module is None:
                first_module = _first_module(check, failed[0].sample)
    if len(whole.guessed) > 1:
        unchecked.append(
            "which parts of the batch are the examples': " + guess_message(whole.guessed, whole.size)
        )
    report = SelfCheckReport(
        worst_first(whole.differences),
        accepted,
        first_module,
        whole.shortfall,
        padded=singles is not None and any(size_of(one) * whole.size < size_of(batch) for one in singles),
        unchecked=tuple(unchecked),
    )
    if report.failures:
        raise SelfCheckError(explain(report, whole.hint()), report)
    if misplaced is not None:
        mode = "train" if model.training else "eval"
        raise SelfCheckError(f"self-check ({mode} mode): {misplaced}", report)
    if whole.shortfall > 1 + _SHORTFALL:
        raise SelfCheckError(
            f"a gradient's norm was computed {whole.shortfall:.4f} times too small: clipping would let through "
            "more than C. A norm rule is wrong; please report the model's layers.",
            report,
        )
    return report


@dataclass(frozen=True)
class _Check:
    """One batch and its examples alone, and how they are asked."""

    model: nn.Module
    tape: Tape
    trained: dict[str, nn.Parameter]
    loss_fn: LossFunction
    batch: Any
    singles: Sequence[Any] | None
    like: Rows | None
    samples: int

    def asked(self, mode: str, tolerance: float | None) -> tuple[Compared, str]:
        """What was compared in the present mode, and in words what could not be."""
        behaviour = behaviour_of(self.model, self.tape, self.loss_fn, self.batch)
        if behaviour is Behaviour.KEEPS:
            # The batch-independence check says so, and refuses it.
            return (
                Compared(),
                f"gradients alone and in a batch, in {mode} mode: the same batch gives other losses",
            )
        if behaviour is Behaviour.REPEATS:
            found = self.compare(mode)
            limit = max(_TOLERANCES[dtype] for dtype in found.dtypes) if tolerance is None else tolerance
            if not SelfCheckReport(found.differences, limit).failures or repeatable(
                self.model, self.tape, self.loss_fn, self.batch, _LOOKED_AT
            ):
                return found, ""
            # Masks that seldom hide anything, and hid nothing when it was first asked.
        if has_compiled(self.model):
            raise DrawsUnlike(
                "it is random, and parts of it are compiled, whose draws cannot be told apart by example"
            )
        if draws_past_torch(self.model, self.tape, self.loss_fn, self.batch):
            raise DrawsUnlike(
                "it draws from Python's or numpy's generator, which cannot be told apart by example"
            )
        return self.compare(mode, random=True), ""

    def rows(self, size: int) -> Rows:
        """Of the batch."""
        return rows_of(self.batch, size, singles=self.singles, like=self.like)

    def single(self, sample: int, size: int) -> Any:
        """The one-example batch of a sample: what was given, or a slice."""
        if self.singles is not None:
            return self.singles[sample]
        return self.rows(size).taken(self.batch, [sample])

    def compare(self, mode: str, *, random: bool = False) -> Compared:
        """Gradients in the batch, as it came and with its rows reversed, with the examples' gradients alone.

        random: the model draws, and each example alone is given its own row of the batch's draws.
        """
        dtypes = {p.dtype for p in self.trained.values()}
        dtypes |= {
            p.dtype for module in compiled(self.model) for p in module.parameters()
        }  # they show no outputs
        # Whether a layer is dropped, say, can agree twice by chance and then not: the same draws for all forwards.
        seed, kept = secret_seed(), KeptDraws()
        with same_draws(seed), kept if random else nullcontext():
            with watched(self.model, lambda _, output: dtypes.add(output.dtype)):
                losses = self.loss_fn(self.model, self.batch)
            check_losses(losses)
            size = losses.shape[0]
            if size < 2:
                raise ValueError(
                    f"self_check: batch holds {size} example; give at least two: alone, none can mix"
                )
            records = private_backward(self.tape, losses)
        with torch.no_grad():
            norm_sq = total_norm_sq(records, size, losses.device).cpu()
        count = min(self.samples, size if self.singles is None else min(len(self.singles), size))
        rows = self.rows(size)
        guessed = tuple(".".join(map(str, path)) or "the batch" for path in rows.axes) if rows.guessed else ()
        found = Compared(dtypes=dtypes & _TOLERANCES.keys(), size=size, guessed=guessed)
        said = "\n" + guess_message(guessed, size) if guessed else ""
        first: dict[str, Tensor] = {}
        for sample in range(count):
            # Alone first: its activations are gone before the private gradient, in float64, takes their place.
            with (
                self.tape.paused(),
                same_draws(seed),
                DrawsOfRow(kept, sample, size) if random else nullcontext(),
            ):
                with explained(mode, (ALONE[0], ALONE[1] + said)):
                    alone = self.loss_fn(self.model, self.single(sample, size))
                expected = _plain_gradient(alone, self.trained)
            found.losses.append((losses[sample].item(), alone.item()))
            private = private_gradient(records, self.trained, sample, size)
            found.differences += _differences(expected, private, sample, mode)
            contribution = math.hypot(*map(_norm, private.values()))
            bound = math.sqrt(max(float(norm_sq[sample]), 0.0))
            shortfall = contribution / bound if bound else (math.inf if contribution else 0.0)
            found.shortfall = max(found.shortfall, shortfall)
            first = first or expected
        if not random:  # whose draws would be other rows'
            del records
            with same_draws(seed):
                with explained(mode, IN_ANOTHER_ORDER):
                    losses = self.loss_fn(self.model, rows.taken(self.batch, range(size)[::-1]))
                records = private_backward(self.tape, losses)
            private = private_gradient(records, self.trained, size - 1, size)
            found.differences += _differences(first, private, 0, mode, ", rows reversed")
        return found


def _differences(
    expected: dict[str, Tensor], private: dict[str, Tensor], sample: int, mode: str, place: str = ""
) -> list[Difference]:
    norms = {name: _norm(gradient) for name, gradient in expected.items()}
    whole = math.hypot(*norms.values())
    return [
        Difference(
            name,
            sample,
            _norm(private[name] - expected[name]) / max(norm, _FLOOR * whole, 1e-30),
            norm,
            mode,
            place,
        )
        for name, norm in norms.items()
    ]


def _norm(gradient: Tensor) -> float:
    return float(gradient.double().norm())


def _plain_gradient(losses: Tensor, trained: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    if losses.shape != (1,):
        raise ValueError(
            f"loss_fn gave losses of shape {tuple(losses.shape)} for a batch of one example; expected (1,)"
        )
    gradients = torch.autograd.grad(losses.sum(), list(trained.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(trained.items(), gradients, strict=True)
    }


@torch.no_grad()
def _first_module(check: _Check, sample: int) -> str | None:
    """The first module whose output for a sample is another in its batch: looked for after a gradient differed, since
    all outputs of a large model are more than its activations.
    """
    together: dict[str, Tensor] = {}
    alone: dict[str, Tensor] = {}
    with check.tape.paused():
        with watched(check.model, together.setdefault):
            size = len(check.loss_fn(check.model, check.batch))
        with watched(check.model, alone.setdefault):
            check.loss_fn(check.model, check.single(sample, size))
    for name, output in together.items():
        single = alone.get(name)
        if single is None or output.dim() == 0 or output.shape[0] != size or single.shape[:1] != (1,):
            continue
        row = output[sample : sample + 1]
        if row.dim() != single.dim():
            continue
        # A one-example batch that was not padded is shorter: compare what both have.
        common = tuple(slice(0, min(a, b)) for a, b in zip(row.shape, single.shape, strict=True))
        first, second = row[common].double(), single[common].double()
        scale = float(second.abs().max()) if second.numel() else 0.0
        limit = 10 * _TOLERANCES.get(output.dtype, 2e-3)
        apart = (first - second).masked_fill(first == second, 0)  # also where both are the same infinity
        if second.numel() and not float(apart.abs().max()) <= limit * max(scale, 1e-6):
            return name
    return None
