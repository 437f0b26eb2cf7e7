"""The self-check compares per-sample gradients of the private backward with one-by-one gradients of autograd.

For a few examples of a batch, the contribution of each in the private path (factor 1 for it, 0 for the others) is
compared with the gradient of a one-example batch through torch's own layers; for one of them also with the batch's rows
in reverse order. The two differ if an example's gradient depends on the rest of its batch, on the padding to longer
examples or on their number, if a layer's batch axis is not the first, if the model sorts rows, or if a norm rule is
wrong. The check runs in evaluation mode, and again in the modules' own modes with dropout off. If the model then still
draws at random, each example alone gets its own row of the batch's draws (`draws.py`). If that is not possible, the
report says so, and only the batch-independence check (`batch_independence.py`) covers that mode.
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
from dpkernels.nn.recording.row_check import reentrant_checkpoints_named
from dpkernels.privacy.guards.preconditions import check_losses, trained_parameters
from dpkernels.privacy.rng.model_draws import same_draws, secret_seed
from dpkernels.privacy.sampling.loader import DPDataLoader
from dpkernels.privacy.sampling.logical_batch import LogicalBatch
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
    behaviour_of,
    compiled,
    draws_past_torch,
    evaluating,
    explained,
    has_compiled,
    in_own_modes,
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
# A gradient below this part of the example's whole gradient is compared relative to that part: its own relative error
# is only rounding.
_FLOOR = 1e-3
# Norms are rounded up, so the dtype needs no tolerance; this one is for the rounding of the comparison.
_SHORTFALL = 1e-3
# Number of forwards after a difference, to distinguish a dependence between examples from random draws.
_REPETITIONS = 50


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
        batch: a tensor, or dicts, tuples and lists of tensors, batch first. At least two examples are needed to find
            dependence on the rest of the batch; with `singles`, unequal lengths show dependence on padding.
        singles: one-example batches of the batch's first examples, each collated alone and so without padding to the
            rest of the batch. By default slices of `batch`, which keep their padding.
        rows: the rows of another batch of the same form. By default they are found by comparing batch and singles;
            without singles, the parts with as many rows as there are losses.
        samples: how many examples to compare.
        tolerance: largest relative error; default by the narrowest dtype that the model computes in.

    Raises:
        SelfCheckError: gradients differ; the message has the layers and their errors.
        ValueError, TypeError: losses of another shape than [B]; no part of the batch with B rows.
    """
    if not callable(loss_fn) or isinstance(batch, Dataset | DataLoader | DPDataLoader | LogicalBatch):
        raise TypeError(
            f"self_check(loss_fn, batch): got {type(loss_fn).__name__} and {type(batch).__name__}; give a function of "
            "model and batch, and a batch for it: the first micro-batch of a logical batch, or data[:8]"
        )
    if batch_size_of((batch,), {}) == 0:
        raise ValueError(
            "self_check: batch holds no example, so nothing would be compared; give at least two"
        )
    check = _Check(model, tape, trained_parameters(model), loss_fn, batch, singles, rows, samples)
    total, unchecked, first_module = Compared(), [], None
    accepted = math.inf if tolerance is None else tolerance
    with in_own_modes(model), same_draws(secret_seed()):
        misplaced = row_error(model, tape, loss_fn, batch)
    for mode, entered in (("eval", evaluating), ("train", training_without_dropout)):
        with entered(model):
            try:
                compared, skipped = check.run(mode, tolerance)
            except DrawsUnlike as reason:
                compared, skipped = Compared(), f"gradients alone and in a batch, in {mode} mode: {reason}"
            total.take(compared)
            unchecked += [skipped] if skipped else []
            if tolerance is None and total.dtypes:
                accepted = max(_TOLERANCES[dtype] for dtype in total.dtypes)
            failed = SelfCheckReport(compared.differences, accepted).failures
            if failed and first_module is None:
                first_module = _first_module(check, failed[0].sample)
    if len(total.guessed) > 1:
        unchecked.append(
            "which parts of the batch hold the examples: " + guess_message(total.guessed, total.size)
        )
    report = SelfCheckReport(
        worst_first(total.differences),
        accepted,
        first_module,
        total.shortfall,
        padded=singles is not None and any(size_of(alone) * total.size < size_of(batch) for alone in singles),
        unchecked=tuple(unchecked),
    )
    if report.failures:
        raise SelfCheckError(explain(report, total.hint()), report)
    if misplaced is not None:
        mode = "train" if model.training else "eval"
        raise SelfCheckError(f"self-check ({mode} mode): {misplaced}", report)
    if total.shortfall > 1 + _SHORTFALL:
        raise SelfCheckError(
            f"a gradient's norm was computed {total.shortfall:.4f} times too small, so clipped gradients would have a "
            "norm above C. A norm rule is wrong; please report the model's layers.",
            report,
        )
    return report


