"""privacy.md 19: a drawn logical batch is stepped on exactly once, whatever becomes of the pass that drew it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dpkernels.privacy import DPDataLoader
from tests.privacy.private_run import KEY, Run, private_run, train


def do(run: Run, logical: Any) -> None:
    for batch in logical:
        run.optimizer.backward(run.loss_fn(run.model, batch))
    run.optimizer.step()
    run.optimizer.zero_grad()


def test_a_pass_begun_while_a_batch_is_open_is_refused() -> None:
    run = private_run()
    logical = next(iter(run.loader))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"step\(\) was not called .*logical_batch\.parts"):
            next(iter(run.loader))
    run.optimizer.zero_grad()  # the way that the message says
    for part in logical.parts:
        run.optimizer.backward(run.loss_fn(run.model, logical.collate(part)))
    run.optimizer.step()
    run.optimizer.zero_grad()
    do(run, next(iter(run.loader)))  # a pass a step loses nothing
    assert run.engine.steps == 2


@pytest.mark.parametrize("again", [True, False], ids=["a loop anew", "next(iter(loader))"])
def test_an_empty_batch_that_is_skipped_is_noticed(again: bool) -> None:
    run = private_run(batch_size=1, key=KEY)

    def skipping() -> None:
        for _ in range(30):
            for logical in run.loader if again else [next(iter(run.loader))]:
                if not len(logical):
                    break
                do(run, logical)

    with pytest.raises(RuntimeError, match="A skipped step reveals that its batch is empty"):
        skipping()


def test_a_refused_pass_takes_nothing_from_the_one_under_way() -> None:
    run = private_run(key=KEY, physical_batch_size=1)
    logical = next(batches := iter(run.loader))
    reading = iter(logical)
    rows = [next(reading)]
    with pytest.raises(RuntimeError, match=r"step\(\) was not called"):
        next(iter(run.loader))
    rows += reading
    assert len(rows) == len(logical) > 2
    for batch in rows:
        run.optimizer.backward(run.loss_fn(run.model, batch))
    run.optimizer.step()
    do(run, next(batches))


def test_zero_grad_does_not_close_a_batch() -> None:
    run = private_run()
    next(iter(run.loader))
    run.optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"step\(\) was not called"):
        next(iter(run.loader))


class Places(Dataset):
    """Each example is its place; some cannot be read."""

    def __init__(self, size: int, broken: tuple[int, ...] = ()) -> None:
        self.size, self.broken = size, broken

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        if index in self.broken:
            raise OSError(f"example {index} cannot be read")
        return torch.tensor(index)


class Noted:
    """A sampler whose draws are kept."""

    def __init__(self, size: int, rate: float, seed: int = 0) -> None:
        self.random, self.size, self.rate = np.random.default_rng(seed), size, rate
        self.drawn: list[list[int]] = []

    def draw(self) -> np.ndarray:
        found = np.flatnonzero(self.random.random(self.size) < self.rate)
        self.drawn.append(found.tolist())
        return found


def loader_of(
    sampler: Noted, workers: int, *, persistent: bool = False, data: Dataset | None = None, steps: int = 8
) -> DPDataLoader:
    return DPDataLoader(
        DataLoader(
            Places(sampler.size) if data is None else data,
            batch_size=4,
            num_workers=workers,
            persistent_workers=persistent,
        ),
        sampler,
        physical_batch_size=2,
        epoch_steps=steps,
        before_pass=lambda: None,
        on_batch=lambda examples, **_: None,
        steps_taken=lambda: 0,
    )


def examples_of(logical: Any) -> list[int]:
    return [int(place) for batch in logical for place in batch]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("rate", [0.05])
def test_what_a_broken_off_pass_had_drawn_comes_next(workers: int, rate: float) -> None:
    """Workers draw ahead: passes of two batches, and one of eight at the end."""
    sampler = Noted(20, rate)
    loader = loader_of(sampler, workers)
    got = []
    for _ in range(3):
        for number, logical in enumerate(loader, start=1):
            got.append(examples_of(logical))
            if number == 2:
                break
    got += [examples_of(logical) for logical in loader]
    assert got == sampler.drawn
    assert len(got) == 14


class Given(Noted):
    """Draws what it was given."""

    def draw(self) -> np.ndarray:
        self.drawn.append([[1, 2], [3, 4, 5], [], [0, 6]][len(self.drawn) % 4])
        return np.array(self.drawn[-1], dtype=int)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_that_could_not_be_read_is_not_left_out(workers: int) -> None:
    """Else whoever is drawn beside that example would join fewer steps than is stated."""
    sampler, data = Given(8, 0.5), Places(8, broken=(3,))
    loader = loader_of(sampler, workers, data=data, steps=4)
    got: list[list[int]] = []
    handed_out: list[int] = []
    loader._on_batch = lambda examples, **_: handed_out.append(examples)

    def read() -> None:
        for logical in loader:
            got.append(examples_of(logical))

    with pytest.raises(OSError, match="example 3 cannot be read"):
        read()
    assert got == sampler.drawn[:1]
    data.broken = ()
    if len(handed_out) == 2:  # a worker had drawn it: it failed when read, and the optimizer has it open
        got.append(sampler.drawn[1])
    got += [examples_of(logical) for logical in loader]
    assert got == sampler.drawn


def test_a_batch_that_is_refused_comes_next() -> None:
    """As where the batch before it got no step."""
    sampler = Noted(20, 0.3)
    loader = loader_of(sampler, 0)
    refusals = [RuntimeError("refused")]

    def refuse_once(examples: int, **_: int) -> None:
        if refusals:
            raise refusals.pop()

    loader._on_batch = refuse_once
    with pytest.raises(RuntimeError, match="refused"):
        next(iter(loader))
    assert [examples_of(logical) for logical in loader] == sampler.drawn


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_of_two_iterators_the_older_ends_by_name(workers: int, persistent: bool) -> None:
    sampler = Noted(20, 0.3)
    loader = loader_of(sampler, workers, persistent=persistent and workers > 0)
    older: Iterator[Any] = iter(loader)
    got = [examples_of(next(older))]
    newer = iter(loader)
    got.append(examples_of(next(newer)))
    with pytest.raises(RuntimeError, match="another pass over this loader was begun"):
        next(older)
    got += [examples_of(logical) for logical in newer]
    assert got == sampler.drawn


def test_a_batch_of_an_older_pass_cannot_be_read_on() -> None:
    sampler = Noted(20, 0.5)
    loader = loader_of(sampler, 0)
    logical = iter(next(iter(loader)))
    next(logical)
    next(iter(loader))
    with pytest.raises(RuntimeError, match="another pass over this loader was begun"):
        next(logical)


def test_every_draw_is_a_step_however_passes_are_left() -> None:
    run = private_run(batch_size=1)
    draws, draw = [], run.loader._sampler.draw

    def noted() -> np.ndarray:
        draws.append(draw())
        return draws[-1]

    run.loader._sampler.draw = noted  # type: ignore[method-assign]
    for _ in range(30):
        do(run, next(iter(run.loader)))
    train(run, 3)
    assert run.engine.steps == 33
    assert len(draws) == 33 + len(run.loader._unread)  # read ahead, to come next
    assert any(not len(found) for found in draws)
