"""What a user does on one rank only, or otherwise on each: it is refused, and no rank takes it for something else."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dpkernels.privacy import read_ledger
from dpkernels.privacy.ranks.agreement import check_same_run
from dpkernels.privacy.ranks.group import _BROKEN
from dpkernels.privacy.sampling.digests import digests_of
from tests.privacy.private_run import KEY, Net, private_run
from tests.privacy.ranks.jobs import a_run, steps_of
from tests.privacy.ranks.processes import Failure, Processes


def on_one_rank(rank: int, group: Any, what: str) -> dict[str, Any]:
    """What each rank raises in a step before, in or after which rank 1 does something alone; the steps counted."""
    run = a_run(group)
    raised = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error" if (what, rank) == ("warnings as errors", 1) else "ignore")
            if what == "keep_gradients":
                run.optimizer.keep_gradients = rank == 1
            if what == "engine.load_state_dict" and rank == 1:
                run.engine.load_state_dict(run.engine.state_dict())
            if what == "optimizer.load_state_dict" and rank == 1:
                run.optimizer.load_state_dict(run.optimizer.original_optimizer.state_dict())
            if what == "wait_for_ranks" and rank == 1:
                run.engine.wait_for_ranks()
            steps_of(run, 1)
    except Exception as error:  # noqa: BLE001  what the test compares
        raised = f"{type(error).__name__}: {error}"
    return {"raised": raised, "steps": run.engine.steps}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("keep_gradients", "optimizer.keep_gradients: False on rank 0, True on rank 1"),
        ("warnings as errors", "UserWarning: no self_check has passed"),
        ("engine.load_state_dict", "rank 0 in optimizer.step, rank 1 in load_state_dict"),
        ("optimizer.load_state_dict", "rank 0 in optimizer.step, rank 1 in load_state_dict"),
        ("wait_for_ranks", "rank 0 in optimizer.step, rank 1 in wait_for_ranks"),
    ],
)
def test_what_one_rank_does_alone_is_refused_on_all(processes: Processes, what: str, message: str) -> None:
    for part in processes.results(on_one_rank, 2, what):
        assert message in part["raised"]
        assert part["steps"] == 0


def leaves_an_exchange(rank: int, group: Any, error: type[BaseException]) -> list[str]:
    """What the ranks raise that leave a step in the middle, and what then raises whatever they send next."""
    run = a_run(group)

    def fails(*_: Any) -> None:
        raise error("after the count")

    run.optimizer._exchange.sums_to_owners = fails
    said = []
    for attempt in (lambda: steps_of(run, 1), run.engine.wait_for_ranks):
        try:
            attempt()
        except BaseException as raised:  # noqa: BLE001  what the test compares
            said.append(str(raised))
    _BROKEN.discard(group)  # for later tests: all ranks left it at the same place
    return said


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_a_rank_that_left_an_exchange_sends_nothing_more(
    processes: Processes, error: type[BaseException]
) -> None:
    for first, *later in processes.results(leaves_an_exchange, 2, error):
        assert first == "after the count"
        assert len(later) == 1
        assert "left an earlier exchange" in later[0]


def forks(rank: int, group: Any) -> list[str]:
    """What a forked child of each rank raises where it would talk over its parent's connections."""
    run = a_run(group)
    read, write = os.pipe()
    if os.fork() == 0:
        said = []
        for attempt in (run.optimizer.step, run.engine.wait_for_ranks):
            try:
                attempt()
                said.append("sent")
            except Exception as error:  # noqa: BLE001  what the test compares
                said.append(str(error))
        os.write(write, "|".join(said).encode())
        os._exit(0)
    os.close(write)
    os.wait()
    run.engine.wait_for_ranks()  # the parents are still in step
    return os.read(read, 10_000).decode().split("|")


def test_a_forked_process_does_not_talk_for_its_parent(processes: Processes) -> None:
    for said in processes.results(forks, 2):
        assert all("this process was forked" in message for message in said)


def resumes_on_one(rank: int, group: Any, ledger: Path) -> list[str]:
    """A run that resumes with a ledger of 5 steps; the parameters of the checkpoint are loaded by rank 0 alone."""
    run = a_run(group, ledger=ledger)
    if rank == 0:
        with torch.no_grad():
            run.model.last.weight.add_(1)
    return [str(run.engine.steps), str(steps_of(run, 1))]


