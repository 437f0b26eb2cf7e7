"""The mark `thinned`: every n-th case runs by default, and so does each that the privacy design names."""

from types import SimpleNamespace

import pytest

from tests.plant.lines import LINES
from tests.slow import thin


class Case:
    """A collected case, as far as `thin` looks at it."""

    def __init__(self, nodeid: str, every: int | None, of: str | None = None, backend: str = "torch") -> None:
        self.nodeid = nodeid
        self.callspec = SimpleNamespace(params={"backend": backend})
        self._every = every
        self._about = {"backend": of} if of else {}
        self.marks: list[str] = []

    def iter_markers(self, name: str) -> list[pytest.Mark]:
        assert name == "thinned"
        return [pytest.Mark(name, (self._every,), self._about, _ispytest=True)] if self._every else []

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


def test_a_thinned_parameter_leaves_the_other_cases_alone() -> None:
    backends = ("torch", "triton", "torch", "triton", "triton", "triton")
    cases = [Case(f"tests/a.py::test_a[{b}-{i}]", 3, "triton", b) for i, b in enumerate(backends)]
    thin(cases)  # type: ignore[arg-type]
    assert [case.marks for case in cases] == [[], [], [], ["slow"], ["slow"], []]
