"""tests/privacy/README.md, made of the lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.plant.data import Line

PATH = Path(__file__).resolve().parents[1] / "privacy" / "README.md"

HEAD = """\
# Which test holds which line of the privacy design

Each row is one test: the line of the design that it belongs to, what it holds, and the faults that are planted to show
that it can fail. `python -m tests.plant` plants each of them in a copy of the sources and says whether it is caught.

This file is written by `python -m tests.plant --write` from `tests/plant/lines`. Statistical tests use the tests' fixed
key, so that what holds once holds always; tests of freshness use the operating system's keys.
"""


def text(lines: Sequence[Line]) -> str:
    """The whole file."""
    return "\n".join([HEAD, *map(_section, lines)])


def _section(line: Line) -> str:
    rows = [f"## {line.number}. {line.claim}\n"]
    if line.without:
        rows.append(f"No fault is planted: {line.without}\n")
    if line.tests:
        rows += ["| line | test | holds that | faults that it catches |", "|---|---|---|---|"]
    for test, holds in line.tests.items():
        path, _, name = test.partition("::")
        faults = " · ".join(fault.name for fault in line.faults if test in map(_whole, fault.tests))
        rows.append(f"| {line.number} | `{path}`: `{name}` | {holds} | {faults} |")
    return "\n".join(rows) + "\n"


def _whole(test: str) -> str:
    """The test of a node id, without its parameters."""
    return test.partition("[")[0]
