"""The keyed fingerprint, recordings that two corpora share, and what of the training data is released."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from asr_finetune.config.schema import Config, ConfigError
from asr_finetune.data.corpus import Corpus
from asr_finetune.data.provenance import fingerprint, shared_recordings
from asr_finetune.data.utterance import Utterance
from asr_finetune.report.report import write_report
from asr_finetune.training.run import train
from asr_finetune.training.run_folder import RunFolderError
from asr_finetune.training.setup import check_public
from dpkernels.privacy import read_ledger
from tests.asr_finetune import recordings, tones
from tests.asr_finetune.recordings import RATE, noise


def utterance(name: str, text: str = "low", seconds: float = 0.5, **values: Any) -> Utterance:
    return Utterance(name, None, noise(seconds, seed=len(name)), RATE, text, None, seconds, **values)


def test_the_fingerprint_is_of_the_records_in_order_and_of_the_key() -> None:
    first, second = utterance("a"), utterance("b")
    prints = {
        fingerprint(Corpus(chosen), b"key")
        for chosen in (
            [first, second],
            [second, first],
            [first],
            [first, replace(second, text="high")],
            [first, replace(second, speaker="s")],
            [first, replace(second, seconds=0.6)],
        )
    }
    assert len(prints) == 6
    assert fingerprint(Corpus([first, second], source="elsewhere"), b"key") in prints
    assert fingerprint(Corpus([first]), b"another key") not in prints


def lines(folder: Path, names: list[str], **values: Any) -> list[dict[str, Any]]:
    for index, name in enumerate(names):
        recordings.write(folder / f"{name}.wav", seed=index)
    return [{"audio": f"{name}.wav", "text": f"text of {name}", **values} for name in names]


@pytest.mark.parametrize(
    ("audio", "values", "shared"),
    [
        ("a.wav", {"utt_id": "other", "text": "other"}, True),  # one file
        ("sub/../a.wav", {"utt_id": "other", "text": "other"}, True),
        ("copy.wav", {"utt_id": "other", "text": "other"}, True),  # the same bytes
        ("a.flac", {}, True),  # id, transcript and length, in another format
        ("a.flac", {"text": "other"}, False),
        ("unlike.wav", {}, False),  # of the same length
        ("longer.wav", {"utt_id": "a", "text": "text of a"}, False),
    ],
)
def test_shared_recordings(tmp_path: Path, audio: str, values: dict[str, Any], shared: bool) -> None:
    (line,) = lines(tmp_path, ["a"])
    (tmp_path / "sub").mkdir()
    shutil.copy(tmp_path / "a.wav", tmp_path / "copy.wav")
    recordings.write(tmp_path / "a.flac", seed=5)
    recordings.write(tmp_path / "unlike.wav", seed=6)
    recordings.write(tmp_path / "longer.wav", 0.7)
    one = recordings.read(recordings.manifest(tmp_path, [line]))
    other = recordings.read(recordings.manifest(tmp_path, [{**line, "audio": audio, **values}]))
    assert bool(shared_recordings(one, other)) is shared


@pytest.mark.parametrize("unit", ["example", "speaker"])
def test_other_recordings_of_training_speakers_are_not_public_where_speakers_are_protected(unit: str) -> None:
    train_data = Corpus([utterance("a"), replace(utterance("bb"), speaker="s")])
    valid = Corpus([replace(utterance("ccc"), speaker="s"), replace(utterance("dddd"), speaker="t")])
    check_public(Corpus([valid.utterances[1], utterance("eeeee")]), train_data, unit)
    if unit == "example":
        check_public(valid, train_data, unit)
        return
    with pytest.raises(ConfigError, match=r"1 of its 2 recordings are of training speakers.*\(ccc\)"):
        check_public(valid, train_data, unit)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One manifest: splits train (20 recordings), valid (4 others), and both (4 of each under other ids)."""
    path = tones.write_manifest(tmp_path, 24)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    splits = ["train"] * 20 + ["valid"] * 4
    entries = [{**entry, "split": split} for entry, split in zip(entries, splits, strict=True)]
    entries += [{**entry, "split": "both", "utt_id": f"again-{n}"} for n, entry in enumerate(entries[16:])]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    tones.write_model(tmp_path / "model")
    return tmp_path


