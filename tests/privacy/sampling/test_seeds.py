"""privacy.md 9: what a private run draws stays secret: global generators that someone seeds are noticed."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch

from dpkernels.privacy.rng.model_draws import SecretSeeds
from tests.privacy.private_run import KEY, Run, private_run


def do(run: Run, logical: object) -> None:
    for batch in logical:  # type: ignore[attr-defined]
        run.optimizer.backward(run.loss_fn(run.model, batch))
    run.optimizer.step()
    run.optimizer.zero_grad()


def test_a_seed_set_before_the_loop_is_replaced_and_said() -> None:
    run = private_run()
    torch.manual_seed(0)
    batches = iter(run.loader)
    with pytest.warns(UserWarning, match="torch's generator was seeded after make_private"):
        logical = next(batches)
    assert torch.initial_seed() != 0
    do(run, logical)
    torch.manual_seed(1)  # between two batches
    with pytest.warns(UserWarning, match=r"Take torch\.manual_seed out of the training loop"):
        do(run, next(batches))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "torch.* generator was seeded")
        do(run, next(batches))


def test_a_seed_set_within_a_batch_is_refused_and_costs_nothing() -> None:
    run = private_run(physical_batch_size=40)
    logical = next(iter(run.loader))
    (part,) = logical.parts
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="within a logical batch: what this forward drew is known"):
        do(run, logical)
    assert run.engine.steps == 0
    run.optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="within a logical batch"):  # a second forward would be no better
        run.optimizer.backward(run.loss_fn(run.model, logical.collate(part)))


@pytest.mark.parametrize(
    "seed", [lambda: random.seed(0), lambda: np.random.seed(0)], ids=["Python's", "numpy's"]
)
def test_what_tells_no_seed_is_seeded_anew_for_every_batch(seed: Callable[[], None]) -> None:
    def drawn() -> tuple[float, float]:
        run = private_run()
        batches = iter(run.loader)
        for _ in range(2):
            seed()
            logical = next(batches)
            found = random.random(), np.random.rand()
            do(run, logical)
        return found

    (a, b), (c, d) = drawn(), drawn()
    assert a != c
    assert b != d


def test_a_passs_workers_get_secret_seeds_too() -> None:
    """They are seeded from torch's generator when the pass begins, before any batch."""
    run = private_run()
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="seeded after make_private"):
        run.optimizer.begin_pass()
    assert torch.initial_seed() != 0


@pytest.mark.parametrize("arguments", [{"sigma": 0.0}, {"key": KEY}], ids=["without noise", "a test's key"])
def test_where_nothing_is_claimed_seeds_are_the_users(arguments: dict) -> None:
    run = private_run(**arguments)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "torch.* generator was seeded")
        logical = next(iter(run.loader))
    assert torch.initial_seed() == 3
    for batch in logical:
        run.optimizer.backward(run.loss_fn(run.model, batch))


def test_a_seed_that_is_put_back_is_no_other_seed() -> None:
    run = private_run()
    with torch.random.fork_rng():
        torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "torch.* generator was seeded")
        do(run, next(iter(run.loader)))


def test_a_seed_that_is_put_back_after_the_forward_is_refused_once() -> None:
    """The masks of this forward are known; those of the next one are not."""
    run = private_run(physical_batch_size=40)
    logical = next(iter(run.loader))
    (part,) = logical.parts
    batch = next(iter(logical))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        losses = run.loss_fn(run.model, batch)
    with pytest.raises(RuntimeError, match=r"within a logical batch.*torch\.random\.fork_rng"):
        run.optimizer.backward(losses)
    run.optimizer.zero_grad()
    run.optimizer.backward(run.loss_fn(run.model, logical.collate(part)))
    run.optimizer.step()


def test_forwards_that_are_not_trained_on_may_be_seeded() -> None:
    run = private_run(physical_batch_size=40)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        run.loss_fn(run.model, run.data[[0, 1]])  # before the batch
    logical = next(iter(run.loader))
    (part,) = logical.parts
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        run.loss_fn(run.model, run.data[[0, 1]])
    run.engine.self_check(run.loss_fn)  # under seeds of its own
    run.optimizer.backward(run.loss_fn(run.model, logical.collate(part)))
    run.optimizer.step()


def test_generators_of_every_gpu_are_looked_at() -> None:
    seeds = SecretSeeds()
    kept, other = Mock(), Mock()
    kept.initial_seed.return_value, other.initial_seed.return_value = torch.initial_seed(), 0
    with (
        patch("torch.cuda.is_initialized", return_value=True),
        patch("torch.cuda.default_generators", (kept, other), create=True),
    ):
        assert seeds.replaced() == ["torch.cuda's (device 1)"]
