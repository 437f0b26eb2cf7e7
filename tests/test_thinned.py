"""The mark `thinned`: every n-th case runs by default, and so does each that the privacy design names."""

import pytest

from tests.plant.lines import LINES
from tests.slow import thin


class Case:
    """A collected case, as far as `thin` looks at it."""

    def __init__(self, nodeid: str, every: int | None) -> None:
        self.nodeid = nodeid
        self._every = every
        self.marks: list[str] = []

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return pytest.Mark("thinned", (self._every,), {}, _ispytest=True) if self._every else None

    def add_marker(self, mark: pytest.MarkDecorator) -> None:
        self.marks.append(mark.name)


def test_every_nth_case_is_quick_and_so_is_a_named_one() -> None:
    named = next(
        test for line in LINES for fault in line.faults for test in fault.tests if test.endswith("]")
    )
    cases = [Case(f"tests/a.py::test_a[{number}]", 3) for number in range(7)]
    cases += [Case("tests/a.py::test_b[0]", None)]
    cases += [Case(named.partition("[")[0] + "[x]", 3), Case(named, 3)]
    thin(cases)  # type: ignore[arg-type]
    assert [case.marks for case in cases[:7]] == [[], ["slow"], ["slow"], [], ["slow"], ["slow"], []]
    assert [case.marks for case in cases[7:]] == [[], [], []]
