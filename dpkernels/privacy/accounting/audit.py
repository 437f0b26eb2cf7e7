"""Claims about a finished run, held against its ledger."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpkernels.errors import UserError
from dpkernels.privacy.accounting.accountant import epsilon
from dpkernels.privacy.accounting.ledger import read_ledger
from dpkernels.rounding import shown_epsilon


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
        sensitivity: L2 sensitivity of the clipped sum that the noise is scaled to.
    """

    path: Path
    runs: int
    steps: int
    head: str
    epsilon: float | None
    sensitivity: float | None


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
    return AuditedLedger(path, len(ledger.runs), ledger.steps, ledger.last_hash, spent, sensitivity)


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
