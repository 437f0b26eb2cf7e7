"""privacy.md 11, the ledger: on disk before a step is applied; a crash, a resume or an edit never hides a
step."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dpkernels.files import WriteError
from dpkernels.privacy import LedgerError, read_ledger
from dpkernels.privacy.accounting import ledger as ledger_module
from dpkernels.privacy.accounting.ledger import Ledger
from dpkernels.privacy.step.optimizer import DPOptimizer
from tests.failing_disk import largest_file
from tests.privacy.private_run import Run, private_run, train


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def spent(path: Path, taken: int, **arguments: object) -> Run:
    """A run of some steps that ended in good order."""
    run = private_run(ledger=path, **arguments)  # type: ignore[arg-type]
    train(run, taken)
    run.engine.close()
    return run


def ledger_of(run: Run) -> Ledger:
    budget = run.engine._budget
    assert budget is not None
    assert budget._ledger is not None
    return budget._ledger


def entries(path: Path) -> list[dict]:
    return [json.loads(line)["entry"] for line in path.read_text().splitlines()]


def test_every_step_has_a_line_and_the_run_line_states_the_mechanism(path: Path) -> None:
    run = private_run(ledger=path, sigma=6.0, clip=0.5, target_epsilon=50.0, target_delta=1e-3)
    train(run, 3)
    run.engine.get_epsilon()
    lines = entries(path)
    assert [line["kind"] for line in lines] == ["run", "step", "step", "step", "epsilon"]
    first = lines[0]
    assert first["mechanism"] == {
        "sample_rate": 0.2,
        "noise_multiplier": 6.0,
        "dataset_size": None,
        "max_batch_size": None,
    }
    assert (first["dataset_size"], first["unit"], first["sampling"]) == (40, "example", "poisson")
    assert (first["target_epsilon"], first["target_delta"]) == (50.0, 1e-3)
    assert first["adjacency"] == "add or remove one example"
    assert first["sensitivity"] > first["max_grad_norm"] == 0.5
    assert first["trained_parameters"] == sum(p.numel() for p in run.model.parameters())
    assert lines[4]["epsilon"] == run.engine.get_epsilon()
    assert len(entries(path)) == 5  # asked again: noted once
    assert read_ledger(path).steps == 3


def check_written_first(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the wrapped optimizer steps, the line is in the file, and fsync was called after it was
    written."""
    run = private_run(ledger=path, lr=0.1)
    synced: list[int] = []
    seen: list[tuple[int, int]] = []
    original = os.fsync
    monkeypatch.setattr(
        ledger_module.os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_size), original(fd))[1]
    )

    def step(self: torch.optim.Optimizer) -> None:
        seen.append((read_ledger(path).steps, synced[-1] if synced else 0))

    monkeypatch.setattr(
        run.optimizer.original_optimizer, "step", step.__get__(run.optimizer.original_optimizer)
    )
    run.release(())
    assert seen == [(1, path.stat().st_size)], "the step was applied before its line was on disk"


