"""README.md of this folder names, for each line of the privacy design, tests that exist, here or where it says."""

import re
from pathlib import Path

HERE = Path(__file__).parent
TABLE = (HERE / "README.md").read_text(encoding="utf-8")


def test_every_line_of_the_design_has_a_row() -> None:
    rows = [int(row) for row in re.findall(r"^\| (\d+) \|", TABLE, flags=re.MULTILINE)]
    assert rows == [*range(1, 23)]


def test_every_test_that_is_named_exists() -> None:
    elsewhere = [HERE.parents[1] / path for path in re.findall(r"`(tests/\S+\.py)`", TABLE)]
    defined = {
        name
        for path in (*HERE.rglob("test_*.py"), *elsewhere)
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    named = set(re.findall(r"`(test_\w+)`", TABLE))
    assert named
    assert named <= defined, sorted(named - defined)
