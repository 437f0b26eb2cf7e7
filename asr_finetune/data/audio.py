"""Audio files: headers and samples, with soundfile; other sampling rates with soxr."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import soundfile
import soxr

if TYPE_CHECKING:
    from asr_finetune.data.corpus import Utterance


HEADER_TOLERANCE = 0.1  # seconds: an MP3's header counts padding that its decoder drops


class AudioError(ValueError):
    """A recording that cannot be used; the message is the reason, for a list of problems."""


class Encoded(Protocol):
    """An audio file that is not on disk by itself: a row of a dataset."""

    def read(self) -> bytes:
        """The file's bytes (WAV, FLAC, OGG, MP3)."""


@dataclass(frozen=True)
class DatasetRow:
    """The audio of one row of a `datasets` table, read when it is needed: the table stays memory-mapped on
    disk.
    """

    table: Any
    index: int
    column: str

    def read(self) -> bytes:
        """The file's bytes.

        Raises:
            AudioError: the row holds neither bytes nor a readable path.
        """
        audio = self.table[self.index][self.column]
        if audio is None:
            raise AudioError("no audio in this row")
        if audio.get("bytes") is not None:
            return bytes(audio["bytes"])
        path = audio.get("path")
        if not path or not Path(path).is_file():
            raise AudioError(f"no audio in this row: no bytes, and no file at {path!r}")
        return Path(path).read_bytes()


def duration(source: Path | bytes) -> float:
    """Seconds of audio, from the file's header; nothing is decoded.

    Raises:
        AudioError: no such file, an empty file, no samples, or a format that libsndfile cannot read.
    """
    if isinstance(source, Path):
        if not source.is_file():
            raise AudioError(f"no such file: {source}")
        size = source.stat().st_size
    else:
        size = len(source)
    if size == 0:
        raise AudioError("the file is empty (0 bytes)")
    try:
        info = soundfile.info(str(source) if isinstance(source, Path) else io.BytesIO(source))
    except soundfile.LibsndfileError as error:
        raise AudioError(_unreadable(error)) from error
    if info.frames <= 0 or info.samplerate <= 0:
        raise AudioError("no samples in the file")
    return float(info.frames / info.samplerate)


def _unreadable(error: soundfile.LibsndfileError) -> str:
    return f"unreadable audio: {error.error_string or f'libsndfile error {error.code}'}"


def read_audio(utterance: Utterance, rate: int) -> np.ndarray:
    """The samples of an utterance: one channel, at `rate` Hz.

    Channels are averaged; another rate is resampled with soxr (high quality).

    Args:
        utterance: with samples (`array`, [n] or [n, channels]), or a file (`path`), or `encoded` bytes.
        rate: samples per second wanted.

    Returns:
        [n] float32, contiguous, full scale ±1.

    Raises:
        AudioError: see `decode`.
    """
    samples, found = decode(utterance)
    if found != rate:
        samples = soxr.resample(samples, found, rate, quality="HQ")
    return np.ascontiguousarray(samples, dtype=np.float32)


def decode(utterance: Utterance) -> tuple[np.ndarray, int]:
    """The samples of an utterance, [n] float32, one channel, and their rate.

    Raises:
        AudioError: the recording cannot be decoded, is empty or shorter than its header says, or holds NaN or
            infinite samples.
    """
    if utterance.array is not None:
        if utterance.sampling_rate is None:
            raise AudioError("samples are given without a sampling_rate")
        samples, found = np.asarray(utterance.array), utterance.sampling_rate
        if np.issubdtype(samples.dtype, np.integer):
            samples = samples / float(np.iinfo(samples.dtype).max + 1)
    else:
        if utterance.encoded is not None:
            try:
                file: str | io.BytesIO = io.BytesIO(utterance.encoded.read())
            except OSError as error:
                raise AudioError(f"unreadable audio: {error}") from error
        elif utterance.path is not None:
            file = str(utterance.path)
        else:
            raise AudioError("no audio: neither samples nor a file")
        try:
            samples, found = soundfile.read(file, dtype="float32")
        except soundfile.LibsndfileError as error:
            raise AudioError(_unreadable(error)) from error
        if len(samples) / found < utterance.seconds - HEADER_TOLERANCE:
            raise AudioError(
                f"cut short: {len(samples) / found:.3f} s of the {utterance.seconds:.3f} s that its header says"
            )
    samples = samples.astype(np.float32, copy=False)
    if samples.ndim == 2:
        samples = samples.mean(axis=1)
    if samples.size == 0:
        raise AudioError("no samples in the file")
    if not np.isfinite(samples).all():
        raise AudioError("holds NaN or infinite samples")
    return samples, int(found)
