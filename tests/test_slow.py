"""`make test` leaves out cases, never a property: what tests/privacy/README.md names has a case that is not slow."""

import importlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slow import covering, in_turns, slow_unless

TESTS = Path(__file__).resolve().parent


def is_slow(marked: Any) -> bool:
    """Whether a case of a parametrisation, a test or a module of tests carries the mark."""
    marks = getattr(marked, "marks", None) or getattr(marked, "pytestmark", ())
    return any(mark.name == "slow" for mark in (marks if isinstance(marks, list | tuple | set) else [marks]))


def has_a_quick_case(test: Any) -> bool:
    parametrised = [mark for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
    return not is_slow(test) and all(any(not is_slow(case) for case in mark.args[1]) for mark in parametrised)


def named() -> Iterator[tuple[str, str]]:
    """(module, test) of every test that the table of planted faults names; in it a file stands before its tests."""
    module = ""
    for name in re.findall(r"`((?:tests/)?[\w/]+\.py|test_\w+)`", (TESTS / "privacy/README.md").read_text()):
        if not name.endswith(".py"):
            yield module, name
            continue
        found = [TESTS.parent / name] if "/" in name else [*(TESTS / "privacy").rglob(name)]
        assert len(found) == 1, f"{name}: {found}"
        module = ".".join(found[0].relative_to(TESTS.parent).with_suffix("").parts)


def test_what_the_table_of_planted_faults_names_has_a_quick_case() -> None:
    tests = {*named()}
    assert len(tests) > 200
    missing, slow = [], []
    for module, name in sorted(tests):
        loaded = importlib.import_module(module)
        test = getattr(loaded, name, None)
        if test is None:
            missing.append(f"{module}: {name}")
        elif is_slow(loaded) or not has_a_quick_case(test):
            slow.append(f"{module}: {name}")
    assert not missing
    assert not slow


@pytest.mark.parametrize(
    "marks", [(pytest.mark.slow,), (pytest.mark.parametrize("x", [pytest.param(1, marks=pytest.mark.slow)]),)]
)
def test_a_test_of_slow_cases_only_would_be_seen(marks: tuple[Any, ...]) -> None:
    def test() -> None: ...

    assert has_a_quick_case(test)
    for mark in marks:
        test = mark(test)
    assert not has_a_quick_case(test)


def test_in_turns_every_value_has_a_quick_case_and_half_of_the_cases_are_slow() -> None:
    names, numbers = ["a", "b", "c"], [1, 2]
    cases = in_turns(names, numbers)
    quick = [case for case in cases if not is_slow(case)]
    assert len(cases) == 6
    assert quick == [("a", 1), ("b", 2), ("c", 1)]


@pytest.mark.parametrize(("together", "least"), [(1, 4), (2, 12)])
def test_few_quick_cases_cover_every_value_or_every_pair(together: int, least: int) -> None:
    parameters = ["a", "b", "c", "d"], [1, 2, 3], [True, False]
    cases = covering(*parameters, together=together, also=[("d", 1, False)])
    quick = [case for case in cases if not is_slow(case)]
    assert len(cases) == 24
    assert ("d", 1, False) in quick
    assert least <= len(quick) <= least + 3
    seen = {part for case in quick for part in itertools.combinations(enumerate(case), together)}
    everything = itertools.product(*parameters)
    assert seen == {part for case in everything for part in itertools.combinations(enumerate(case), together)}


def test_the_mark_is_on_what_is_not_quick() -> None:
    quick, slow = slow_unless(lambda name, number: number < 2, [("a", 1), ("b", 2)])
    assert quick == ("a", 1)
    assert (slow.values, is_slow(slow)) == (("b", 2), True)
