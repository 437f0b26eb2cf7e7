"""The lines of the privacy design in tests/plant: their tests exist and run by default, their faults can be planted.

Whether the faults are caught is what `python -m tests.plant` asks.
"""

from __future__ import annotations

import ast
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from tests.plant import readme
from tests.plant.data import Line
from tests.plant.lines import LINES

ROOT = Path(__file__).resolve().parents[2]
by_line = pytest.mark.parametrize("line", LINES, ids=lambda line: str(line.number))


@cache
def defined_in(path: str) -> dict[str, bool]:
    """The tests of a file by name, and whether the default suite leaves them out."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    marks = [
        ast.unparse(node.value) for node in tree.body if isinstance(node, ast.Assign) and marks_all(node)
    ]
    return {
        node.name: any("mark.slow" in mark for mark in [*marks, *map(ast.unparse, node.decorator_list)])
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def marks_all(node: ast.Assign) -> bool:
    return ast.unparse(node.targets[0]) == "pytestmark"


def test_every_line_of_the_design_is_there() -> None:
    assert [line.number for line in LINES] == [*range(1, 27)]


@by_line
def test_a_line_has_faults_or_says_why_it_has_none(line: Line) -> None:
    assert bool(line.faults) != bool(line.without)
    assert line.tests or line.without


@by_line
def test_every_test_of_a_line_exists_and_runs_by_default(line: Line) -> None:
    for test, holds in line.tests.items():
        path, _, name = test.partition("::")
        assert defined_in(path).get(name) is False, f"{test} is not there, or slow"
        assert holds


def test_faults_have_names_of_their_own() -> None:
    assert [
        name
        for name, count in Counter(fault.name for line in LINES for fault in line.faults).items()
        if count > 1
    ] == []


@by_line
def test_the_faults_of_a_line_can_be_planted(line: Line) -> None:
    for fault in line.faults:
        source = (ROOT / fault.path).read_text(encoding="utf-8")
        assert source.count(fault.old) == 1, (
            f"{fault.name}: its text is not in {fault.path}, or more than once"
        )
        compile(source.replace(fault.old, fault.new), fault.path, "exec")


@by_line
def test_what_catches_a_fault_is_a_test_of_its_line(line: Line) -> None:
    for fault in line.faults:
        assert fault.tests
        assert {test.partition("[")[0] for test in fault.tests} <= line.tests.keys(), fault.name


def test_the_readme_is_that_of_the_lines() -> None:
    assert readme.PATH.read_text(encoding="utf-8") == readme.text(LINES), "run python -m tests.plant --write"