def config(folder: Path, **changes: Any) -> Config:
    values = {"method__kind": "head", "data__train_split": "train", "privacy__epsilon": None}
    values |= {"privacy__noise_multiplier": 4.0, "train__steps": 2, "train__batch_size": 6}
    return Config.from_dict(tones.settings(folder, **{**values, **changes}))


def with_curve(folder: Path, split: str) -> Config:
    manifest = str(folder / "tones.jsonl")
    return config(folder, data__valid=manifest, data__valid_split=split, train__eval_every=1)


@pytest.mark.slow
def test_validation_data_may_not_be_training_data(folder: Path) -> None:
    with tones.one_thread():
        with pytest.raises(ConfigError, match=r"data\.valid: 4 of its 8 recordings are training.*again-0"):
            train(with_curve(folder, "both"), progress=False)
        assert not (folder / "run" / "ledger.jsonl").exists()
        # One manifest, other recordings: and the failed start is in nobody's way.
        assert train(with_curve(folder, "valid"), progress=False).steps == 2


@pytest.mark.slow
@pytest.mark.parametrize(("split", "shared"), [("both", True), ("valid", False)])
def test_test_data_that_is_training_data_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str], split: str, shared: bool
) -> None:
    with tones.one_thread():
        train(config(folder, data__test=str(folder / "tones.jsonl"), data__test_split=split))
    assert ("4 of 8 test recordings are training recordings too" in capsys.readouterr().out) is shared
    data = json.loads((folder / "run" / "run.json").read_text())["data"]
    assert "test_shares_training" not in data  # it would tell who is in the data
    kept = json.loads((folder / "run" / "not_private" / "test_data.json").read_text())
    assert kept == {"shares_training": shared}
    page = write_report(folder / "run", folder / "r.html").read_text()
    assert "The test data holds training recordings." not in page
    assert "recorded in the run's not_private/test_data.json" in page
    assert (data["test"], data["test_split"]) == ("tones.jsonl", split)  # without this machine's folders


def test_of_the_training_data_only_n_is_released(folder: Path) -> None:
    with tones.one_thread():
        train(config(folder), progress=False)
    run = folder / "run"
    data = json.loads((run / "run.json").read_text())["data"]
    assert data["units"] == 20
    assert not {"utterances", "hours", "speakers", "problems"} & set(data)
    kept = json.loads((run / "not_private" / "data.json").read_text())
    assert (kept["utterances"], kept["speakers"], kept["left_out"]) == (20, 4, 0)
    assert kept["utterances_per_speaker"] == 5.0
    assert kept["hours"] > 0
    key = (run / "not_private" / "fingerprint.key").read_text().strip()
    assert len(bytes.fromhex(key)) == 32
    assert data["fingerprint"] == kept["fingerprint"]
    assert not any(key in path.read_text(errors="replace") for path in run.glob("*.*"))
    # Who knows every record but has no key cannot confirm it.
    corpus = recordings.read(folder / "tones.jsonl", "train")
    unkeyed = hashlib.sha256()
    for item in corpus.utterances:
        record = [item.id, item.text, item.speaker, round(item.seconds, 3)]
        unkeyed.update(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    assert data["fingerprint"] != unkeyed.hexdigest()
    assert data["fingerprint"] == fingerprint(corpus, bytes.fromhex(key))


@pytest.mark.slow
def test_a_run_is_not_resumed_on_other_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from asr_finetune.training import loop

    class Crash(BaseException):
        pass

    def crash(*_: Any) -> None:
        raise Crash

    wanted = config(folder)
    with tones.one_thread():
        with monkeypatch.context() as patch:
            patch.setattr(loop, "_history_entry", crash)
            with pytest.raises(Crash):
                train(wanted, progress=False)
        manifest = folder / "tones.jsonl"
        before = manifest.read_text()
        manifest.write_text(before.replace('"u3"', '"u3b"', 1))
        with pytest.raises(RunFolderError, match="began with other training data"):
            train(wanted, progress=False)
        assert read_ledger(folder / "run" / "ledger.jsonl").steps == 1
        manifest.write_text(before)
        assert train(wanted, progress=False).steps == 2
