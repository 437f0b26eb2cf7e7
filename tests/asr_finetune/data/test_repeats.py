"""One recording, however often a manifest lists it, is one example."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from asr_finetune.config.schema import Config, ConfigError
from asr_finetune.data import repeats
from asr_finetune.training.record import data_record
from asr_finetune.training.sampling import sampling_of
from tests.asr_finetune.recordings import encoded, manifest, read, reasons, write

HEADER = 44  # bytes of a WAV file


def config_of(**privacy: Any) -> Config:
    values = {"epsilon": 8.0, "delta": 1e-3, **privacy}
    return Config.from_dict(
        {
            "model": {"name": "unused"},
            "data": {"train": "unused"},
            "privacy": values,
            "train": {"batch_size": 2, "steps": 2},
            "output": "unused",
        }
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four recordings of one size, and the first of them again in three ways."""
    for name in "abcd":
        write(tmp_path / f"{name}.wav")
    shutil.copy(tmp_path / "a.wav", tmp_path / "copy.wav")
    (tmp_path / "link.wav").symlink_to("a.wav")
    (tmp_path / "sub").mkdir()
    return tmp_path


def lines(names: list[str], speakers: str = "") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"audio": name, "text": f"text {n}"} for n, name in enumerate(names)]
    for line, speaker in zip(found, speakers, strict=False):
        line["speaker"] = speaker
    return found


AGAIN = ["a.wav", "copy.wav", "link.wav", "sub/../a.wav"]


def test_each_recording_is_kept_once_and_counted_once(folder: Path) -> None:
    names = ["b.wav", "a.wav", "c.wav", *AGAIN, "d.wav", "b.wav"]
    corpus = read(manifest(folder, lines(names)))
    assert [item.text for item in corpus.utterances] == ["text 0", "text 1", "text 2", "text 7"]
    assert data_record(config_of(), corpus, "")["units"] == 4
    assert sampling_of(config_of(), corpus).units == 4
    assert [problem.place for problem in corpus.problems] == [f"all.jsonl:{n}" for n in (4, 5, 6, 7, 9)]
    assert reasons(corpus)["copy"] == "the same recording as one listed before: a (all.jsonl:2)"
    assert "5 left out: 5 × the same recording as one listed before" in corpus.summary()


def test_a_repeat_adds_nothing_to_anyone_else(folder: Path) -> None:
    """One recording more, listed once or six times: one example more, the others as they were."""
    others = lines(["b.wav", "c.wav"])
    without, once, often = (
        read(manifest(folder, [*others, *lines(names)])).utterances for names in ([], ["a.wav"], AGAIN)
    )
    assert once == often
    assert once[:-1] == without


def test_recordings_that_differ_in_one_byte_anywhere_are_kept(tmp_path: Path) -> None:
    content = write(tmp_path / "0.wav", 2.0).read_bytes()
    for name, place in enumerate([HEADER, HEADER + 1, len(content) // 2, len(content) - 1], start=1):
        (tmp_path / f"{name}.wav").write_bytes(
            content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        )
    names = [f"{n}.wav" for n in range(5)]
    assert len(read(manifest(tmp_path, lines(names)))) == 5
    assert [item.id for item in read(manifest(tmp_path, lines([*names, *names]))).utterances] == list("01234")


def test_only_files_of_one_size_and_one_middle_are_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: list[int] = []
    digest = repeats.digest
    monkeypatch.setattr(repeats, "digest", lambda content: (whole.append(len(content)), digest(content))[1])
    names = [write(tmp_path / f"{n}.wav", 0.5 + 0.1 * (n % 3)).name for n in range(9)]
    corpus = read(manifest(tmp_path, lines(names)))
    assert len(corpus) == 9
    assert whole == []
    assert len(read(manifest(tmp_path, lines([*names, names[4]])))) == 9
    assert whole == []  # one file is not read to be compared with itself
    shutil.copy(tmp_path / names[4], tmp_path / "copy.wav")
    assert len(read(manifest(tmp_path, lines([*names, "copy.wav"])))) == 9
    assert whole == [os.stat(tmp_path / names[4]).st_size] * 2


def test_rows_of_a_table_are_compared_by_their_bytes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    audio = [encoded(seed=seed) for seed in (0, 1, 0, 2, 1)]
    rows = {
        "audio": [{"bytes": content, "path": None} for content in audio],
        "text": [f"text {n}" for n in range(5)],
        "id": [f"row{n}" for n in range(5)],
    }
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "table"))
    corpus = read(tmp_path / "table")
    assert [item.id for item in corpus.utterances] == ["row0", "row1", "row3"]
    assert reasons(corpus)["row4"].endswith(": row1")


def test_a_speaker_may_repeat_a_recording(folder: Path) -> None:
    corpus = read(manifest(folder, lines(["a.wav", "b.wav", "c.wav", "d.wav", "copy.wav"], "xxyyx")))
    config = config_of(unit="speaker", max_examples_per_speaker=2)
    assert (len(corpus), sampling_of(config, corpus).units) == (4, 2)


@pytest.mark.parametrize("last", ["y", None])
def test_a_recording_of_two_speakers_is_refused_where_speakers_are_protected(
    folder: Path, last: str | None
) -> None:
    found = lines(["a.wav", "b.wav", "c.wav", "d.wav", "copy.wav"], "xxyy")
    found[-1]["speaker"] = last
    corpus = read(manifest(folder, found))
    config = config_of(unit="speaker", max_examples_per_speaker=2)
    with pytest.raises(
        ConfigError, match=r"1 recordings are listed under more than one speaker.*e\.g\. a \("
    ):
        sampling_of(config, corpus)
    assert sampling_of(config_of(), corpus).units == 4  # an example is one whoever it is of
