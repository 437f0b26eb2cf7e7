"""The noise of a plan by both accountants, and the bound on an attacker."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest

from dpkernels.privacy import DELTAS, Sampling, detection_bounds, epsilon, plan_noise


def sampled(count: int, batch_size: int, max_batch_size: int | None = None) -> Sampling:
    return Sampling("example", count, batch_size / count, batch_size, 1, max_batch_size)


@pytest.mark.slow  # its σ is that of test_accounting.py
def test_noise_for_the_papers_setting() -> None:
    """σ = 0.694 (dp-accounting's PLD) for ε = 10, δ = 3.52e-6, N = 281,241, batch 4096, 2000 steps."""
    made = plan_noise(sampled(281241, 4096), epsilon=10, delta=3.52e-6, steps=2000)
    assert made.noise_multiplier == 0.694
    assert made.noise_multiplier_other is not None
    assert made.epsilon_other is not None
    assert made.noise_multiplier_other > made.noise_multiplier
    assert made.epsilon <= 10 < made.epsilon_other
    assert made.sample_rate == pytest.approx(4096 / 281241)
    assert made.epochs == pytest.approx(29.13, abs=0.01)
    steps, curve = zip(*made.epsilon_at, strict=True)
    assert steps == (200, 500, 1000, 1500, 2000)
    assert list(curve) == sorted(curve)
    assert curve[-1] == made.epsilon


def test_epsilon_for_given_noise_and_truncated_sampling() -> None:
    given: dict[str, Any] = {"noise_multiplier": 4.0, "delta": 1e-3, "steps": 20}
    by_hand = plan_noise(sampled(200, 10), **given)
    cut = plan_noise(sampled(200, 10, max_batch_size=29), **given)
    assert by_hand.noise_multiplier_other is None
    assert cut.epsilon_other is None  # RDP has no rule for it
    assert cut.epsilon == pytest.approx(by_hand.epsilon, rel=0.05)
    assert by_hand.to_dict()["steps"] == 20


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "exactly one of"),
        ({"epsilon": 1.0, "noise_multiplier": 1.0}, "exactly one of"),
        ({"noise_multiplier": 0.0}, "epsilon is infinite"),
    ],
)
def test_refusals(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_noise(sampled(1000, 50), delta=1e-4, steps=20, **values)  # type: ignore[arg-type]


def test_detection_bounds_against_the_gaussian_mechanism() -> None:
    """Full batches: the exact trade-off is known, β = Φ(Φ⁻¹(α) + √T/σ); the bound is above, and not far."""
    sigma, steps = 4.0, 4
    normal = statistics.NormalDist()
    pairs = [(epsilon(sigma, 1.0, steps, delta), delta) for delta in (1e-5, *DELTAS)]
    for alarms, bound in detection_bounds(pairs):
        exact = normal.cdf(normal.inv_cdf(alarms) + math.sqrt(steps) / sigma)
        assert exact <= bound < 1.35 * exact + 0.002
