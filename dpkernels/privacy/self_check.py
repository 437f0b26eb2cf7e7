"""The self-check: is every example's gradient its own, and does the private backward see the gradient
autograd sees?

For a few examples of a batch, what the private path would add for each of them (factor 1 for it, 0 for the
others) is compared with the gradient of a one-example batch through torch's own layers. They differ where an
example's gradient depends on its batch-mates or on the padding they cause, where a layer's batch axis is not
the first, or where a norm rule is wrong. It is done in evaluation mode, and again with the modules' own modes
but dropout off, where the model then gives the same losses twice: other random draws would differ between a batch
and one example of it. The mates check (`mates.py`) goes through those too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dpkernels.nn import Tape
from dpkernels.privacy.checks import check_losses, trained_parameters
from dpkernels.privacy.clipping import total_norm_sq
from dpkernels.privacy.loader import DPDataLoader, LogicalBatch
from dpkernels.privacy.probing import (
    LossFunction,
    as_it_is,
    compiled,
    evaluating,
    private_backward,
    private_gradient,
    repeatable,
    row_error,
    training_without_dropout,
    watched,
)
from dpkernels.privacy.randomness import same_draws, secret_seed
from dpkernels.privacy.rows import rows_of, take_sample

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


@dataclass(frozen=True)
class Difference:
    """How far one parameter's gradient is off. NOT PRIVATE.

    Attributes:
        parameter: qualified name. From the mates check: "all trained parameters", or "the loss".
        sample: index in the batch.
        error: ‖private − one by one‖ over the larger of ‖one by one‖ and 10⁻³ of the example's whole
            gradient. From the mates check: the change over `norm`.
        norm: ‖one by one‖. From the mates check: of the private gradient, or of the loss.
        mode: "eval" or "train".
    """

    parameter: str
    sample: int
    error: float
    norm: float
    mode: str


@dataclass(frozen=True)
class SelfCheckReport:
    """What was compared. NOT PRIVATE.

    Attributes:
        differences: every parameter × sample × mode, worst first.
        tolerance: largest error accepted.
        first_module: where a gradient differs, in order of execution the first module whose output does; None
            where no gradient or no output does.
        norm_shortfall: largest factor by which a norm fell below the gradient's (<= 1 where norms are upper
            bounds).
    """

    differences: list[Difference] = field(default_factory=list)
    tolerance: float = 0.0
    first_module: str | None = None
    norm_shortfall: float = 0.0

    @property
    def modes(self) -> set[str]:
        """ "eval", and "train" where the model repeats itself with dropout off."""
        return {item.mode for item in self.differences}

    @property
    def failures(self) -> list[Difference]:
        """The differences beyond the tolerance."""
        return [item for item in self.differences if not item.error <= self.tolerance]


class SelfCheckError(RuntimeError):
    """The self-check failed; `report` has the numbers, the message names the layers."""

    def __init__(self, message: str, report: SelfCheckReport) -> None:
        super().__init__(message)
        self.report = report


def self_check(
    model: nn.Module,
    tape: Tape,
    loss_fn: LossFunction,
    batch: Any,
    *,
    singles: Sequence[Any] | None = None,
    samples: int = 3,
    tolerance: float | None = None,
) -> SelfCheckReport:
    """Compare per-example gradients of the private path with one-by-one gradients.

    Args:
        model: the private model.
        tape: its tape.
        loss_fn: loss_fn(model, batch) -> [B].
        batch: a tensor, or dicts, tuples and lists of tensors, batch first. At least two examples show
            dependence on batch-mates; unequal lengths show dependence on padding, when `singles` are given.
        singles: one-example batches of the batch's first examples, each collated alone, so with no padding of
            its batch-mates. By default slices of `batch`, whose padding stays.
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
    if rows_of(batch) == 0:
        raise ValueError(
            "self_check: batch holds no example, so nothing would be compared; give at least two"
        )
    trained = trained_parameters(model)
    differences: list[Difference] = []
    first_module: str | None = None
    shortfall = 0.0
    computed: set[torch.dtype] = set()
    with as_it_is(model), same_draws(secret_seed()):
        misplaced = row_error(model, tape, loss_fn, batch)
    for mode, entered in (("eval", evaluating), ("train", training_without_dropout)):
        with entered(model):
            if mode == "train" and not repeatable(model, tape, loss_fn, batch):
                continue
            found, short, dtypes = _compare(model, tape, trained, loss_fn, batch, singles, samples, mode)
            shortfall = max(shortfall, short)  # of one backward: no draws come into it
            computed |= dtypes
            accepted = max(_TOLERANCES[dtype] for dtype in computed) if tolerance is None else tolerance
            failed = SelfCheckReport(found, accepted).failures
            if failed and mode == "train" and not repeatable(model, tape, loss_fn, batch, _LOOKED_AT):
                continue  # masks that seldom hide anything, and hid nothing when it was first asked
            differences += found
            if failed and first_module is None:
                first_module = _first_module(model, tape, loss_fn, batch, singles, failed[0].sample)
    differences.sort(key=lambda item: -item.error if not math.isnan(item.error) else -math.inf)
    report = SelfCheckReport(differences, accepted, first_module, shortfall)
    if report.failures:
        raise SelfCheckError(_explain(report), report)
    if misplaced is not None:
        mode = "train" if model.training else "eval"
        raise SelfCheckError(f"self-check ({mode} mode): {misplaced}", report)
    if shortfall > 1 + _SHORTFALL:
        raise SelfCheckError(
            f"a gradient's norm was computed {shortfall:.4f} times too small: clipping would let through "
            "more than C. A norm rule is wrong; please report the model's layers.",
            report,
        )
    return report


