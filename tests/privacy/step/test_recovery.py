"""privacy.md 7, 10, 11: a micro-batch that runs out of memory is done again in parts, and the step is the same step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dpkernels.nn import Record, Tape
from dpkernels.nn.recording.row_check import _Weighted
from dpkernels.privacy import back_propagate, read_ledger
from dpkernels.privacy.sampling.logical_batch import LogicalBatch
from dpkernels.privacy.step.optimizer import DPOptimizer
from dpkernels.privacy.step.strategies import Strategy
from dpkernels.privacy.step.sums import BatchSums
from tests.privacy.private_run import KEY, Net, Run, losses_of, private_run

STRATEGIES = ("bookkeeping", "mixed", "two_pass", "per_layer")
FITS = 3  # examples that a micro-batch may hold where memory is short
STEPS = 4


class Shortage:
    """Raises torch.OutOfMemoryError at one point of every micro-batch of more than `fits` examples."""

    def __init__(self, patched: pytest.MonkeyPatch, point: str, fits: int = FITS) -> None:
        self.raised = 0
        self._fits = fits
        getattr(self, f"_in_{point}")(patched)

    def _check(self, examples: int) -> None:
        if examples > self._fits:
            self.raised += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    def _in_forward(self, patched: pytest.MonkeyPatch) -> None:
        """Past the first trained layer, so that its use is counted."""
        original = Net.forward

        def forward(net: Net, x: Tensor) -> Tensor:
            out = original(net, x)
            self._check(len(x))
            return out

        patched.setattr(Net, "forward", forward)

    def _in_backward(self, patched: pytest.MonkeyPatch, *, only_second: bool = False) -> None:
        """At the third record of a backward."""
        streams: list[bool] = []  # of the micro-batch: whether another backward follows
        seen = 0
        original_open, original_add, original_stream = Tape.open, Tape.add, Strategy._stream

        def open_(tape: Tape, batch_size: int, sink: Any = None, **options: Any) -> None:
            nonlocal seen
            seen = 0
            original_open(tape, batch_size, sink, **options)

        def add(tape: Tape, record: Record) -> None:
            nonlocal seen
            if isinstance(tape.inspector, _Weighted):  # the row check's own backward: nothing is summed yet
                return original_add(tape, record)
            seen += 1
            if seen == 3 and not (only_second and streams[-1]):
                self._check(record.batch_size)
            original_add(tape, record)

        def stream(
            strategy: Strategy, losses: Tensor, take: Callable, unit: int, *, again: bool = False
        ) -> None:
            streams.append(again)
            original_stream(strategy, losses, take, unit, again=again)

        patched.setattr(Tape, "open", open_)
        patched.setattr(Tape, "add", add)
        patched.setattr(Strategy, "_stream", stream)

    def _in_second_backward(self, patched: pytest.MonkeyPatch) -> None:
        self._in_backward(patched, only_second=True)

    def _in_sums(self, patched: pytest.MonkeyPatch) -> None:
        original = BatchSums.add

        def add(batch: BatchSums, records: Any, factors: Tensor) -> None:
            original(batch, records, factors)
            self._check(len(factors))

        patched.setattr(BatchSums, "add", add)


POINTS = [(strategy, point) for strategy in STRATEGIES for point in ("forward", "backward", "sums")]
POINTS += [("two_pass", "second_backward")]


def trained(path: Path, strategy: str, **options: Any) -> tuple[Run, list[int], list[str]]:
    """A few steps through the loader; the run, the losses of each step, what was said."""
    run = private_run(
        sigma=1.0,
        key=KEY,
        ledger=path,
        strategy=strategy,
        lr=0.5,
        physical_batch_size=6,
        steps=STEPS,
        **options,
    )
    counts, said = [], []
    for logical in run.loader:
        losses = back_propagate(run.optimizer, logical, lambda b: losses_of(run.model, b), say=said.append)
        counts.append(sum(len(part) for part in losses))
        run.optimizer.step()
        run.optimizer.zero_grad()
    run.engine.close()
    return run, counts, said


@pytest.mark.thinned(5)
@pytest.mark.filterwarnings("ignore:no self_check")
@pytest.mark.parametrize(("strategy", "point"), POINTS)
def test_training_out_of_memory_gives_the_parameters_of_training_in_memory(
    strategy: str, point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, counts, said = trained(tmp_path / "whole", strategy)
    assert not said
    with monkeypatch.context() as patched:
        shortage = Shortage(patched, point)
        parts, counts_again, said = trained(tmp_path / "parts", strategy)
    assert shortage.raised == len(said) >= STEPS // 2
    assert all(line.startswith("NOT PRIVATE") for line in said)
    assert counts_again == counts
    for (name, first), second in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    for path in ("whole", "parts"):
        assert read_ledger(tmp_path / path).steps == STEPS


@contextmanager
def short_of_memory(point: str) -> Iterator[Shortage]:
    with pytest.MonkeyPatch.context() as patched:
        yield Shortage(patched, point)


@pytest.mark.parametrize(
    ("strategy", "point", "invalidates"),
    [
        ("bookkeeping", "forward", False),
        ("bookkeeping", "backward", False),
        ("bookkeeping", "sums", True),
        ("two_pass", "backward", False),
        ("two_pass", "second_backward", True),
        ("per_layer", "forward", False),
        ("per_layer", "backward", True),
    ],
)
def test_recover_says_what_a_failure_left(strategy: str, point: str, invalidates: bool) -> None:
    run = private_run(sigma=0, strategy=strategy)
    run.optimizer.begin_logical_batch(7)
    run.optimizer.backward(run.loss_fn(run.model, run.data[[0, 1]]))
    before = {p: total.clone() for p, total in run.optimizer._batch.sums.items()}
    with short_of_memory(point), pytest.raises(torch.OutOfMemoryError):
        run.optimizer.backward(run.loss_fn(run.model, run.data[[2, 3, 4, 5, 6]]))
    if invalidates:
        with pytest.raises(RuntimeError, match=r"zero_grad\(\).*recover\(\)"):
            run.optimizer.step()
    assert run.optimizer.recover() is invalidates
    for p, total in run.optimizer._batch.sums.items():
        assert torch.equal(total, torch.zeros_like(total) if invalidates else before[p])
    for part in ([0, 1],) if invalidates else ():
        run.optimizer.backward(run.loss_fn(run.model, run.data[part]))
    for part in ([2, 3], [4, 5, 6]):
        run.optimizer.backward(run.loss_fn(run.model, run.data[part]))
    run.optimizer.step()
    fresh = private_run(sigma=0, strategy=strategy).release((0, 1), (2, 3, 4, 5, 6))
    for name, p in run.model.named_parameters():
        torch.testing.assert_close(p.grad.double(), fresh[name], rtol=1e-5, atol=1e-8)


def test_nothing_is_counted_by_a_failure() -> None:
    run = private_run(strategy="per_layer")
    run.optimizer.begin_logical_batch(5)
    with short_of_memory("backward"), pytest.raises(torch.OutOfMemoryError):
        run.optimizer.backward(run.loss_fn(run.model, run.data[[0, 1, 2, 3, 4]]))
    assert run.optimizer.recover()
    with pytest.raises(RuntimeError, match="fewer examples"):  # they were dropped, and not done again
        run.optimizer.step()
    assert run.engine.steps == 0


# Always another attempt: what the batch itself would refuse to give again is not asked here.
ANYTHING = itertools.count().__next__


def check_invalidated_batch_is_done_again(strategy: str, point: str) -> None:
    run = private_run(sigma=0, strategy=strategy)
    run.optimizer.begin_logical_batch(7)
    batch = LogicalBatch(
        [[0, 1], [2, 3, 4, 5, 6]],
        iter([run.data[[0, 1]], run.data[[2, 3, 4, 5, 6]]]).__next__,
        _read(run),
        ANYTHING,
    )
    with short_of_memory(point):
        back_propagate(run.optimizer, batch, lambda b: run.loss_fn(run.model, b), say=lambda _: None)
    run.optimizer.step()
    fresh = private_run(sigma=0, strategy=strategy).release((0, 1), (2, 3, 4, 5, 6))
    for name, p in run.model.named_parameters():
        torch.testing.assert_close(p.grad.double(), fresh[name], rtol=1e-5, atol=1e-8)


def _read(run: Run) -> Callable[[list[int]], Any]:
    return lambda part: run.data[part]


@pytest.mark.parametrize(("strategy", "point"), [("per_layer", "backward"), ("two_pass", "second_backward")])
def test_a_invalidated_batch_is_done_again(strategy: str, point: str) -> None:
    check_invalidated_batch_is_done_again(strategy, point)


@pytest.mark.parametrize(("strategy", "point"), [("per_layer", "backward"), ("two_pass", "second_backward")])
def test_planted_invalidated_sums_that_are_kept_are_caught(
    strategy: str, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a failed backward had left the sums alone."""

    def kept(self: DPOptimizer) -> bool:
        self.tape.discard()
        self._batch.invalidated = False
        return False

    monkeypatch.setattr(DPOptimizer, "recover", kept)
    with pytest.raises(AssertionError):
        check_invalidated_batch_is_done_again(strategy, point)


