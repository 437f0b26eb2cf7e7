"""Ordinary training in the shape of the private loop."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import TensorDataset

from dpkernels.plain import PlainLoader, PlainOptimizer

X = torch.arange(40.0)[:, None]


def drawn(loader: PlainLoader) -> list[list[float]]:
    return [[float(x) for (batch,) in logical for x in batch] for logical in loader]


def loader(**options: int) -> PlainLoader:
    return PlainLoader(
        TensorDataset(X), [1] * 40, **{"batch_size": 10, "steps": 5, "physical_batch_size": 3, **options}
    )


def test_logical_batches_are_poisson_and_the_seed_s() -> None:
    steps = drawn(loader())
    assert len(steps) == 5
    assert len({len(step) for step in steps}) > 1
    assert steps == drawn(loader())
    assert steps != drawn(loader(seed=1))
    assert all(len(batch) <= 3 for logical in loader() for (batch,) in logical)
    assert all(len(step) == 40 for step in drawn(loader(batch_size=40)))


def test_a_later_start_draws_what_the_whole_run_drew() -> None:
    later = loader()
    later.first_step = 3
    assert drawn(later) == drawn(loader())[3:]


def test_the_gradient_is_the_sum_over_the_expected_batch() -> None:
    model = nn.Linear(1, 1, bias=False)
    optimizer = PlainOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), batch_size=10)
    before = float(model.weight)
    for part in (X[:3], X[3:5]):
        optimizer.backward(model(part).sum(1))
    optimizer.step()
    assert abs(before - float(model.weight) - float(X[:5].sum()) / 10) < 1e-5
