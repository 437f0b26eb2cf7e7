"""An audit from outside exposes faults of the engine, and not an honest run; `tests.auditing.faults` prints it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.auditing.faults import FAULTS, audited
from tests.privacy.private_run import KEY


def exposed(fault: str, canaries: int, **options: int) -> tuple[bool, float]:
    coins = np.random.default_rng(5).random(canaries) < 0.5
    bound, stated = audited(fault, canaries, key=KEY, coins=coins, **options)
    assert 1.5 < stated <= 2.0
    return bound.epsilon > stated, bound.epsilon


def test_a_run_without_noise_is_exposed_and_an_honest_one_is_not() -> None:
    assert exposed("none", 120)[0] is False
    assert exposed("no noise", 120)[0] is True


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_with_1000_canaries_every_fault_is_exposed(fault: str) -> None:
    seen, bound = exposed(fault, 1000)
    assert seen is (fault != "none")
    if fault == "none":
        assert bound > 0  # the attack works: an honest run shows something, and less than it spent
