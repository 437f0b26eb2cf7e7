"""Files of a run's folder in which bytes changed: each is named, and no change makes ε smaller."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from asr_finetune.data.corpus import Corpus
from asr_finetune.data.utterance import Utterance
from asr_finetune.training.run_folder import RunFolder, RunFolderError, read_comparison
from tests.asr_finetune.recordings import RATE, noise

DAMAGE = (b"", b"\xff\xfe", b"{", b"[" * 5000, b'{"a": 1}}', b"9" * 5000)


def corpus(*names: str) -> Corpus:
    return Corpus([Utterance(name, None, noise(0.1, seed=1), RATE, "low", None, 0.1) for name in names])


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run")
    made.not_private.mkdir(parents=True)
    made.note_data(corpus("a", "b"), resuming=False)
    return made


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_json_file_is_named(folder: RunFolder, damage: bytes) -> None:
    folder.run.write_bytes(damage)
    for read in (
        lambda: folder.read_json(folder.run),
        folder.record,
        lambda: read_comparison(folder.path, ()),
    ):
        with pytest.raises(RunFolderError, match=r"run.json is damaged .*restore it from a backup"):
            read()
    (folder.not_private / "history.jsonl").write_bytes((damage or b"x") + b"\n")
    with pytest.raises(RunFolderError, match=r"history.jsonl is damaged"):
        folder.history()


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", b"model: {", b"- a\n- b", b"\x00"])
def test_a_damaged_configuration_is_named(folder: RunFolder, damage: bytes) -> None:
    folder.config.write_bytes(damage)
    with pytest.raises(RunFolderError, match=r"config.yaml is damaged"):
        folder.written_config()


def key_of(folder: RunFolder) -> Path:
    return folder.not_private / "fingerprint.key"


def other_digit(path: Path, at: int) -> None:
    text = path.read_text()
    path.write_text(text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :])


def test_recordings_are_compared_by_key_and_fingerprint(folder: RunFolder) -> None:
    assert folder.began_with(corpus("a", "b")) is True
    assert folder.began_with(corpus("a", "c")) is False


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: other_digit(key_of(folder), 5),
        lambda folder: other_digit(folder.data, folder.data.read_text().index('"fingerprint": "') + 20),
        lambda folder: other_digit(folder.data, folder.data.read_text().index('"check": "') + 20),
        lambda folder: key_of(folder).unlink(),
        lambda folder: folder.data.unlink(),
    ],
    ids=["key", "fingerprint", "check", "no key", "no fingerprint"],
)
def test_a_changed_digit_makes_no_other_recordings(
    folder: RunFolder, change: Callable[[RunFolder], None]
) -> None:
    """Recordings that seemed to be others would have an ε of their own, without the steps of this run."""
    change(folder)
    assert folder.began_with(corpus("a", "b")) is None


def test_a_folder_without_a_check_is_compared_as_before(folder: RunFolder) -> None:
    noted = json.loads(folder.data.read_text())
    del noted["check"]
    folder.data.write_text(json.dumps(noted))
    assert folder.began_with(corpus("a", "b")) is True
    assert folder.began_with(corpus("b")) is False


def test_a_key_that_is_no_key_is_named(folder: RunFolder) -> None:
    key_of(folder).write_text("no key")
    with pytest.raises(RunFolderError, match=r"fingerprint.key is damaged"):
        folder.began_with(corpus("a", "b"))
