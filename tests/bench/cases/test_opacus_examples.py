"""The group *opacus*: each of its models trains privately, with the exact clipped sums."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.cases.models import CASES
from bench.contenders import registry
from bench.harness.checker import OK, check
from bench.names import NON_PRIVATE, ours
from bench.test_opacus import SIZES
from tests.slow import slow_cases


@pytest.mark.parametrize("name", ["mnist", "imdb", "char-lstm", "bert", *slow_cases("cifar10", "resnet18")])
def test_its_models_are_private(name: str) -> None:
    case = replace(CASES[name], width=64, layers=1)
    shown = {key: factory for key, factory in registry().items() if key in (NON_PRIVATE, ours())}
    verdicts = check(shown, case, case.model(28), case.batch(3, 28))
    assert {key: verdict.status for key, verdict in verdicts.items()} == {NON_PRIVATE: OK, ours(): OK}


def test_every_model_has_its_size() -> None:
    assert set(SIZES) == {"mnist", "cifar10", "resnet18", "imdb", "char-lstm", "bert"}
    assert set(SIZES) <= set(CASES)
