"""Recordings that can be read, but not trusted, are warned about by name; and what libsndfile does not read."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr_finetune.console import Reporter
from asr_finetune.data.audio import header
from asr_finetune.data.corpus import Corpus
from asr_finetune.data.utterance import AudioError
from asr_finetune.training.run_folder import RunFolder
from tests.asr_finetune.recordings import RATE, manifest, noise, read, write

SPEECH = noise(1.0)
SAMPLES: dict[str, np.ndarray] = {
    "silent: its largest sample is 0 of": np.zeros(RATE),
    "silent: its largest sample is 0.0005 of": np.clip(SPEECH, -5e-4, 5e-4),
    "clipped: ": np.clip(20 * SPEECH, -1, 1),
    "not scaled: its largest sample is": 32768 * SPEECH / np.abs(SPEECH).max(),
    "channels in antiphase: their mean": np.stack([SPEECH, -0.9 * SPEECH], axis=1),
}
SOUND: list[np.ndarray] = [
    SPEECH,
    0.01 * SPEECH,
    SPEECH / np.abs(SPEECH).max(),
    1.2 * SPEECH / np.abs(SPEECH).max(),
    np.stack([SPEECH, noise(1.0, seed=1)], axis=1),
    np.stack([SPEECH, np.zeros(RATE)], axis=1),
]


def heard(folder: Path, samples: np.ndarray, subtype: str = "FLOAT") -> Corpus:
    soundfile.write(folder / "odd.wav", samples, RATE, subtype=subtype)
    entries = [{"audio": write(folder / "good.wav").name, "text": "x"}, {"audio": "odd.wav", "text": "y"}]
    return read(manifest(folder, entries)).decoded(Reporter(False), "")


@pytest.mark.parametrize("doubt", SAMPLES)
def test_doubtful_samples_are_named_and_counted(tmp_path: Path, doubt: str) -> None:
    corpus = heard(tmp_path, SAMPLES[doubt])
    assert len(corpus) == 2
    (found,) = corpus.doubts
    assert found.name == "odd (all.jsonl:2)"
    assert found.reason.startswith(doubt)
    assert f"1 kept, but listen to them: 1 × {doubt.partition(':')[0]}" in corpus.summary()


@pytest.mark.parametrize("samples", SOUND)
def test_ordinary_samples_are_not_doubted(tmp_path: Path, samples: np.ndarray) -> None:
    assert not heard(tmp_path, samples).doubts


def test_samples_clipped_at_the_largest_integer(tmp_path: Path) -> None:
    assert heard(tmp_path, 20 * SPEECH, "PCM_16").doubts[0].kind == "clipped"


# Files whose end is missing

CUT = [
    *(("WAV", subtype) for subtype in ("PCM_16", "PCM_24", "FLOAT", "ULAW")),
    *(
        ("WAVEX", "PCM_16"),
        ("RF64", "PCM_16"),
        ("W64", "PCM_16"),
        ("AIFF", "PCM_16"),
        ("AU", "PCM_16"),
        ("NIST", "PCM_16"),
    ),
    *(("OGG", "VORBIS"), ("OGG", "OPUS"), ("FLAC", "PCM_16"), ("MP3", "MPEG_LAYER_III")),
]


def content(kind: str, subtype: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, noise(5.0), RATE, format=kind, subtype=subtype)
    return file.getvalue()


@pytest.mark.thinned(5)
@pytest.mark.parametrize(("kind", "subtype"), CUT)
def test_a_file_that_was_cut_in_half_is_never_taken_for_a_whole_one(
    tmp_path: Path, kind: str, subtype: str
) -> None:
    """Some of them are read as far as they go, some are not: by name in both cases."""
    whole, path = content(kind, subtype), tmp_path / "a.audio"
    path.write_bytes(whole)
    assert header(path)[1] == header(whole)[1] == ""
    path.write_bytes(whole[: len(whole) // 2])
    write(tmp_path / "good.wav")
    entries = [{"audio": "good.wav", "text": "x"}, {"audio": path.name, "text": "y"}]
    corpus = read(manifest(tmp_path, entries)).decoded(Reporter(False), "")
    (found,) = [*corpus.problems, *corpus.doubts]
    assert found.name == "a (all.jsonl:2)"
    assert found.kind in ("cut short", "unreadable audio")
    if found in corpus.doubts:
        assert header(path.read_bytes())[1] == found.reason


def test_a_stream_whose_length_was_unknown_is_whole(tmp_path: Path) -> None:
    """ffmpeg and sox write these sizes when they write to a pipe."""
    whole = bytearray(content("WAV", "PCM_16"))
    data = whole.index(b"data") + 4
    for size in (0xFFFFFFFF, 0x7FFFFFFF - 8, 0x7FFFF024):
        whole[4:8] = whole[data : data + 4] = size.to_bytes(4, "little")
        assert header(bytes(whole)) == (5.0, "")


def test_another_length_than_listed_is_doubted(tmp_path: Path) -> None:
    name = write(tmp_path / "a.wav", 2.0).name
    entries = [{"audio_filepath": name, "duration": 1.2, "text": "x"}]
    (found,) = read(manifest(tmp_path, entries)).doubts
    assert found.reason == "another length than listed: 2.000 s in place of 1.2 s"


# What libsndfile does not read

FOREIGN = {
    "m4a": b"\0\0\0\x20ftypM4A \0\0\0\0M4A mp42isom\0\0\0\0",
    "aac": b"\xff\xf1\x50\x80\x02\x1f\xfc" * 9,
    "webm": b"\x1a\x45\xdf\xa3\x9fB\x86\x81\x01B\xf7\x81\x01B\xf2\x81\x04",
    "wma": b"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\x00\xaa\x00\x62\xce\x6c",
    "amr": b"#!AMR\n\x3c" + b"\x55" * 60,
}


@pytest.mark.parametrize("suffix", FOREIGN)
def test_what_libsndfile_does_not_read_comes_with_the_command_that_converts_it(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(FOREIGN[suffix])
    with pytest.raises(AudioError, match=rf"unreadable audio: .*ffmpeg -i a\.{suffix} a\.{suffix}\.flac"):
        header(path)
    with pytest.raises(AudioError, match="ffmpeg -i FILE"):
        header(path.read_bytes())


def test_doubts_are_written_beside_the_problems(tmp_path: Path) -> None:
    corpus = heard(tmp_path, np.zeros(RATE))
    folder = RunFolder(tmp_path / "run")
    folder.not_private.mkdir(parents=True)
    folder.note_problems("train", corpus.problems, corpus.doubts)
    assert (folder.not_private / "doubts_train.tsv").read_text().startswith("odd (all.jsonl:2)\tsilent: ")
    assert (folder.not_private / "problems_train.tsv").read_text() == ""
