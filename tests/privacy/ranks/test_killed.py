"""A rank that is killed ends the run on all, soon, and no step that anyone took is missing in the ledger."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from dpkernels.privacy import read_ledger
from tests.privacy.ranks import jobs
from tests.privacy.ranks.processes import Processes

# where rank 1 dies, the steps that are counted then, and what a later step on the others raises
WHERE = {
    "the exchange of sums": (2, "RuntimeError: a step failed after it was counted"),
    "the exchange of parameters": (2, "RuntimeError: a step failed after it was counted"),
    "a backward": (1, "step() was not called for the previous logical batch"),
    "the meeting": (1, "step() was not called for the previous logical batch"),
}


@pytest.mark.parametrize(
    "where",
    [pytest.param(where, marks=[pytest.mark.slow] * (place > 0)) for place, where in enumerate(WHERE)],
)
def test_a_killed_rank_ends_all_and_no_step_goes_uncounted(where: str, tmp_path: Path) -> None:
    counted, later = WHERE[where]
    ledger = tmp_path / "ledger.jsonl"
    with closing(Processes(tmp_path, 3)) as processes:
        first, killed, third = processes.run(jobs.dies, 3, where, ledger)
    assert killed is None
    for part in (first, third):
        assert part["steps"] == counted
        assert "RanksError" in part["raised"][0]
        assert later in part["raised"][1]
    assert read_ledger(ledger).steps == counted
