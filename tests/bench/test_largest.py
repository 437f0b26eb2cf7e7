"""The search for the largest batch: what it returns fitted, and what is a step larger did not."""

from __future__ import annotations

import pytest

from bench.largest import largest


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