def test_a_step_is_on_disk_before_it_is_applied(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_written_first(path, monkeypatch)


def test_planted_missing_fsync_is_caught(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Ledger._append

    def lazy(self: Ledger, entry: dict) -> None:
        with monkeypatch.context() as inner:
            inner.setattr(ledger_module.os, "fsync", lambda fd: None)
            original(self, entry)

    monkeypatch.setattr(Ledger, "_append", lazy)
    with pytest.raises(AssertionError):
        check_written_first(path, monkeypatch)


def test_planted_line_after_the_step_is_caught(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = DPOptimizer.step

    def late(self: DPOptimizer) -> object:
        spend, self._budget.spend = self._budget.spend, lambda: None
        try:
            return original(self)
        finally:
            self._budget.spend = spend
            spend()

    monkeypatch.setattr(DPOptimizer, "step", late)
    with pytest.raises(AssertionError):
        check_written_first(path, monkeypatch)


def test_a_failing_wrapped_step_is_spent_and_its_batch_gone(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = private_run(ledger=path)

    def fail() -> None:
        raise OSError("no space")

    monkeypatch.setattr(run.optimizer.original_optimizer, "step", fail)
    run.optimizer.begin_logical_batch(2)
    run.optimizer.backward(run.loss_fn(run.model, run.data[[0, 1]]))
    with pytest.raises(OSError, match="no space"):
        run.optimizer.step()
    assert run.engine.steps == read_ledger(path).steps == 1
    assert run.optimizer._batch.sums
    assert not any(total.any() for total in run.optimizer._batch.sums.values())


# --- resume


def check_resume_counts(path: Path) -> None:
    """A crash after the checkpoint: the replayed steps count twice, and ε with them."""
    run = private_run(ledger=path, sigma=6.0)
    train(run, 2)
    state = run.engine.state_dict()
    train(run, 3)
    run.engine.close()  # the crash
    resumed = private_run(ledger=path, sigma=6.0)
    resumed.engine.load_state_dict(state)
    assert resumed.engine.steps == 5, "replayed steps are not counted"
    train(resumed, 3)
    assert resumed.engine.steps == 8
    assert read_ledger(path).steps == 8
    longer = private_run(sigma=6.0)
    for _ in range(8):
        longer.release(())
    assert resumed.engine.get_epsilon(1e-3) == longer.engine.get_epsilon(1e-3)


def test_a_resume_counts_every_line(path: Path) -> None:
    check_resume_counts(path)


def test_planted_trust_in_the_checkpoint_is_caught(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dpkernels.privacy.accounting.budget import Budget

    def trusting(self: Budget, state: dict) -> None:
        self._runs.clear()
        for name, saved in state["runs"].items():
            self._runs[name] = (self.mechanism, saved["steps"])
        self._runs[self._run] = (self.mechanism, 0)

    monkeypatch.setattr(Budget, "load_state_dict", trusting)
    with pytest.raises(AssertionError):
        check_resume_counts(path)


def test_steps_and_target_are_those_of_all_runs_together(path: Path) -> None:
    spent(path, 4, steps=6)
    again = private_run(ledger=path, steps=6)
    assert train(again) == 2
    again.engine.close()
    other = private_run(ledger=path, sigma=3.0, steps=9)
    assert train(other) == 3
    assert [(m.noise_multiplier, n) for m, n in other.engine.history] == [(1.0, 4), (1.0, 2), (3.0, 3)]


def test_without_a_ledger_the_checkpoint_is_counted() -> None:
    run = private_run()
    train(run, 3)
    resumed = private_run()
    train(resumed, 1)
    resumed.engine.load_state_dict(run.engine.state_dict())
    assert resumed.engine.steps == 4
    run.engine.load_state_dict(run.engine.state_dict())
    assert run.engine.steps == 3


def test_a_checkpoint_with_a_ledger_wants_that_ledger(path: Path, tmp_path: Path) -> None:
    run = private_run(ledger=path)
    train(run, 2)
    state = json.loads(json.dumps(run.engine.state_dict()))
    other = private_run(ledger=tmp_path / "other")
    with pytest.raises(LedgerError, match="belongs to the checkpoint"):
        other.engine.load_state_dict(state)
    none = private_run()
    with pytest.warns(UserWarning, match="none"):
        none.engine.load_state_dict(state)
    assert none.engine.steps == 2
    with pytest.raises(ValueError, match="dataset_size"):
        private_run(examples=41).engine.load_state_dict(state)


@pytest.mark.parametrize(
    "arguments",
    [{"examples": 41}, {"unit": "speaker", "speakers": list(range(40)), "max_examples_per_speaker": 1}],
)
def test_another_data_set_or_unit_is_refused(path: Path, arguments: dict) -> None:
    spent(path, 1)
    with pytest.raises(LedgerError, match="was written for"):
        private_run(ledger=path, **arguments)


# --- damage


def edit(lines: list[bytes]) -> list[bytes]:
    return [lines[0].replace(b'"noise_multiplier": 1.0', b'"noise_multiplier": 9.0'), *lines[1:]]


@pytest.mark.parametrize(
    "damage",
    [
        edit,
        lambda lines: [lines[0], *lines[2:]],
        lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
        lambda lines: lines[1:],
        lambda lines: [lines[0], lines[1], b"{}", *lines[2:]],
    ],
    ids=["edited", "removed", "swapped", "no run line", "inserted"],
)
def test_damage_inside_is_noticed(path: Path, damage: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    spent(path, 4)
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join(damage(lines)) + b"\n")
    with pytest.raises(LedgerError, match="line"):
        private_run(ledger=path)
    if damage is edit:  # the planted fault: a hash of the line alone
        monkeypatch.setattr(ledger_module, "_hash", lambda previous, body: "0" * 64)
        with pytest.raises(LedgerError):
            read_ledger(path)


def test_lines_cut_off_the_end_are_noticed_with_the_checkpoint(path: Path) -> None:
    run = spent(path, 4)
    state = run.engine.state_dict()
    path.write_bytes(b"\n".join(path.read_bytes().splitlines()[:-2]) + b"\n")
    resumed = private_run(ledger=path)
    with pytest.raises(LedgerError, match="last lines were removed"):
        resumed.engine.load_state_dict(state)


@pytest.mark.parametrize("keep", [1, 7, 40, -1])
def test_a_torn_last_line_counts_as_a_step(path: Path, keep: int) -> None:
    spent(path, 3)
    whole = path.read_bytes()
    start = whole.rstrip(b"\n").rindex(b"\n") + 1
    path.write_bytes(whole[: start + keep] if keep > 0 else whole[:-1])
    assert read_ledger(path).steps == 3
    resumed = private_run(ledger=path)
    assert resumed.engine.steps == 3
    train(resumed, 2)
    resumed.engine.close()
    assert read_ledger(path).steps == 5
    assert private_run(ledger=path).engine.steps == 5


SETTINGS = {
    "mechanism": {"sample_rate": 0.1, "noise_multiplier": 1.0, "dataset_size": None, "max_batch_size": None},
    "unit": "example",
    "dataset_size": 10,
    "adjacency": "add or remove one example",
}


def test_a_resumed_ledger_can_be_cut_anywhere(path: Path) -> None:
    """Also within the seal of a torn line, or right before it: a disk that is still full, a second crash."""
    ledger = Ledger(path, {"run": "a", **SETTINGS})
    for _ in range(3):
        ledger.spend_step()
    ledger.close()
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    path.write_bytes(whole[: last + 40])
    ledger = Ledger(path, {"run": "b", **SETTINGS})
    ledger.spend_step()
    ledger.close()
    whole = path.read_bytes()
    steps = read_ledger(path).steps
    assert steps == 4
    for cut in range(last + 1, len(whole) + 1):
        path.write_bytes(whole[:cut])
        found = read_ledger(path).steps
        assert 3 <= found <= steps + 1, cut
        if cut % 7 == 0 or whole[cut - 1 : cut] == b"\n":
            ledger = Ledger(path, {"run": "c", **SETTINGS})
            ledger.spend_step()
            ledger.close()
            assert read_ledger(path).steps == found + 1, cut


def test_an_edited_last_line_is_no_half_sealed_one(path: Path) -> None:
    ledger = Ledger(path, {"run": "a", **SETTINGS})
    ledger.spend_step()
    ledger.close()
    whole = path.read_bytes()
    for fault in (
        whole.replace(b'"step": 1', b'"step": 2'),
        whole[:-20] + b"\nmore",
        b"text\n",
        whole[:-30] + b"\xff" + whole[-29:],
    ):
        path.write_bytes(fault)
        with pytest.raises(LedgerError):
            read_ledger(path)


@pytest.fixture
def carried(path: Path) -> bytes:
    """A ledger whose last line counts 1000 steps that only a checkpoint had."""
    ledger = Ledger(path, {"run": "a", **SETTINGS})
    ledger.spend_step()
    ledger.carry("of a checkpoint", ledger.run.mechanism, 1000)
    ledger.close()
    return path.read_bytes()


@pytest.mark.parametrize("place", [-1, -2, -3, -4, -40, -70, -78, -200])
def test_a_changed_byte_makes_no_torn_line_of_one_that_counts_more(
    path: Path, carried: bytes, place: int
) -> None:
    """A torn line counts one step. Each of these changes leaves a last line that is none, at any other byte."""
    for byte in {*range(32, 128, 5), 0x22, 0x5C, 0x80, 0xFF} - {carried[place]}:
        path.write_bytes(carried[:place] + bytes([byte]) + carried[place:][1:])
        with contextlib.suppress(LedgerError):
            assert read_ledger(path).steps >= 1001, byte


def test_a_crash_within_a_carried_line_is_a_torn_line(path: Path, carried: bytes) -> None:
    last = carried.rstrip(b"\n").rindex(b"\n") + 1
    for cut in range(last + 1, len(carried) - 1):
        path.write_bytes(carried[:cut])
        assert read_ledger(path).steps == 2, cut
    path.write_bytes(carried[:-1])  # its newline only
    assert read_ledger(path).steps == 1001


def test_zeros_behind_a_whole_line_are_dropped(path: Path, carried: bytes) -> None:
    """As a file system leaves them after a crash."""
    path.write_bytes(carried[:-1] + bytes(100))
    assert read_ledger(path).steps == 1001
    ledger = Ledger(path, {"run": "b", **SETTINGS})
    ledger.spend_step()
    ledger.close()
    assert read_ledger(path).steps == 1002
    assert b"\0" not in path.read_bytes()


def forged(path: Path, *entries: object) -> None:
    """A ledger of these entries, each with its right hash."""
    previous, lines = "0" * 64, b""
    for entry in entries:
        line, previous = ledger_module._line(previous, entry)  # type: ignore[arg-type]
        lines += line
    path.write_bytes(lines)


RUN = {"kind": "run", "format": 1, "run": "a", **SETTINGS}
CARRIED = {**RUN, "kind": "carried", "steps": 5}


@pytest.mark.parametrize(
    "entry",
    [
        [],
        "text",
        {**CARRIED, "steps": -5},
        {**CARRIED, "steps": 1.5},
        {**CARRIED, "steps": True},
        {**CARRIED, "run": "b", "mechanism": {}},
        {key: value for key, value in CARRIED.items() if key != "unit"},
        {**RUN, "mechanism": {**SETTINGS["mechanism"], "sample_rate": 2.0}},
        {**RUN, "mechanism": None},
        {key: value for key, value in RUN.items() if key != "run"},
    ],
    ids=str,
)
def test_an_entry_that_no_version_writes_is_refused_by_name(path: Path, entry: object) -> None:
    forged(path, RUN, entry)
    with pytest.raises(LedgerError, match="line 2"):
        read_ledger(path)


def test_a_line_that_is_nested_too_deeply_is_refused(path: Path) -> None:
    forged(path, RUN)
    path.write_bytes(path.read_bytes() + b"[" * 100_000 + b"\n" + b"{}\n")
    with pytest.raises(LedgerError, match="line 2: it is nested too deeply"):
        read_ledger(path)


def test_a_torn_first_line_counts_too(path: Path) -> None:
    spent(path, 1)
    path.write_bytes(path.read_bytes()[:25])
    resumed = private_run(ledger=path)
    assert resumed.engine.steps == 1
    resumed.engine.close()
    assert read_ledger(path).steps == 1


def test_another_kind_of_file_is_not_taken_for_a_torn_ledger(path: Path) -> None:
    path.write_text("some notes")
    with pytest.raises(LedgerError, match="another kind of file"):
        private_run(ledger=path)
    assert path.read_text() == "some notes"


def test_a_failed_write_stops_the_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = private_run(ledger=path, lr=1.0)
    weight = run.model.last.weight.clone()
    original = os.write
    monkeypatch.setattr(ledger_module.os, "write", lambda fd, data: original(fd, data[:20]))
    with pytest.raises(OSError, match="disk full"):
        run.release(())
    monkeypatch.undo()
    with pytest.raises(LedgerError, match="earlier write failed"):
        run.release(())
    assert run.model.last.weight.equal(weight)
    run.engine.close()
    assert private_run(ledger=path).engine.steps == 1


@pytest.mark.parametrize("room", [0, 40])
def test_a_disk_that_ends_within_a_line(path: Path, room: int) -> None:
    """A line that is written in part counts, its step is not taken, and a ledger goes on once there is room."""
    run = private_run(ledger=path, lr=1.0)
    run.release(())
    weight = run.model.last.weight.clone()
    with (
        largest_file(path.stat().st_size + room),
        pytest.raises(
            LedgerError, match=r"cannot be written \(.*\): make room there.*Every step .* counted"
        ) as caught,
    ):
        run.release(())
    assert isinstance(caught.value, WriteError)
    assert run.model.last.weight.equal(weight)
    run.engine.close()
    assert private_run(ledger=path).engine.steps == 1 + (room > 0)


def test_a_ledger_on_a_read_only_disk_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(ledger_module, "open", opened, raising=False)
    with pytest.raises(WriteError, match=r"ledger='.*' cannot be written \(Read-only.*make it writable"):
        private_run(ledger=path)


def test_a_closed_ledger_says_so_and_what_to_do(path: Path) -> None:
    run = private_run(ledger=path, lr=1.0)
    train(run, 1)
    reported = run.engine.get_epsilon(1e-3)
    run.engine.close()
    weight = run.model.last.weight.clone()
    for _ in range(2):  # the second time, too
        with pytest.raises(LedgerError, match=r"is closed.*before engine\.close\(\), or read_ledger\(path\)"):
            run.engine.get_epsilon(1e-4)
        with pytest.raises(LedgerError, match=r"is closed.*before engine\.close\(\), or read_ledger\(path\)"):
            run.release(())
    assert run.model.last.weight.equal(weight)
    assert run.engine.get_epsilon(1e-3) == reported  # in the ledger already
    assert run.engine.steps == read_ledger(path).steps == 1


def test_one_ledger_serves_one_process_at_a_time(path: Path) -> None:
    with path.open("ab") as of_another_process:  # flock does not ask whose process an open file is
        fcntl.flock(of_another_process, fcntl.LOCK_EX)
        with pytest.raises(LedgerError, match="in use by a run of another process"):
            private_run(ledger=path)
    private_run(ledger=path)


def test_a_cell_that_runs_again_takes_the_ledger_over(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = private_run(ledger=path, lr=1.0)
    train(first, 3)
    second = private_run(ledger=path)
    assert "is taken over from an earlier run of this process" in caplog.text
    assert second.engine.steps == 3
    train(second, 1)
    weight = first.model.last.weight.clone()
    with pytest.raises(
        LedgerError, match=r"was taken over by a later make_private.*Go on with the later run"
    ):
        first.release(())
    assert first.model.last.weight.equal(weight)
    with pytest.raises(LedgerError, match="was taken over"):
        first.engine.get_epsilon(1e-3)
    train(second, 1)
    assert second.engine.steps == read_ledger(path).steps == 5


def test_a_run_that_may_not_continue_a_ledger_leaves_it_to_its_holder(path: Path) -> None:
    first = private_run(ledger=path)
    with pytest.raises(LedgerError, match="was written for dataset_size=40"):
        private_run(ledger=path, examples=20)
    train(first, 1)
    assert read_ledger(path).steps == 1


def test_a_forked_process_does_not_take_over(path: Path) -> None:
    run = private_run(ledger=path)
    ledger_of(run)._pid -= 1  # as if this process were a fork of the one that opened it
    with pytest.raises(LedgerError, match="in use by a run of another process"):
        private_run(ledger=path)
    ledger_of(run)._pid += 1
    train(run, 1)
    assert read_ledger(path).steps == 1


def check_says_nothing_about_the_data(path: Path) -> None:
    """Two runs over different data write the same lines, but for names, dates and hashes."""

    def lines(name: str, scale: float) -> list[dict]:
        run = private_run(ledger=path.with_name(name))
        run.data.tensors[0].mul_(scale)
        train(run, 4)
        run.engine.get_epsilon(1e-3)
        return [
            {k: v for k, v in entry.items() if k not in ("run", "date")}
            for entry in entries(path.with_name(name))
        ]

    assert lines("one", 1.0) == lines("two", 50.0)


def test_the_ledger_says_nothing_about_the_data(path: Path) -> None:
    check_says_nothing_about_the_data(path)


def test_planted_batch_size_in_the_ledger_is_caught(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original_begin, original_append = DPOptimizer.begin_logical_batch, Ledger._append

    def begin(self: DPOptimizer, examples: int, **of_all: int) -> None:
        sizes.append(examples + len(sizes))
        original_begin(self, examples, **of_all)

    def append(self: Ledger, entry: dict) -> None:
        original_append(self, {**entry, "examples": sizes[-1] if sizes else 0})

    monkeypatch.setattr(DPOptimizer, "begin_logical_batch", begin)
    monkeypatch.setattr(Ledger, "_append", append)
    with pytest.raises(AssertionError):
        check_says_nothing_about_the_data(path)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="its folder does not exist; create it"):
        private_run(ledger=tmp_path / "nowhere" / "ledger.jsonl")
