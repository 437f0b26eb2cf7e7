from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from asr_finetune.data.audio import AudioError, DatasetRow, duration, read_audio
from asr_finetune.data.corpus import Utterance

RATE = 16000


def tone(seconds: float, rate: int, hertz: float = 440.0) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


def of_file(path: Path, seconds: float = 0.0) -> Utterance:
    return Utterance("u", path, None, None, "text", None, seconds)


def of_samples(samples: np.ndarray, rate: int | None = RATE) -> Utterance:
    return Utterance("u", None, samples, rate, "text", None, 1.0)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_any_rate_and_format_give_the_same_samples(tmp_path: Path, rate: int, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, tone(0.5, rate), rate)
    assert duration(path) == pytest.approx(0.5, abs=1 / rate)
    assert duration(path.read_bytes()) == duration(path)
    samples = read_audio(of_file(path), RATE)
    assert samples.dtype == np.float32
    assert samples.flags.c_contiguous
    assert abs(len(samples) - RATE // 2) <= 1
    middle = slice(1000, 7000)  # resampling rings at the ends
    np.testing.assert_allclose(samples[middle], tone(0.5, RATE)[middle], atol=2e-3)


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = tone(0.1, RATE), tone(0.1, RATE, 1000.0)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), RATE, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(of_file(tmp_path / "a.wav"), RATE), (left + right) / 2, atol=1e-7)
    np.testing.assert_allclose(
        read_audio(of_samples(np.stack([left, right], axis=1)), RATE), (left + right) / 2, atol=1e-7
    )


@pytest.mark.parametrize("dtype", [np.int16, np.int32])
def test_integer_samples_are_scaled_to_one(dtype: Any) -> None:
    most = np.iinfo(dtype).max
    samples = read_audio(of_samples(np.array([0, most, -most - 1, most // 2], dtype=dtype)), RATE)
    np.testing.assert_allclose(samples, [0, 1, -1, 0.5], atol=1e-4)
    assert samples.dtype == np.float32


def write_not_finite(path: Path) -> None:
    soundfile.write(path, np.array([0, np.nan, np.inf], dtype=np.float32), RATE, subtype="FLOAT")


def write_cut_flac(path: Path) -> None:
    soundfile.write(path, np.random.default_rng(0).normal(scale=0.1, size=RATE), RATE, format="FLAC")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("write", "in_header", "reason"),
    [
        (lambda path: None, "no such file", "unreadable audio: ."),
        (lambda path: path.mkdir(), "no such file", "unreadable audio: ."),
        (lambda path: path.write_bytes(b""), r"empty \(0 bytes\)", "unreadable audio: ."),
        (lambda path: path.write_bytes(b"not audio at all"), "unreadable audio: .", "unreadable audio: ."),
        (lambda path: soundfile.write(path, np.zeros(0), RATE), "no samples", "no samples"),
        (write_not_finite, None, "NaN or infinite"),
        (write_cut_flac, None, "unreadable audio: ."),
    ],
)
def test_what_is_wrong_with_a_file_is_said(
    tmp_path: Path, write: Any, in_header: str | None, reason: str
) -> None:
    path = tmp_path / "a.wav"
    write(path)
    if in_header is None:
        assert duration(path) > 0
    else:
        with pytest.raises(AudioError, match=in_header):
            duration(path)
        if path.is_file():
            with pytest.raises(AudioError, match=in_header):
                duration(path.read_bytes())
    with pytest.raises(AudioError, match=reason):
        read_audio(of_file(path), RATE)


def test_a_file_shorter_than_its_header_says(tmp_path: Path) -> None:
    """A truncated MP3 decodes without an error, to another length."""
    path = tmp_path / "a.mp3"
    soundfile.write(path, np.random.default_rng(0).normal(scale=0.1, size=5 * RATE), RATE)
    whole = of_file(path, duration(path))
    assert len(read_audio(whole, RATE)) == pytest.approx(5 * RATE, rel=0.02)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert duration(path) == whole.seconds
    with pytest.raises(AudioError, match=r"cut short: 2\.\d+ s of the 5\.\d+ s"):
        read_audio(whole, RATE)


@pytest.mark.parametrize(
    ("utterance", "reason"),
    [
        (Utterance("u", None, None, None, "text", None, 1.0), "neither samples nor a file"),
        (of_samples(tone(0.1, RATE), rate=None), "without a sampling_rate"),
        (of_samples(np.zeros(0, np.float32)), "no samples"),
        (of_samples(np.array([np.nan], np.float32)), "NaN"),
    ],
)
def test_utterances_without_usable_samples(utterance: Utterance, reason: str) -> None:
    with pytest.raises(AudioError, match=reason):
        read_audio(utterance, RATE)


def test_a_disk_that_fails_is_a_reason_too() -> None:
    class Broken:
        def read(self) -> bytes:
            raise OSError(5, "Input/output error")

    with pytest.raises(AudioError, match=r"unreadable audio: .*Input/output error"):
        read_audio(Utterance("u", None, None, None, "text", None, 1.0, Broken()), RATE)


def test_a_row_gives_its_bytes_or_its_files(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(0.1, RATE), RATE)
    content = path.read_bytes()
    rows = [
        {"audio": {"bytes": content, "path": None}},
        {"audio": {"bytes": None, "path": str(path)}},
        {"audio": {"bytes": None, "path": str(tmp_path / "lost.wav")}},
        {"audio": {"bytes": None, "path": None}},
        {"audio": None},
    ]
    assert [DatasetRow(rows, index, "audio").read() for index in (0, 1)] == [content, content]
    for index, reason in ((2, "lost.wav"), (3, "no bytes"), (4, "no audio in this row")):
        with pytest.raises(AudioError, match=reason):
            DatasetRow(rows, index, "audio").read()