def _compare(
    model: nn.Module,
    tape: Tape,
    trained: dict[str, nn.Parameter],
    loss_fn: LossFunction,
    batch: Any,
    singles: Sequence[Any] | None,
    samples: int,
    mode: str,
) -> tuple[list[Difference], float, set[torch.dtype]]:
    dtypes = {p.dtype for p in trained.values()}
    dtypes |= {p.dtype for module in compiled(model) for p in module.parameters()}  # they show no outputs
    # Whether a layer is dropped, say, can agree twice by chance and then not: the same draws for all forwards.
    seed = secret_seed()
    with same_draws(seed), watched(model, lambda _, output: dtypes.add(output.dtype)):
        losses = loss_fn(model, batch)
    check_losses(losses)
    size = losses.shape[0]
    if size < 2:
        raise ValueError(f"self_check: batch holds {size} example; give at least two: alone, none can mix")
    records = private_backward(tape, losses)
    with torch.no_grad():
        norm_sq = total_norm_sq(records, size, losses.device).cpu()
    count = min(samples, size) if singles is None else min(samples, len(singles), size)
    differences: list[Difference] = []
    shortfall = 0.0
    for sample in range(count):
        # Alone first: its activations are gone before the private gradient, in float64, takes their place.
        with tape.paused(), same_draws(seed):
            expected = _plain_gradient(loss_fn(model, _single(batch, singles, sample, size)), trained)
        private = private_gradient(records, trained, sample, size)
        norms = {name: _norm(gradient) for name, gradient in expected.items()}
        whole = math.hypot(*norms.values())
        for name, norm in norms.items():
            error = _norm(private[name] - expected[name]) / max(norm, _FLOOR * whole, 1e-30)
            differences.append(Difference(name, sample, error, norm, mode))
        contribution = math.hypot(*map(_norm, private.values()))
        bound = math.sqrt(max(float(norm_sq[sample]), 0.0))
        shortfall = max(shortfall, contribution / bound if bound else (math.inf if contribution else 0.0))
    return differences, shortfall, dtypes & _TOLERANCES.keys()


def _norm(gradient: Tensor) -> float:
    return float(gradient.double().norm())


def _single(batch: Any, singles: Sequence[Any] | None, sample: int, size: int) -> Any:
    """The one-example batch of a sample: what was given, or a slice."""
    return take_sample(batch, sample, size) if singles is None else singles[sample]


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
def _first_module(
    model: nn.Module,
    tape: Tape,
    loss_fn: LossFunction,
    batch: Any,
    singles: Sequence[Any] | None,
    sample: int,
) -> str | None:
    """The first module whose output for a sample is another in its batch: looked for after a gradient differed, since
    all outputs of a large model are more than its activations.
    """
    together: dict[str, Tensor] = {}
    alone: dict[str, Tensor] = {}
    with tape.paused():
        with watched(model, together.setdefault):
            size = len(loss_fn(model, batch))
        with watched(model, alone.setdefault):
            loss_fn(model, _single(batch, singles, sample, size))
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
        if second.numel() and not float((first - second).abs().max()) <= limit * max(scale, 1e-6):
            return name
    return None


def _explain(report: SelfCheckReport) -> str:
    worst: dict[str, Difference] = {}
    for item in report.failures:
        worst.setdefault(item.parameter, item)
    lines = "".join(
        f"\n  {item.parameter}: off by {item.error:.3g} of its norm (example {item.sample}, {item.mode} mode)"
        for item in list(worst.values())[:12]
    )
    where = ""
    if report.first_module is not None:
        where = f"\nThe first module whose output for an example depends on its batch: {report.first_module}."
    return (
        "self-check: the gradient of an example in its batch is not its gradient alone, beyond "
        f"{report.tolerance:g}, for {len(worst)} parameters:{lines}{where}\nLikely causes: normalisation "
        "over the batch, padding that is not masked, a layer whose first dimension is not the batch, a loss "
        "that mixes examples, or, where errors are below 0.01 and on a GPU, convolutions in TF32, torch's default "
        "(torch.backends.cudnn.allow_tf32 = False). (These numbers are NOT PRIVATE.)"
    )
