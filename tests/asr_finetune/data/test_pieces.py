"""Utterances that are pieces of a longer recording: Kaldi's segments, NeMo's offset and duration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile

from asr_finetune.config.schema import Config, ConfigError
from asr_finetune.data.audio import read_audio
from asr_finetune.data.corpus import Corpus
from asr_finetune.data.provenance import shared_recordings
from asr_finetune.training.record import data_record
from asr_finetune.training.sampling import units
from tests.asr_finetune.recordings import RATE, manifest, noise, read, reasons, texts, write


def kaldi(folder: Path, segments: dict[str, str], speakers: str = "xxxxx") -> Path:
    """One recording of 2 s and another of 1 s, with segments `<utterance> <recording> <start> <end>`."""
    folder.mkdir(exist_ok=True)
    write(folder / "r1.wav", 2.0)
    write(folder / "r2.wav", 1.0)
    (folder / "wav.scp").write_text("r1 r1.wav\nr2 r2.wav\n")
    (folder / "segments").write_text("".join(f"{name} {times}\n" for name, times in segments.items()))
    (folder / "text").write_text("".join(f"{name} text of {name}\n" for name in segments))
    owners = zip(segments, speakers, strict=False)
    (folder / "utt2spk").write_text("".join(f"{name} {speaker}\n" for name, speaker in owners))
    return folder


def config(*, pieces: str = "refuse", **privacy: Any) -> Config:
    return Config.from_dict(
        {
            "model": {"name": "unused"},
            "data": {"train": "unused", "pieces": pieces},
            "privacy": {"epsilon": 8.0, "delta": 1e-3, **privacy},
            "output": "unused",
        }
    )


SPEAKERS = {"unit": "speaker", "max_examples_per_speaker": 2}
APART = {"a": "r1 0.00 0.50", "b": "r1 0.50 1.25", "c": "r2 0 1"}


def test_segments_are_read_from_their_recordings(tmp_path: Path) -> None:
    corpus = read(kaldi(tmp_path, APART))
    assert texts(corpus) == {name: f"text of {name}" for name in "abc"}
    assert [item.seconds for item in corpus.utterances] == [0.5, 0.75, 1.0]
    whole, rate = soundfile.read(tmp_path / "r1.wav", dtype="float32")
    np.testing.assert_array_equal(read_audio(corpus.utterances[0], rate), whole[: rate // 2])
    np.testing.assert_array_equal(read_audio(corpus.utterances[1], rate), whole[rate // 2 : rate * 5 // 4])
    assert corpus.utterances[2].piece is None  # all of its recording


def test_offsets_of_a_manifest_are_pieces_too(tmp_path: Path) -> None:
    name = write(tmp_path / "a.wav", 2.0).name
    times = [{"offset": 0, "duration": 0.5}, {"offset": 0.5, "duration": 0.5}, {"offset": 1.5}]
    entries = [
        {"audio_filepath": name, "text": str(n), "utt_id": f"u{n}", **line} for n, line in enumerate(times)
    ]
    corpus = read(manifest(tmp_path, entries))
    assert [item.piece for item in corpus.utterances] == [(0.0, 0.5), (0.5, 1.0), (1.5, 2.0)]


@pytest.mark.parametrize(
    ("times", "reason"),
    [
        ("r1 1.5 2.5", "a piece outside its recording: 1.5 to 2.5 s of 2.000 s"),
        ("r1 1.5 1.0", "a piece outside its recording: 1.5 to 1 s"),
        ("r1 -1 1.0", "a piece outside its recording: -1 to 1 s"),
        ("r1 nan 1.0", "a piece outside its recording: nan"),
        ("r1 here there", "its times are no seconds: could not convert"),
        ("r3 0 1", "no line in wav.scp: 'r3'"),
    ],
)
def test_a_segment_that_is_not_there_is_left_out_by_name(tmp_path: Path, times: str, reason: str) -> None:
    found = reasons(read(kaldi(tmp_path, {"a": "r1 0 0.5", "b": times})))
    assert list(found) == ["b"]
    assert found["b"].startswith(reason)


def test_the_same_piece_again_is_one_example(tmp_path: Path) -> None:
    corpus = read(kaldi(tmp_path, {**APART, "d": "r1 0.5 1.25"}))
    assert list(texts(corpus)) == ["a", "b", "c"]
    assert reasons(corpus) == {"d": "the same recording as one listed before: b (segments:2)"}


def test_several_pieces_of_a_recording_are_examples_only_where_that_is_said(tmp_path: Path) -> None:
    corpus = read(kaldi(tmp_path, APART))
    with pytest.raises(
        ConfigError, match=r"1 recordings are listed in several pieces, e\.g\. a \(segm.*pieces=examples"
    ):
        units(config(), corpus)
    assert units(config(pieces="examples"), corpus) == 3
    assert data_record(config(pieces="examples"), corpus, "")["pieces"]  # the report says so
    assert not data_record(config(**SPEAKERS), corpus, "")["pieces"]
    assert units(config(**SPEAKERS), corpus) == 1
    assert units(config(enabled=False), corpus) == 3
    assert units(config(), read(kaldi(tmp_path / "one", {"a": "r1 0 0.5", "c": "r2 0 0.5"}))) == 2


@pytest.mark.parametrize("second", ["r1 0.4 1.0", "r1 0 2", "r1 0.1 0.3"])
def test_no_sound_is_in_two_units(tmp_path: Path, second: str) -> None:
    """Leaving one of them out would be no fix: then one person's example would depend on another's."""
    of_two = read(kaldi(tmp_path / "two", {"a": "r1 0 0.5", "b": second}, "xy"))
    of_one = read(kaldi(tmp_path / "one", {"a": "r1 0 0.5", "b": second}, "xx"))
    for corpus, privacy in ((of_one, {}), (of_two, {}), (of_two, SPEAKERS)):
        with pytest.raises(
            ConfigError, match=r"1 pieces share samples with another .*a \(.* b \(|b \(.* a \("
        ):
            units(config(pieces="examples", **privacy), corpus)
    assert units(config(**SPEAKERS), of_one) == 1


def test_copies_of_a_recording_are_the_same_recording(tmp_path: Path) -> None:
    """Under another path, its pieces overlap those of the first all the same."""
    soundfile.write(tmp_path / "a.wav", noise(2.0), RATE)
    soundfile.write(tmp_path / "b.wav", noise(2.0), RATE)
    entries = [
        {"audio": f"{name}.wav", "offset": 0.5, "duration": 0.5 + 0.1 * n, "text": name}
        for n, name in enumerate("ab")
    ]
    with pytest.raises(ConfigError, match="1 pieces share samples"):
        units(config(pieces="examples"), read(manifest(tmp_path, entries)))


@pytest.mark.parametrize("train", [{"offset": 0.5, "duration": 0.5}, {}], ids=["piece", "whole"])
@pytest.mark.parametrize("test", [{"offset": 1.2, "duration": 0.5}, {}], ids=["piece", "whole"])
def test_a_copy_of_a_file_is_shared_whatever_is_taken_of_it(
    tmp_path: Path, train: dict[str, float], test: dict[str, float]
) -> None:
    for name, seed in (("a", 0), ("copy", 0), ("unlike", 1)):
        soundfile.write(tmp_path / f"{name}.wav", noise(2.0, seed), RATE)
    rows = [{"audio": f"{name}.wav", "text": name, **test} for name in ("copy", "unlike")]
    first = read(manifest(tmp_path, [{"audio": "a.wav", "text": "a", **train}]))
    assert shared_recordings(first, read(manifest(tmp_path, rows))) == ["copy"]


def test_the_bytes_of_a_file_in_a_table_are_its_copy(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", noise(2.0), RATE)
    path = tmp_path / "table.parquet"
    datasets.Dataset.from_dict(
        {"audio": [{"bytes": (tmp_path / "a.wav").read_bytes()}], "text": ["b"]}
    ).to_parquet(path)
    piece = read(manifest(tmp_path, [{"audio": "a.wav", "text": "a", "offset": 0.5, "duration": 0.5}]))
    assert shared_recordings(piece, read(path)) == ["train-0"]
    assert shared_recordings(read(path), piece) == ["a"]


def test_another_piece_of_a_training_recording_is_shared(tmp_path: Path) -> None:
    corpus = read(kaldi(tmp_path, APART))
    first, second = Corpus(corpus.utterances[:1]), Corpus(corpus.utterances[1:])
    assert shared_recordings(first, second) == ["b"]
