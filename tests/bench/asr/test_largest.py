"""The search for the largest batch: what it returns fitted, and what is a step larger did not."""

from __future__ import annotations

import json

import pytest

from bench.asr.largest import largest
from bench.harness.machine import ROOT
from bench.harness.results import FOLDER


@pytest.mark.parametrize("guess", [1, 7, 100, 1000])
@pytest.mark.parametrize("limit", [1, 2, 99, 100, 1000])
def test_the_largest_that_fits(guess: int, limit: int) -> None:
    asked: list[int] = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= limit

    found = largest(fits, guess, 0.03)
    assert found in asked
    assert found <= limit <= max(found, found * 1.03 + 1)
    assert len(set(asked)) == len(asked)


def test_nothing_fits() -> None:
    assert largest(lambda size: False, 5, 0.03) == 0


def test_the_table_in_the_docs_is_what_was_measured() -> None:
    docs = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    (path,) = FOLDER.glob("*/largest.json")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    for row in rows:
        name = row["contender"] + (" + checkpointing" if row["checkpointing"] else "")
        cells = ["cannot run", "", ""]
        if "reason" not in row:
            cells = [
                f"{row['largest']:,}",
                f"{row['rate']:.0f}",
                f"{row['bytes_an_utterance'] / 2**20:.0f} MiB",
            ]
        line = " | ".join([f"| {name}", *cells]) + " |"
        assert line.replace("  ", " ") in docs.replace("  ", " "), line
    assert len(rows) == 6