def test_planted_restart_without_dropping_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every example again on top of the sums: more examples than were drawn."""

    def again(self: DPOptimizer) -> bool:
        self.tape.discard()
        self._batch.invalidated = False
        return True

    monkeypatch.setattr(DPOptimizer, "recover", again)
    run = private_run(strategy="per_layer")
    run.optimizer.begin_logical_batch(7)
    batches = iter([run.data[[0, 1]], run.data[[2, 3, 4, 5, 6]]])
    batch = LogicalBatch([[0, 1], [2, 3, 4, 5, 6]], batches.__next__, _read(run), ANYTHING)
    with short_of_memory("backward"), pytest.raises(RuntimeError, match="more examples"):
        back_propagate(run.optimizer, batch, lambda b: run.loss_fn(run.model, b), say=lambda _: None)


def test_one_example_that_does_not_fit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    run = private_run(strategy="two_pass", batch_size=40)
    Shortage(monkeypatch, "forward", fits=0)
    logical = next(iter(run.loader))
    with pytest.raises(torch.OutOfMemoryError, match=r"index \d+ of the data set.*Tried to allocate"):
        back_propagate(run.optimizer, logical, lambda b: run.loss_fn(run.model, b), say=lambda _: None)
    with pytest.raises(RuntimeError, match="fewer examples"):
        run.optimizer.step()
    assert run.engine.steps == 0


def test_other_errors_are_not_swallowed() -> None:
    run = private_run(batch_size=40)

    def broken(batch: Any) -> Tensor:
        raise MemoryError("on the host")

    logical = next(iter(run.loader))
    with pytest.raises(MemoryError, match="host"):
        back_propagate(run.optimizer, logical, broken)


def test_a_halving_is_logged_as_not_private(caplog: pytest.LogCaptureFixture) -> None:
    run = private_run(batch_size=40, strategy="per_layer")
    logical = next(iter(run.loader))
    with short_of_memory("backward"), caplog.at_level("WARNING", logger="dpkernels"):
        back_propagate(run.optimizer, logical, lambda b: run.loss_fn(run.model, b))
    assert (
        "NOT PRIVATE: a micro-batch of 40 examples ran out of memory; continuing with at most 20"
        in caplog.text
    )


def test_only_sampled_examples_can_be_read_again() -> None:
    run = private_run(batch_size=8, steps=1)
    for logical in run.loader:
        inside = logical.parts[0]
        outside = next(i for i in range(40) if all(i not in part for part in logical.parts))
        torch.testing.assert_close(logical.collate(inside)[0], run.data[inside][0])
        with pytest.raises(ValueError, match=f"{outside}.*sampled"):
            logical.collate([*inside, outside])
        with pytest.raises(ValueError, match="given twice"):
            logical.collate([*inside, inside[0]])


@pytest.mark.parametrize("first", ["collate", "iterating"])
def test_no_example_is_given_twice_before_another_attempt(first: str) -> None:
    run = private_run(physical_batch_size=2)
    logical = next(iter(run.loader))
    part = logical.parts[0]
    batch = logical.collate(part) if first == "collate" else next(iter(logical))
    run.optimizer.backward(run.loss_fn(run.model, batch))
    for again in (part, part[:1], [*logical.parts[1], part[0]]):
        with pytest.raises(ValueError, match=rf"{part[0]}.*were given already.*recover\(\)"):
            logical.collate(again)
    run.optimizer.recover()
    logical.collate(part)
    run.optimizer.zero_grad()
    for part in logical.parts:
        run.optimizer.backward(run.loss_fn(run.model, logical.collate(part)))
    run.optimizer.step()
