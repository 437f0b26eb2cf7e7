"""The mark `slow`: cases that `make test` leaves to `make test-slow`."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest


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