def test_parameters_are_compared_when_a_run_resumes(processes: Processes, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    alone = private_run(ledger=ledger, examples=60, batch_size=12)
    for _ in range(5):
        alone.release([0])
    alone.engine.close()
    for failure in processes.run(resumes_on_one, 2, ledger):
        assert isinstance(failure, Failure), failure
        assert "trained parameters: " in failure.message


class Other(Net):
    """A Net whose modules are registered in another order, as those of a set of names may be."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self._modules["second"] = nn.Linear(6, 6)
        self.norm, self.last = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.second(x))


def in_another_order(rank: int, group: Any, groups: bool) -> None:
    model = Other()
    if rank == 1 and not groups:
        model._modules = dict(reversed(model._modules.items()))
    optimizer: Any = torch.optim.SGD
    if rank == 1 and groups:

        def optimizer(params: Any, lr: float) -> Any:
            return torch.optim.SGD(list(params)[::-1], lr=lr)

    private_run(model=model, key=KEY, optimizer=optimizer, process_group=group)


@pytest.mark.parametrize(
    ("groups", "message"), [(False, "order of trained parameters"), (True, "optimizer's parameter groups")]
)
def test_parameters_in_another_order_are_refused(processes: Processes, groups: bool, message: str) -> None:
    for failure in processes.run(in_another_order, 2, groups):
        assert isinstance(failure, Failure), "not refused"
        assert message in failure.message


def test_devices_of_trained_parameters_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[dict[str, Any]] = []

    class Two:
        size = 2

        def check_same(self, _: str, facts: dict[str, Any]) -> None:
            compared.append(facts)

    for device in ("cpu", "meta"):
        tensors = [("a", torch.zeros(2), True), ("b", torch.zeros(2, device=device), True)]
        check_same_run(Two(), {}, tensors)  # type: ignore[arg-type]
    assert compared[0]["model's a"] == compared[1]["model's a"]
    assert compared[0]["model's b"] != compared[1]["model's b"]


def begins(rank: int, group: Any, folder: Path, given: bool) -> int:
    """Begin a run, each rank on a "machine" of its own; the steps that count."""
    ledger = folder / str(rank) / "ledger.jsonl"
    return int(a_run(group, ledger=ledger if given or rank else None).engine.steps)


@pytest.mark.parametrize("case", ["a new one", "longer", "none on rank 0", "a copy from before"])
def test_a_ledger_that_rank_0_does_not_see_is_refused(
    processes: Processes, case: str, tmp_path: Path
) -> None:
    first, second = tmp_path / "0", tmp_path / "1"
    first.mkdir()
    second.mkdir()
    if case == "longer":  # rank 0 was on the other machine before
        private_run(ledger=second / "ledger.jsonl", examples=60, batch_size=12).engine.close()
    if case == "a copy from before":
        private_run(ledger=first / "ledger.jsonl", examples=60, batch_size=12).engine.close()
        shutil.copy(first / "ledger.jsonl", second)
    results = processes.run(begins, 2, tmp_path, case != "none on rank 0")
    if case in ("a new one", "a copy from before"):
        assert results == [0, 0]
        assert not (second / "ledger.jsonl").exists() or len(read_ledger(second / "ledger.jsonl").runs) == 1
        return
    for failure in results:
        assert isinstance(failure, Failure), "not refused"
        assert failure.kind == "LedgerError"
        assert "storage that all machines share" in failure.message


class Examples(Dataset[Any]):
    """Examples in an order, augmented by the global generators or by a generator of their own."""

    def __init__(self, names: list[str], own: bool = False) -> None:
        self.names = names
        self.generator = np.random.default_rng() if own else None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, place: int) -> dict[str, Any]:
        noise = torch.randn(3) if self.generator is None else torch.from_numpy(self.generator.normal(size=3))
        return {"audio": noise, "label": np.array([self.names[place]], dtype=object)}


@pytest.mark.parametrize("own", [False, True])
def test_augmented_examples_in_another_order_are_told_apart(own: bool) -> None:
    names = [f"name {number}" for number in range(20)]
    torch.manual_seed(1)
    first = digests_of(Examples(names, own))
    torch.manual_seed(2)
    assert digests_of(Examples([str(name) for name in names], own)) == first
    assert digests_of(Examples(names[::-1], own)) != first


def test_numbers_of_numpy_are_told_apart() -> None:
    assert digests_of([np.int64(1)]) != digests_of([np.int64(2)])
