"""An audit from outside exposes faults of the engine, and not an honest run; `tests.auditing.faults` prints it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.auditing.faults import FAULTS, PAGE, RECORD, UNSEEN, audited, page, wrong
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
def test_with_1000_canaries_every_gross_fault_is_exposed(fault: str) -> None:
    seen, bound = exposed(fault, 1000)
    assert seen is (fault not in ("none", *UNSEEN))
    if fault == "none":
        assert bound > 0  # the attack works: an honest run shows something, and less than it spent


def test_the_page_has_the_table_of_the_record() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    text = PAGE.read_text(encoding="utf-8")
    assert page(text, record) == text
    assert {audit["fault"] for audit in record["audits"]} == set(FAULTS)
    assert wrong(record) == []


def test_the_command_fails_for_an_honest_run_that_is_exposed_and_a_gross_fault_that_never_is() -> None:
    def audits(fault: str, canaries: int, *bounds: float) -> dict[str, object]:
        return {"fault": fault, "canaries": canaries, "stated": 2.0, "bounds": bounds}

    fine = [audits("none", 10, 0.1, 2.0), audits("no noise", 10, 0.0), audits("no noise", 20, 0.0, 2.1)]
    unseen = [audits(fault, 20, 0.0) for fault in UNSEEN]
    assert wrong({"audits": fine + unseen}) == []
    assert wrong({"audits": [*fine, audits("none", 10, 0.1, 2.1)]}) == ["none, 10 canaries: 1 of 2 exposed"]
    assert wrong({"audits": [*fine, audits("no clipping", 20, 2.0)]}) == [
        "no clipping, 20 canaries: 0 of 1 exposed"
    ]
