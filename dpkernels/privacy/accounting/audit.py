"""Claims about a finished run, held against its ledger."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpkernels.errors import UserError
from dpkernels.privacy.accounting.accountant import epsilon
from dpkernels.privacy.accounting.ledger import Run, read_ledger
from dpkernels.rounding import shown_epsilon, shown_sigma


class ClaimError(UserError, ValueError):
    """A record says something else than the ledger does."""


@dataclass(frozen=True)
class AuditedLedger:
    """What the ledger says, once its chain of hashes was verified.

    Attributes:
        path: of the ledger.
        runs: starts of the training, resumptions included.
        steps: steps it counts.
        head: hash of its last line.
        epsilon: ε recomputed from it, at the run's δ; None where a run used no noise.
        sensitivity: L2 sensitivity of the clipped sum that the noise is scaled to; of adaptive clipping, in the first
            step.
        noisy_count: the constants of adaptive clipping's counts (`dpkernels.privacy.step.adaptive.NoisyCount`), which
            were found to spend, with the sums' noise, what `noise_multiplier` says; None for other clippings.
    """

    path: Path
    runs: int
    steps: int
    head: str
    epsilon: float | None
    sensitivity: float | None
    noisy_count: Mapping[str, float] | None = None


def audit_ledger(path: Path, privacy: Mapping[str, Any], record: str = "the record") -> AuditedLedger:
    """Verify a run's ledger, and hold what is claimed of the run against it.

    Args:
        path: of the ledger.
        privacy: the claims: steps, noise_multiplier, sample_rate, dataset_size, max_batch_size, unit, epsilon, delta,
            accountant.
        record: what makes them, for messages.

    Raises:
        ClaimError: there is no ledger, or it says otherwise, or that more was spent than is claimed.
        LedgerError: a line was edited, removed or inserted.
    """
    if not path.is_file():
        raise ClaimError(f"{path} is missing: without it nothing shows what was spent")
    ledger = read_ledger(path)
    mechanisms = {run.mechanism for run in ledger.runs if run.steps}
    if len(mechanisms) != 1:
        raise ClaimError(f"{path}: {len(mechanisms)} different mechanisms; a run has one")
    (mechanism,) = mechanisms
    runs = [run for run in ledger.runs if run.steps]  # the others are starts that failed before a step
    claims = {
        "steps": ledger.steps,
        "noise_multiplier": mechanism.noise_multiplier,
        "sample_rate": mechanism.sample_rate,
        "dataset_size": runs[0].settings["dataset_size"],
        "max_batch_size": mechanism.max_batch_size,
        "unit": runs[0].settings["unit"],
    }
    for key, ledger_value in claims.items():
        if privacy[key] != ledger_value:
            raise ClaimError(f"{record} says privacy.{key}={privacy[key]!r}, the ledger {ledger_value!r}")
    spent = None
    if mechanism.noise_multiplier > 0:
        spent = claimed_epsilon(privacy, ledger.steps, privacy["delta"], privacy["accountant"])
        if privacy["epsilon"] is None or privacy["epsilon"] < spent * (1 - 1e-6):
            raise ClaimError(
                f"{record} says epsilon={privacy['epsilon']}, the ledger's steps spend {shown_epsilon(spent, 4)} at "
                f"delta={privacy['delta']:g}"
                + (
                    ". Before this version truncated sampling (privacy.max_batch_size) was accounted for removing a "
                    "unit, not for adding one: a run of then spent what the ledger says"
                    if privacy["max_batch_size"] is not None
                    else ""
                )
            )
    sensitivities = {run.settings.get("sensitivity") for run in runs}
    sensitivity = sensitivities.pop() if len(sensitivities) == 1 else None
    count = _noisy_count(path, runs)
    return AuditedLedger(path, len(ledger.runs), ledger.steps, ledger.last_hash, spent, sensitivity, count)


def _noisy_count(path: Path, runs: Sequence[Run]) -> Mapping[str, float] | None:
    """The constants of the counts of adaptive clipping, once the noise of sums and counts was found to be that of σ."""
    counts = [run.settings.get("noisy_count") for run in runs]
    for run, count in zip(runs, counts, strict=True):
        if count is None and run.settings.get("clipping") == "adaptive":
            raise ClaimError(
                f"{path}: clipping is adaptive, and no noise of its counts is stated: they are not private"
            )
        sigma = run.mechanism.noise_multiplier
        if count is None or sigma == 0:
            continue
        # One unit's vote lies in [−γ, 1 − γ], in each of K counts; examples of a unit that are clipped apart all vote.
        votes = 1 if run.settings["clipping_unit"] == "speaker" else run.settings["max_examples_per_unit"]
        least = max(count["quantile"], 1 - count["quantile"]) * math.sqrt(count["counts"]) * votes
        if not count["sensitivity"] >= least * (1 - 1e-9):
            raise ClaimError(
                f"{path}: one {run.settings['unit']} adds up to {least:.6g} to the counts of adaptive clipping, and "
                f"the run says {count['sensitivity']:.6g}: its steps cost more than they count for"
            )
        # Two Gaussian releases of one batch are one, of the vector of both in units of their noise.
        together = 1 / math.hypot(1 / count["sums_noise_multiplier"], count["sensitivity"] / count["noise"])
        if not together >= sigma * (1 - 1e-9):
            raise ClaimError(
                f"{path}: the sums' noise and that of the count spend what a noise multiplier of "
                f"{shown_sigma(together, 6)} would, and the run says {shown_sigma(sigma, 6)}: its steps cost more "
                "than they count for"
            )
    return next((count for count in counts if count is not None), None)


def claimed_epsilon(privacy: Mapping[str, Any], steps: int, delta: float, accountant: str) -> float:
    """ε of a claimed mechanism at any δ, by either accountant; a large δ is not warned of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="delta=")
        return epsilon(
            privacy["noise_multiplier"],
            privacy["sample_rate"],
            steps,
            delta,
            accountant=accountant,
            max_batch_size=privacy["max_batch_size"],
            # N matters to the accountant for truncated batches only.
            dataset_size=privacy["dataset_size"] if privacy["max_batch_size"] is not None else None,
        )
