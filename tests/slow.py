"""The mark `slow`: cases that `make test` leaves to `make test-slow`."""

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import pytest


def slow_cases(*values: Any) -> list[Any]:
    """The values of a parameter, each with the mark `slow`."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def slow_unless(quick: Callable[..., bool], cases: Iterable[tuple[Any, ...]]) -> list[Any]:
    """The cases of a parametrisation; those of which `quick` is false carry the mark `slow`."""
    return [case if quick(*case) else pytest.param(*case, marks=pytest.mark.slow) for case in cases]


def in_turns(*parameters: Iterable[Any]) -> list[Any]:
    """Every combination of the parameters' values, slow where the values' places add up to an odd number.

    So about half of them are quick, and no two of these differ in a single parameter by a single place.
    """
    placed = itertools.product(*(list(enumerate(values)) for values in parameters))
    combinations = [list(zip(*case, strict=True)) for case in placed]
    quick = {values for places, values in combinations if sum(places) % 2 == 0}
    return slow_unless(lambda *values: values in quick, [values for _, values in combinations])


def covering(
    *parameters: Iterable[Any], together: int = 2, also: Collection[tuple[Any, ...]] = ()
) -> list[Any]:
    """Every combination of the parameters' values, slow but for the few that cover all values, or pairs of values.

    Args:
        parameters: the values of each.
        together: the values of this many parameters occur in every combination in some quick case. With 1 there are
            about as many quick cases as the longest parameter has values, with 2 (pairwise) as the two longest have
            pairs of values.
        also: combinations that are quick too.
    """
    combinations = list(itertools.product(*parameters))
    covered_by = [{*itertools.combinations(enumerate(case), together)} for case in combinations]
    quick = [combinations.index(case) for case in also]
    missing = set().union(*covered_by).difference(*(covered_by[number] for number in quick))
    while missing:
        quick.append(max(range(len(combinations)), key=lambda number: len(covered_by[number] & missing)))
        missing -= covered_by[quick[-1]]
    return [
        case if number in quick else pytest.param(*case, marks=pytest.mark.slow)
        for number, case in enumerate(combinations)
    ]


def thin(items: Sequence[pytest.Item]) -> None:
    """Mark as slow all but every n-th case of the tests with the mark `thinned(n)`.

    With keywords, such as `thinned(n, backend="triton")`, the mark is about the cases with these parameters only. Cases
    that a line of the privacy design or one of its planted faults names stay in the default suite.
    """
    from tests.plant.lines import LINES

    named = {test for line in LINES for test in line.tests}
    named |= {test for line in LINES for fault in line.faults for test in fault.tests}
    seen: Counter[tuple[str, str]] = Counter()
    for item in items:
        case = getattr(item, "callspec", None)
        parameters = case.params if case else {}
        for mark in item.iter_markers("thinned"):
            if not mark.kwargs.items() <= parameters.items():
                continue
            test = item.nodeid.partition("[")[0], str(mark.kwargs)
            if seen[test] % mark.args[0] and item.nodeid not in named:
                item.add_marker(pytest.mark.slow)
            seen[test] += 1
