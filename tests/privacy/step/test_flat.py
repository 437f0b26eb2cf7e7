"""privacy.md 19: a loop over `loader.flat()` takes one step for each logical batch, also where it is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.privacy.private_run import KEY, Run, private_run

STEPS = 12


def small(**arguments: Any) -> Run:
    """Batches of two examples on average, some of them empty, in micro-batches of one."""
    arguments = {"batch_size": 2, "physical_batch_size": 1, "steps": STEPS, "lr": 0.1, "key": KEY} | arguments
    return private_run(**arguments)


def parameters(run: Run) -> list[Tensor]:
    return [p.detach().clone() for p in run.model.parameters()]


def nested(run: Run) -> list[int]:
    """The number of micro-batches of each logical batch."""
    counts = []
    for logical_batch in run.loader:
        for batch in logical_batch:
            run.optimizer.backward(run.loss_fn(run.model, batch))
        run.optimizer.step()
        run.optimizer.zero_grad()
        counts.append(len(logical_batch))
    return counts


def body(run: Run, batch: Any) -> None:
    run.optimizer.backward(run.loss_fn(run.model, batch))
    run.optimizer.step()
    run.optimizer.zero_grad()


def assert_as_nested(run: Run, **arguments: Any) -> list[int]:
    other = small(**arguments)
    counts = nested(other)
    assert {0, 1} < set(counts)  # empty ones, and some of several micro-batches
    assert run.engine.steps == other.engine.steps == STEPS
    assert all(torch.equal(a, b) for a, b in zip(parameters(run), parameters(other), strict=True))
    return counts


@pytest.mark.parametrize("unfused", [False, True])
def test_a_flat_loop_takes_the_nested_loops_steps(unfused: bool) -> None:
    run = small(unfused=unfused)
    batches = 0
    for batch in run.loader.flat():
        body(run, batch)
        batches += 1
    assert batches == sum(assert_as_nested(run, unfused=unfused))


def test_zero_grad_at_the_start_of_the_body_keeps_the_sums() -> None:
    run = small()
    for batch in run.loader.flat():
        run.optimizer.zero_grad()
        run.optimizer.backward(run.loss_fn(run.model, batch))
        run.optimizer.step()
    assert_as_nested(run)


@pytest.mark.parametrize("before_backward", [True, False])
def test_a_loop_that_is_left_begins_again_with_its_batch(before_backward: bool) -> None:
    """Every second micro-batch ends the pass: nothing of its logical batch is lost, and nothing is added twice."""
    run = small()
    seen, passes = 0, 0
    while run.engine.steps < STEPS:
        passes += 1
        for batch in run.loader.flat():
            seen += 1
            # A logical batch of n micro-batches needs n in one pass: the longer a pass, the later it is left.
            left = seen % (2 + passes // 4) == 0
            if left and before_backward:
                break
            body(run, batch)
            if left:
                break
        assert passes < 500
    assert passes > 5
    assert_as_nested(run)


def test_an_exception_in_the_body_loses_no_batch_and_a_nested_pass_may_follow() -> None:
    run = small()

    def failing() -> None:
        for number, batch in enumerate(run.loader.flat()):
            run.optimizer.backward(run.loss_fn(run.model, batch))
            if number == 3:
                raise ArithmeticError
            run.optimizer.step()
            run.optimizer.zero_grad()

    with pytest.raises(ArithmeticError):
        failing()
    nested(run)
    assert_as_nested(run)


def first_of_several(run: Run) -> tuple[Iterator[Any], Any]:
    """A flat pass, at the first micro-batch of a logical batch that has more."""
    batches = run.loader.flat()
    for batch in batches:
        drawn = run.optimizer._batch.drawn
        if drawn is not None and drawn > 1:
            return batches, batch
        body(run, batch)
    raise AssertionError("no logical batch of several micro-batches")


def test_a_micro_batch_that_is_not_back_propagated_is_refused() -> None:
    run = small()
    batches, batch = first_of_several(run)
    before = parameters(run), run.engine.steps
    with pytest.raises(RuntimeError, match="was not back-propagated"):
        run.optimizer.step()
    with pytest.raises(RuntimeError, match="was not back-propagated"):
        next(batches)
    for batch in run.loader.flat():  # noqa: B007
        break  # what the message says
    body(run, batch)
    assert run.engine.steps == before[1]
    assert all(torch.equal(a, b) for a, b in zip(parameters(run), before[0], strict=True))


def test_a_last_micro_batch_without_its_step_is_refused() -> None:
    run = small()
    batches, batch = first_of_several(run)

    def without_step() -> None:
        run.optimizer.backward(run.loss_fn(run.model, batch))
        for more in batches:
            run.optimizer.backward(run.loss_fn(run.model, more))

    with pytest.raises(RuntimeError, match=r"step\(\) was not called after the last micro-batch"):
        without_step()


def test_examples_that_were_not_handed_out_are_refused() -> None:
    """Another loader's batch, or a micro-batch given twice: the logical batch would have room for it."""
    run = small()
    _, batch = first_of_several(run)
    twice = [torch.cat([part, part]) for part in batch]
    with pytest.raises(RuntimeError, match="has handed out 1 of this logical batch"):
        run.optimizer.backward(run.loss_fn(run.model, twice))
    body(run, batch)
    with pytest.raises(RuntimeError, match="after 1 that were processed"):
        body(run, batch)


def test_a_second_step_after_one_micro_batch_is_refused() -> None:
    run = small()
    batches = run.loader.flat()
    body(run, next(batches))
    while run.optimizer._batch.drawn is not None:
        body(run, next(batches))
    steps = run.engine.steps
    with pytest.raises(RuntimeError, match="no logical batch is open"):
        run.optimizer.step()
    assert run.engine.steps == steps


def schedule(run: Run) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(run.optimizer, step_size=1, gamma=0.5)


def test_a_schedule_counts_the_steps_of_empty_batches_too() -> None:
    run = small()
    scheduler = schedule(run)
    rates = []
    for batch in run.loader.flat(after_step=scheduler.step):
        body(run, batch)
        rates.append(run.optimizer.param_groups[0]["lr"])
    assert run.optimizer.param_groups[0]["lr"] == 0.1 * 0.5**STEPS
    assert len(rates) > len(set(rates))


@pytest.mark.parametrize("first", [True, False], ids=["before step", "after step"])
def test_a_schedule_in_the_body_is_refused(first: bool) -> None:
    run = small()
    scheduler = schedule(run)
    _, batch = first_of_several(run)
    run.optimizer.backward(run.loss_fn(run.model, batch))
    before = run.engine.steps

    def rest(step: Callable[[], object], then: Callable[[], object]) -> None:
        step()
        then()
        run.optimizer.step()

    order = (scheduler.step, run.optimizer.step) if first else (run.optimizer.step, scheduler.step)
    with pytest.raises(RuntimeError, match=r"loader\.flat\(after_step=scheduler\.step\)"):
        rest(*order)
    assert run.engine.steps == before


def test_a_schedule_after_the_last_micro_batch_is_refused() -> None:
    run = small()
    scheduler = schedule(run)

    def training() -> None:
        for batch in run.loader.flat():
            body(run, batch)
            if run.optimizer._batch.drawn is None:
                scheduler.step()

    with pytest.raises(RuntimeError, match="the learning rate was changed in the body"):
        training()


def test_between_passes_the_learning_rate_may_change() -> None:
    run = small(steps=None)
    for epoch in range(2):
        run.optimizer.param_groups[0]["lr"] = 0.1 / (1 + epoch)
        for batch in run.loader.flat():
            body(run, batch)
    assert run.engine.steps == 2 * len(run.loader)