@dataclass(frozen=True)
class _Check:
    """The comparison of a batch with its examples alone."""

    model: nn.Module
    tape: Tape
    trained: dict[str, nn.Parameter]
    loss_fn: LossFunction
    batch: Any
    singles: Sequence[Any] | None
    like: Rows | None
    samples: int

    def run(self, mode: str, tolerance: float | None) -> tuple[Compared, str]:
        """The comparisons in the present mode, and the name of a comparison that is not possible, or ""."""
        behaviour = behaviour_of(self.model, self.tape, self.loss_fn, self.batch)
        if behaviour is Behaviour.KEEPS:
            # The batch-independence check refuses this, and its message has the reason.
            return (
                Compared(),
                f"gradients alone and in a batch, in {mode} mode: the same batch gives other losses",
            )
        if behaviour is Behaviour.REPEATS:
            compared = self.compare(mode)
            limit = max(_TOLERANCES[dtype] for dtype in compared.dtypes) if tolerance is None else tolerance
            if not SelfCheckReport(compared.differences, limit).failures or repeatable(
                self.model, self.tape, self.loss_fn, self.batch, _REPETITIONS
            ):
                return compared, ""
            # The model draws masks that seldom mask anything, and masked nothing in the first two forwards.
        if has_compiled(self.model):
            raise DrawsUnlike(
                "the model is random, and the draws of its compiled parts cannot be separated by example"
            )
        if draws_past_torch(self.model, self.tape, self.loss_fn, self.batch):
            raise DrawsUnlike(
                "the model draws from Python's or numpy's generator, whose draws cannot be separated by example"
            )
        return self.compare(mode, random=True), ""

    def rows(self, size: int) -> Rows:
        """The rows of the batch."""
        return rows_of(self.batch, size, singles=self.singles, like=self.like)

    def single(self, sample: int, size: int) -> Any:
        """The one-example batch of a sample: from `singles`, or a slice."""
        if self.singles is not None:
            return self.singles[sample]
        return self.rows(size).taken(self.batch, [sample])

    def compare(self, mode: str, *, random: bool = False) -> Compared:
        """Compare gradients in the batch, in its order and with its rows reversed, with the gradients alone.

        random: whether the model draws; each example alone then gets its own row of the batch's draws.
        """
        dtypes = {p.dtype for p in self.trained.values()}
        dtypes |= {
            p.dtype for module in compiled(self.model) for p in module.parameters()
        }  # compiled modules have no hooks on their outputs
        # All forwards get the same draws: a random decision (to drop a layer) may agree in two forwards by chance only.
        seed, kept = secret_seed(), KeptDraws()
        with same_draws(seed), kept if random else nullcontext():
            with watched(self.model, lambda _, output: dtypes.add(output.dtype)):
                losses = self.loss_fn(self.model, self.batch)
            check_losses(losses)
            size = losses.shape[0]
            if size < 2:
                raise ValueError(
                    f"self_check: batch holds {size} example; give at least two, since one alone cannot mix with others"
                )
            records = private_backward(self.tape, losses)
        with torch.no_grad():
            norm_sq = total_norm_sq(records, size, losses.device).cpu()
        count = min(self.samples, size if self.singles is None else min(len(self.singles), size))
        rows = self.rows(size)
        guessed = tuple(".".join(map(str, path)) or "the batch" for path in rows.axes) if rows.guessed else ()
        compared = Compared(dtypes=dtypes & _TOLERANCES.keys(), size=size, guessed=guessed)
        guess = "\n" + guess_message(guessed, size) if guessed else ""
        first: dict[str, Tensor] = {}
        for sample in range(count):
            # The example alone first: its activations are freed before the private gradient, in float64, is allocated.
            with (
                self.tape.paused(),
                same_draws(seed),
                DrawsOfRow(kept, sample, size) if random else nullcontext(),
            ):
                with explained(mode, (ALONE[0], ALONE[1] + guess)):
                    alone = self.loss_fn(self.model, self.single(sample, size))
                expected = _plain_gradient(alone, self.trained)
            compared.losses.append((losses[sample].item(), alone.item()))
            private = private_gradient(records, self.trained, sample, size)
            compared.differences += _differences(expected, private, sample, mode)
            contribution = math.hypot(*map(_norm, private.values()))
            bound = math.sqrt(max(float(norm_sq[sample]), 0.0))
            shortfall = contribution / bound if bound else (math.inf if contribution else 0.0)
            compared.shortfall = max(compared.shortfall, shortfall)
            first = first or expected
        if not random:  # in reverse order the draws would be those of other rows
            del records
            with same_draws(seed):
                with explained(mode, IN_ANOTHER_ORDER):
                    losses = self.loss_fn(self.model, rows.taken(self.batch, range(size)[::-1]))
                records = private_backward(self.tape, losses)
            private = private_gradient(records, self.trained, size - 1, size)
            compared.differences += _differences(first, private, 0, mode, ", rows reversed")
        return compared


def _differences(
    expected: dict[str, Tensor], private: dict[str, Tensor], sample: int, mode: str, place: str = ""
) -> list[Difference]:
    norms = {name: _norm(gradient) for name, gradient in expected.items()}
    total = math.hypot(*norms.values())
    return [
        Difference(
            name,
            sample,
            _norm(private[name] - expected[name]) / max(norm, _FLOOR * total, 1e-30),
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
            f"loss_fn returned losses of shape {tuple(losses.shape)} for a batch of one example; expected (1,)"
        )
    with reentrant_checkpoints_named():
        gradients = torch.autograd.grad(losses.sum(), list(trained.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(trained.items(), gradients, strict=True)
    }


@torch.no_grad()
def _first_module(check: _Check, sample: int) -> str | None:
    """The first module whose output for a sample in its batch differs from that alone. It is searched for only after a
    gradient differed, since all outputs of a large model take more memory than its activations.
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
        # An unpadded one-example batch is shorter: only the common part is compared.
        common = tuple(slice(0, min(a, b)) for a, b in zip(row.shape, single.shape, strict=True))
        first, second = row[common].double(), single[common].double()
        scale = float(second.abs().max()) if second.numel() else 0.0
        limit = 10 * _TOLERANCES.get(output.dtype, 2e-3)
        apart = (first - second).masked_fill(first == second, 0)  # also where both are the same infinity
        if second.numel() and not float(apart.abs().max()) <= limit * max(scale, 1e-6):
            return name
    return None
