"""Nothing begins, is counted or released unless all ranks agree; what they differ in is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dpkernels.privacy import read_ledger
from tests.privacy.private_run import KEY, private_run
from tests.privacy.ranks import jobs
from tests.privacy.ranks.processes import Failure, Processes

DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "clipping norm": ({"clip": 2.0}, "norm: 1.0 on rank 0, 2.0 on rank 1"),
    "noise multiplier": ({"sigma": 0.7}, "mechanism"),
    "data set": ({"examples": 61}, "data set: .*60 examples.* on rank 0, .*61"),
    "batch size": ({"batch_size": 13}, "sampling"),
    "strategy": ({"strategy": "two_pass"}, "strategy: 'bookkeeping' on rank 0, 'two_pass' on rank 1"),
    "steps": ({"steps": 9}, "steps: None on rank 0, 9 on rank 1"),
    "lengths": ({"lengths": [1] * 60}, "lengths: "),
    "optimizer": ({"optimizer": "sgd"}, "optimizer: 'AdamW' on rank 0, 'SGD' on rank 1"),
    "accountant": ({"accountant": "rdp"}, "accountant: 'pld' on rank 0, 'rdp' on rank 1"),
    "key": ({"key": None}, "noise_key: True on rank 0, False on rank 1"),
}


@pytest.mark.thinned(5)
@pytest.mark.parametrize("what", DIFFERENT)
def test_runs_that_differ_are_refused_by_name(processes: Processes, what: str) -> None:
    settings, message = DIFFERENT[what]
    check_refused(processes.run(jobs.set_up, 2, [{}, settings]), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("frozen value", "parameter '0.weight'"),
        ("frozen on one rank", "parameter '0.weight'"),
        ("version", "versions"),
        ("order of examples", "examples: "),
    ],
)
def test_models_and_versions_that_differ_are_refused_by_name(
    processes: Processes, change: str, message: str
) -> None:
    check_refused(processes.run(jobs.set_up, 2, [{}, {}], change), message)


def check_refused(failures: list[Any], message: str) -> None:
    for failure in failures:
        assert isinstance(failure, Failure), "not refused"
        assert failure.kind == "RanksError", failure
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(failure.message)


def test_smaller_micro_batches_on_one_rank_are_its_own_affair(processes: Processes) -> None:
    assert processes.results(jobs.set_up, 2, [{}, {"physical_batch_size": 2}]) == [None, None]


def test_one_ranks_bad_argument_ends_all(processes: Processes) -> None:
    first, second = processes.run(jobs.set_up, 2, [{}, {"clip": -1.0}])
    assert (second.kind, "max_grad_norm" in second.message) == ("ValueError", True)
    assert first.kind == "RanksError"
    assert "rank 1: ValueError: max_grad_norm" in first.message


def test_parameters_begin_with_those_of_rank_0(processes: Processes) -> None:
    first, *others = processes.results(jobs.first_values, 3)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.thinned(5)
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("draws", "drawn batch"),
        ("learning rates", "learning rates: "),
        ("trained parameters", "trained parameters: "),
        ("a backward left out", "fewer examples were back-propagated"),
        ("a buffer", "late"),
        ("operations", "rank 0 in optimizer.step, rank 1 in optimizer.state_dict"),
        ("ledger", "closed"),
        ("budget", "exceed target_epsilon"),
    ],
)
def test_a_step_that_one_rank_must_not_take_is_taken_by_none(
    processes: Processes, fault: str, message: str, tmp_path: Path
) -> None:
    for part in processes.results(jobs.left_out, 2, fault, tmp_path / "ledger.jsonl"):
        assert message in part["raised"]
        assert (part["steps"], part["moved"]) == (0, False)


def test_a_step_without_a_fault_is_counted_by_all_and_written_once(
    processes: Processes, tmp_path: Path
) -> None:
    path = tmp_path / "ledger.jsonl"
    for part in processes.results(jobs.left_out, 3, "", path):
        assert part == {"raised": "", "steps": 1, "moved": True}
    (run,) = read_ledger(path).runs
    assert run.steps == 1


def test_a_group_that_comes_up_later_is_refused_and_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    run = private_run(key=KEY)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    run.begin(0)
    with pytest.raises(RuntimeError, match="2 processes"):
        run.optimizer.step()
    assert run.engine.steps == 0


def test_torchrun_without_a_process_group_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="init_process_group"):
        private_run(key=KEY)
    monkeypatch.setenv("WORLD_SIZE", "1")
    private_run(key=KEY)
