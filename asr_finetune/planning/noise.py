"""The noise that a target ε needs, or the ε that a noise spends, by both accountants."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from asr_finetune.config.schema import ConfigError
from dpkernels.privacy import Sampling
from dpkernels.privacy import epsilon as epsilon_of
from dpkernels.privacy import noise_multiplier as sigma_for

CHECKPOINTS = (0.1, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Plan:
    """What a run would spend.

    Attributes:
        units: N, number of privacy units.
        unit: what one of them is.
        epsilon: what the noise spends, by `accountant`.
        target_epsilon: the target; None when σ was given.
        delta: δ.
        batch_size: expected logical batch, in utterances; of speakers, its bound.
        per_unit: most utterances of one unit in a step.
        steps: logical steps.
        max_batch_size: capacity of truncated Poisson sampling, or None.
        accountant: "pld" or "rdp".
        noise_multiplier: σ by it (the one to train with).
        noise_multiplier_other: σ by the other accountant for the same target; None with truncated sampling or when
            σ was given.
        sample_rate: q: of utterances batch_size / N, of speakers batch_size / (per_unit · N).
        epochs: expected times that each unit is drawn, q × steps.
        epsilon_at: (step, ε) on the way.
        epsilon_other: ε at the end with `noise_multiplier` by the other accountant; None with truncated sampling.
    """

    units: int
    unit: str
    epsilon: float
    target_epsilon: float | None
    delta: float
    batch_size: int
    per_unit: int
    steps: int
    max_batch_size: int | None
    accountant: str
    noise_multiplier: float
    noise_multiplier_other: float | None
    sample_rate: float
    epochs: float
    epsilon_at: list[tuple[int, float]]
    epsilon_other: float | None

    @property
    def other(self) -> str:
        """The other accountant."""
        return {"pld": "RDP", "rdp": "PLD"}[self.accountant]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def plan(
    sampling: Sampling,
    *,
    delta: float,
    steps: int,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    accountant: Literal["pld", "rdp"] = "pld",
) -> Plan:
    """σ for a target ε (or ε for a given σ), by PLD and by RDP.

    Args:
        sampling: who is drawn, with what probability: `sampling.sampling_of` a run, or `sampling.assumed_sampling`.
        delta: δ in (0, 1).
        steps: logical steps.
        epsilon: target ε; or
        noise_multiplier: σ > 0. Exactly one of the two.
        accountant: the one that a run is held to.

    Raises:
        ValueError: an argument out of range, named.
    """
    if (epsilon is None) == (noise_multiplier is None):
        raise ConfigError(
            f"plan: give exactly one of --epsilon and --noise-multiplier, got {epsilon} and "
            f"{noise_multiplier}"
        )
    if noise_multiplier is not None and not noise_multiplier > 0:
        raise ConfigError(
            f"plan: --noise-multiplier {noise_multiplier} must be above 0: without noise epsilon is infinite"
        )
    rate, capacity, count = sampling.sample_rate, sampling.max_batch_size, sampling.units
    sampled: dict[str, Any] = {"max_batch_size": capacity, "dataset_size": count}
    other: Literal["pld", "rdp"] = "rdp" if accountant == "pld" else "pld"
    sigma_other = None
    if noise_multiplier is not None:
        sigma = noise_multiplier
    else:
        assert epsilon is not None
        sigma = sigma_for(epsilon, delta, rate, steps, accountant=accountant, **sampled)
        if capacity is None:
            sigma_other = sigma_for(epsilon, delta, rate, steps, accountant=other, dataset_size=count)
    marks = sorted({max(1, round(share * steps)) for share in CHECKPOINTS})
    curve = epsilon_of(sigma, rate, marks, delta, accountant=accountant, **sampled)
    by_other = None
    if capacity is None:
        by_other = epsilon_of(sigma, rate, steps, delta, accountant=other, dataset_size=count)
    return Plan(
        units=count,
        unit=sampling.unit,
        epsilon=curve[-1],
        target_epsilon=epsilon,
        delta=delta,
        batch_size=sampling.expected_batch_size,
        per_unit=sampling.per_unit,
        steps=steps,
        max_batch_size=capacity,
        accountant=accountant,
        noise_multiplier=sigma,
        noise_multiplier_other=sigma_other,
        sample_rate=rate,
        epochs=rate * steps,
        epsilon_at=list(zip(marks, curve, strict=True)),
        epsilon_other=by_other,
    )
