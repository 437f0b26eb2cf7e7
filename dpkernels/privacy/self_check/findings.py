"""Results of a self-check: the numbers, the checks that were skipped, and the message that names the layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from dpkernels.errors import UserError

_SHOWN = 5  # parameters in a report's table
# If an example's loss alone and n times its loss in a batch of n differ by less, the losses are divided by n.
_DIVIDED = 1e-3


@dataclass(frozen=True)
class Difference:
    """The error of one parameter's gradient. NOT PRIVATE.

    Attributes:
        parameter: qualified name. From the batch-independence check: "all trained parameters", or "the loss".
        sample: index in the batch.
        error: ‖private − one-by-one‖ over the larger of ‖one-by-one‖ and 10⁻³ of the norm of the example's whole
            gradient. From the batch-independence check: the change over `norm`.
        norm: ‖one-by-one‖. From the batch-independence check: the norm of the private gradient, or the loss.
        mode: "eval" or "train".
        place: "" for the batch's own order; ", rows reversed" for the reverse order.
    """

    parameter: str
    sample: int
    error: float
    norm: float
    mode: str
    place: str = ""


@dataclass(frozen=True, repr=False)
class SelfCheckReport:
    """The comparisons of a self-check. NOT PRIVATE. It prints as a table of the largest errors, one line a parameter.

    Attributes:
        differences: one for every parameter × sample × mode, worst first.
        tolerance: largest accepted error.
        first_module: if a gradient differs, the first module in order of execution whose output differs; None if no
            gradient or no output differs.
        norm_shortfall: largest factor by which a norm fell below the gradient's (<= 1 if norms are upper bounds).
        padded: whether an example was compared that is larger in its batch than alone. It is False if the data set has
            no such examples, if collate_fn pads nothing, or if its batches were not checked: see `unchecked`.
        unchecked: the checks that were not possible, each with the reason.
        strategy: the strategy under which the private gradients were computed; "" if it is not known.
    """

    differences: list[Difference] = field(default_factory=list)
    tolerance: float = 0.0
    first_module: str | None = None
    norm_shortfall: float = 0.0
    padded: bool = False
    unchecked: tuple[str, ...] = ()
    strategy: str = ""

    @property
    def modes(self) -> set[str]:
        """The modes that were compared, of "eval" and "train": those in which the model repeats with dropout off."""
        return {item.mode for item in self.differences}

    @property
    def failures(self) -> list[Difference]:
        """The differences beyond the tolerance."""
        return [item for item in self.differences if not item.error <= self.tolerance]

    def __str__(self) -> str:
        worst = list(_worst_by_parameter(self.differences).values())
        parts = [
            f"{len(self.differences)} comparisons of {len(worst)} parameters in {_listed(sorted(self.modes))} mode: "
            f"{len(self.failures)} beyond the tolerance of {self.tolerance:g} (NOT PRIVATE)"
        ]
        if self.strategy:
            parts.append(f"private gradients of strategy={self.strategy!r}")
        if worst:
            parts += _table(worst[:_SHOWN])
        if len(worst) > _SHOWN:
            parts.append(f"and {len(worst) - _SHOWN} parameters with smaller errors: see report.differences")
        if self.first_module is not None:
            parts.append(
                f"first module whose output for an example depends on its batch: {self.first_module!r}"
            )
        parts += [f"not asked: {what}" for what in self.unchecked]
        return "\n".join(parts)

    __repr__ = __str__


class SelfCheckError(UserError, RuntimeError):
    """The self-check failed. `report` has the numbers, and the message names the layers."""

    def __init__(self, message: str, report: SelfCheckReport) -> None:
        super().__init__(message)
        self.report = report


@dataclass
class Compared:
    """The results of comparisons.

    Attributes:
        differences: by parameter and example.
        shortfall: largest factor by which a norm fell below the gradient's.
        dtypes: the dtypes that the model computes in.
        losses: (in the batch, alone) for each example.
        size: number of examples in the batch.
        guessed: parts of the batch whose rows were found from their number only.
    """

    differences: list[Difference] = field(default_factory=list)
    shortfall: float = 0.0
    dtypes: set[torch.dtype] = field(default_factory=set)
    losses: list[tuple[float, float]] = field(default_factory=list)
    size: int = 0
    guessed: tuple[str, ...] = ()

    def take(self, other: Compared) -> None:
        """Add the results of other comparisons."""
        self.differences += other.differences
        self.shortfall = max(self.shortfall, other.shortfall)
        self.dtypes |= other.dtypes
        self.losses += other.losses
        self.size = max(self.size, other.size)
        self.guessed = self.guessed or other.guessed

    def hint(self) -> str:
        """Sentences for guessed rows, and for a loss that is divided by the number of examples. The outcome of the
        check does not depend on them."""
        doubt = "\n" + guess_message(self.guessed, self.size) if len(self.guessed) > 1 else ""
        if not self.losses or not all(
            alone and abs(together * self.size / alone - 1) < _DIVIDED for together, alone in self.losses
        ):
            return doubt
        return (
            f"{doubt}\nThe loss of an example changes with the batch's size: in a batch of {self.size} it is the loss "
            f"alone, divided by {self.size}. Was it divided by len(batch)? Give the undivided losses: step() divides "
            "the sum of their gradients by the expected batch size."
        )


def guess_message(parts: Sequence[str], size: int) -> str:
    """The sentence that the rows of these parts of a batch are guessed, and the fix if the guess is wrong."""
    return (
        f"{', '.join(parts)} were taken to hold one row for each example, because they have {size} rows. If all "
        "examples share one of them, leave the batch out, or give singles"
    )


def merged(reports: Sequence[SelfCheckReport], unchecked: Sequence[str]) -> SelfCheckReport:
    """One report of several batches, worst difference first, with the checks that were not possible."""
    differences = [item for report in reports for item in report.differences]
    return SelfCheckReport(
        worst_first(differences),
        max(report.tolerance for report in reports),
        next((report.first_module for report in reports if report.first_module is not None), None),
        max(report.norm_shortfall for report in reports),
        any(report.padded for report in reports),
        tuple(dict.fromkeys([*(check for report in reports for check in report.unchecked), *unchecked])),
    )


def worst_first(differences: Sequence[Difference]) -> list[Difference]:
    """Sorted by error, NaN first."""
    return sorted(differences, key=lambda item: -item.error if not math.isnan(item.error) else -math.inf)


def _worst_by_parameter(differences: Sequence[Difference]) -> dict[str, Difference]:
    """The first of each parameter: its largest error, as differences come worst first."""
    worst: dict[str, Difference] = {}
    for item in differences:
        worst.setdefault(item.parameter, item)
    return worst


def _table(differences: Sequence[Difference]) -> list[str]:
    """A line for each, under a line of headings."""
    rows = [("parameter", "error", "norm", "example", "mode")]
    rows += [
        (item.parameter, f"{item.error:.2e}", f"{item.norm:.2e}", str(item.sample), item.mode + item.place)
        for item in differences
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _listed(words: Sequence[str]) -> str:
    return " and ".join(words) or "no"


def explain(report: SelfCheckReport, hint: str = "") -> str:
    """The message of a failed check: the parameters, the first module that differs, and likely causes."""
    worst = _worst_by_parameter(report.failures)
    lines = "".join(
        f"\n  {item.parameter!r}: off by {item.error:.3g} of its norm "
        f"(example {item.sample}, {item.mode} mode{item.place})"
        for item in list(worst.values())[:12]
    )
    where = ""
    if report.first_module is not None:
        where = (
            f"\nThe first module whose output for an example depends on its batch: {report.first_module!r}."
        )
    return (
        "self-check: the gradient of an example in its batch is not its gradient alone; it differs by more than "
        f"{report.tolerance:g} for {len(worst)} parameters:{lines}{where}{hint}\nLikely causes: normalisation "
        "over the batch, padding that is not masked, a layer whose first dimension is not the batch, rows that the "
        "model sorts, a loss that mixes examples or is divided by their number, or, for errors below 0.01 on a GPU, "
        "convolutions in TF32, torch's default (set torch.backends.cudnn.allow_tf32 = False). (These numbers are "
        "NOT PRIVATE.)"
    )
