"""An output folder that cannot be written: a clear error, nothing lost, and the same command goes on afterwards."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file

from asr_finetune import cli
from asr_finetune.config.schema import Config, LogConfig
from asr_finetune.models.recognizer import Recognizer
from asr_finetune.report.report import write_report
from asr_finetune.training.export import export, merge
from asr_finetune.training.run import train
from asr_finetune.training.run_folder import RunFolder, saved_model, whole_folder
from asr_finetune.training.run_log import RunLog
from asr_finetune.training.transcribe import Transcript, write
from dpkernels import checkpoint
from dpkernels.files import WriteError
from dpkernels.privacy import epsilon, read_ledger
from dpkernels.privacy.accounting.ledger import Ledger
from tests.failing_disk import largest_file, make_unwritable

DELTA, SIGMA, RATE = 1e-3, 3.0, 8 / 16  # of the fixture's runs
STOPPED, STEPS = 3, 4


def of_stopped(folder: Path, **changes: Any) -> Config:
    """The configuration of the run that the fixture stopped after step 3 of 4."""
    values = yaml.safe_load((folder / "stopped" / "config.yaml").read_text())
    return Config.from_dict({**values, "output": str(folder / "stopped"), **changes})


def counted(run: Path) -> int:
    return read_ledger(run / "ledger.jsonl").steps


def saved_step(run: Path) -> int:
    saved = checkpoint.load(run / "checkpoint")
    assert saved is not None
    return saved.step


def check_finished(config: Config, before: int) -> None:
    """The run goes on by the same call, and its ε is that of every line in the ledger, those before included."""
    run = Path(config.output)
    result = train(config, progress=False)
    assert result.steps == STEPS
    assert counted(run) >= before
    assert result.epsilon == pytest.approx(epsilon(SIGMA, RATE, counted(run), DELTA), rel=1e-9)
    assert [entry["step"] for entry in result.history] == list(range(1, STEPS + 1))
    assert not list(run.rglob(".*")), "temporary files are left"


# the file -> steps that the ledger counts afterwards, and the last saved one
FILES = {
    "data.json": (3, 3),
    "history.jsonl": (3, 3),
    "state.pt": (4, 3),
    "metrics.json": (4, 4),
    "README.md": (4, 4),
    "run.json": (4, 4),
}


@pytest.mark.parametrize(
    ("name", "full"),
    [
        case if case == ("state.pt", True) else pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product(FILES, (True, False))
    ],
)
def test_a_file_that_cannot_be_written_loses_nothing(runs: Path, name: str, full: bool) -> None:
    config = of_stopped(runs)
    run, (steps, saved) = runs / "stopped", FILES[name]
    with pytest.MonkeyPatch.context() as patch:
        make_unwritable(patch, name, full=full)
        with pytest.raises(WriteError) as caught:
            train(config, progress=False)
    said = str(caught.value)
    assert "the run stopped: " in said
    assert (name if name != "README.md" else "adapter") in said
    assert ("make room" if full else "make it writable") in said
    assert "give the same command again, which continues from there" in said
    if steps == STEPS:
        assert f"its ledger counts {steps} steps and its last checkpoint is of step {saved}" in said
    assert (counted(run), saved_step(run)) == (steps, saved)
    check_finished(config, steps)


@pytest.mark.slow  # the default suite has the same of a ledger without a run
@pytest.mark.parametrize("room", [0, 40])
def test_a_disk_that_ends_within_the_ledger(runs: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """A line that is written in part counts as a step; the step that it is for is not taken."""
    config, run = of_stopped(runs), runs / "stopped"
    spend = Ledger.spend_step

    def spend_at_the_end(self: Ledger) -> None:
        with largest_file(os.stat(self.path).st_size + room):
            spend(self)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "spend_step", spend_at_the_end)
        with pytest.raises(WriteError, match=r"ledger\.jsonl cannot be written .*make room"):
            train(config, progress=False)
    assert saved_step(run) == STOPPED
    assert counted(run) == STOPPED + (room > 0)
    check_finished(config, STOPPED + (room > 0))


def save_at_the_end(patch: pytest.MonkeyPatch) -> None:
    """No file of weights fits on the disk."""
    save = Recognizer.save

    def saved(self: Recognizer, folder: Path | str) -> None:
        with largest_file(2000):
            save(self, folder)

    patch.setattr(Recognizer, "save", saved)


@pytest.mark.slow  # the default suite has the same of `whole_folder`
def test_no_adapter_is_there_in_part(runs: Path) -> None:
    """Neither a run nor an export leaves one, and an older one is kept."""
    config, run = of_stopped(runs), runs / "stopped"
    calls: list[Callable[[], object]] = [
        lambda: export(run),
        lambda: export(run, runs / "old"),
        lambda: merge(runs / "finished", runs / "merged"),
        lambda: train(config, progress=False),
    ]
    (runs / "old").mkdir()
    (runs / "old" / "adapter_model.safetensors").write_text("older")
    for call in calls:
        with pytest.MonkeyPatch.context() as patch:
            save_at_the_end(patch)
            with pytest.raises(WriteError, match=r"(adapter|old|merged) cannot be written \(File too large"):
                call()
    assert not (run / "adapter").exists()
    assert not (runs / "merged").exists()
    assert os.listdir(runs / "old") == ["adapter_model.safetensors"]
    assert (runs / "old" / "adapter_model.safetensors").read_text() == "older"
    check_finished(config, STEPS)
    assert saved_model(run) == run / "adapter"


@pytest.mark.parametrize("older", [False, True])
def test_a_folder_is_whole_or_as_it_was(tmp_path: Path, older: bool) -> None:
    """The rest of the files is kept, and no weights are there in part: safetensors meets the end of the disk."""
    target = tmp_path / "adapter"
    if older:
        target.mkdir()
        (target / "weights.safetensors").write_text("older")

    def save() -> None:
        with whole_folder(target) as folder:
            (folder / "config.json").write_text("{}")
            with largest_file(2000):
                save_file({"a": torch.zeros(1000)}, folder / "weights.safetensors")

    with pytest.raises(WriteError, match=r"adapter cannot be written \(File too large\): make room"):
        save()
    assert [path.name for path in tmp_path.rglob("*")] == ["adapter", "weights.safetensors"] * older
    with pytest.raises(SafetensorError, match="no fault of the disk"), whole_folder(target):
        raise SafetensorError("no fault of the disk")


def test_a_history_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    folder.not_private.mkdir()
    folder.note_history({"step": 1})
    make_unwritable(monkeypatch, "history.jsonl", full=True)
    with pytest.raises(WriteError, match=r"history\.jsonl cannot be written"):
        folder.note_history({"step": 2})
    monkeypatch.undo()
    assert folder.history() == [{"step": 1}]


def test_logs_that_cannot_be_written_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(
        threading, "excepthook", lambda arguments: None
    )  # TensorBoard's thread prints it, too
    make_unwritable(monkeypatch, "events.out.tfevents", full=True)
    with pytest.raises(WriteError, match=r"tensorboard cannot be written .*make room"):
        RunLog(LogConfig(tensorboard=True), RunFolder(tmp_path), 0).close()


def test_a_whole_folder_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    (tmp_path / ".adapter.incomplete").mkdir()
    (tmp_path / ".adapter.incomplete" / "left_by_a_killed_process").write_text("")
    for content in ("first", "second"):
        with whole_folder(target) as folder:
            (folder / "inner").mkdir()
            (folder / "inner" / "a.txt").write_text(content)
            (folder / f"{content}.txt").write_text("")
    assert (target / "inner" / "a.txt").read_text() == "second"
    assert sorted(os.listdir(target)) == ["first.txt", "inner", "second.txt"]
    assert os.listdir(tmp_path) == ["adapter"]


@pytest.mark.slow
def test_a_run_that_only_lacks_its_results_warns_of_nothing(
    runs: Path, recwarn: pytest.WarningsRecorder
) -> None:
    config = of_stopped(runs)
    with pytest.MonkeyPatch.context() as patch:
        make_unwritable(patch, "run.json", full=True)
        with pytest.raises(WriteError):
            train(config, progress=False)
    train(config, progress=False)
    assert not [str(warning.message) for warning in recwarn if "nothing will be trained" in str(warning)]


def test_results_that_cannot_be_written_say_so(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transcripts = [Transcript("a.wav", 1.0, [])]
    (runs / "file").write_text("")
    calls: dict[str, Callable[[], object]] = {
        "report.html": lambda: write_report(runs / "finished", runs / "report.html"),
        "transcripts.txt": lambda: write(transcripts, "text", runs / "transcripts.txt", print),
        "a.srt": lambda: write(transcripts, "srt", runs / "subtitles", print),
        "file/report.html": lambda: write_report(runs / "finished", runs / "file" / "report.html"),
        "file": lambda: write(transcripts, "srt", runs / "file", print),
    }
    for name, call in calls.items():
        with ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            if "file" not in name:
                make_unwritable(patch, name, full=True)
            with pytest.raises(WriteError, match=f"{name} cannot be written"):
                call()


def test_an_output_that_is_no_folder_is_named(runs: Path) -> None:
    (runs / "file").write_text("")
    with pytest.raises(WriteError, match=r"output='.*/file/run' cannot be written \(Not a directory\)"):
        train(of_stopped(runs, output=str(runs / "file" / "run")), progress=False)


def test_a_library_on_a_full_disk_is_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as the hub's, which writes its cache."""

    def download() -> None:
        Path("/dev/full").write_text("weights")

    monkeypatch.setattr(cli, "app", download)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert "cannot be written (No space left on device): make room there" in capsys.readouterr().err
    monkeypatch.setattr(cli, "app", lambda: Path("/nothing/there").read_text())
    with pytest.raises(FileNotFoundError):
        cli.main()
