"""One recording with its transcript and audio source, and the reasons why recordings are unusable."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soundfile

_SUBTYPES = {"float32": "FLOAT", "float64": "DOUBLE", "int16": "PCM_16", "int32": "PCM_32"}


class AudioError(ValueError):
    """A recording cannot be used; the message is the reason in the list of problems."""


class Encoded(Protocol):
    """An audio file that is not a file on disk: a row of a dataset."""

    def read(self) -> bytes:
        """The file's bytes (WAV, FLAC, OGG, MP3)."""


@dataclass(frozen=True)
class DatasetRow:
    """The audio of one row of a `datasets` table, read on demand from the memory-mapped table."""

    table: Any
    index: int
    column: str
    sampling_rate: int | None = None  # of samples in a row that does not say it
    dtype: str = ""  # of samples: the table's rows are Python's numbers
    root: Path = Path()  # where relative paths start

    def read(self) -> bytes:
        """The file's bytes; samples [n] as those of a WAV file.

        Raises:
            AudioError: the row holds neither bytes, nor a readable path, nor samples with a rate.
        """
        audio = self.table[self.index][self.column]
        if audio is None:
            raise AudioError("no audio in this row")
        if isinstance(audio, bytes):
            return audio
        if not isinstance(audio, dict):
            return self._as_wav(audio, self.sampling_rate)
        if audio.get("bytes") is not None:
            return bytes(audio["bytes"])
        if audio.get("array") is not None:
            return self._as_wav(audio["array"], audio.get("sampling_rate") or self.sampling_rate)
        path = self.root / (audio.get("path") or "")
        if not path.is_file():
            raise AudioError(f"no audio in this row: no bytes, and no file at {audio.get('path')!r}")
        return path.read_bytes()

    def _as_wav(self, audio: Any, rate: int | None) -> bytes:
        if rate is None:
            raise AudioError(
                "samples without their rate: add a column sampling_rate, or set data.sampling_rate"
            )
        try:
            samples = np.asarray(audio, dtype=self.dtype or None)
        except (TypeError, ValueError):
            samples = np.empty((0, 0))
        subtype = _SUBTYPES.get(samples.dtype.name)
        if samples.ndim != 1 or subtype is None:
            raise AudioError(
                f"no samples of one channel: {samples.ndim} axes of {self.dtype or samples.dtype}; store a list of "
                "float32 within ±1, or of int16"
            )
        file = io.BytesIO()
        soundfile.write(file, samples, int(rate), format="WAV", subtype=subtype)
        return file.getvalue()


@dataclass(frozen=True)
class Utterance:
    """One recording and its transcript: one example.

    Attributes:
        id: its name, for messages.
        path: the audio file, or None.
        array: samples [n] or [n, channels] instead of a file, or None.
        sampling_rate: samples per second of `array`, Hz.
        text: the training transcript.
        speaker: the speaker's name, or None if unknown.
        seconds: duration, from the file's header.
        encoded: an audio file's bytes held elsewhere, instead of `path`.
        place: its "file:line" in a manifest, or "".
        digest: the digest of `encoded`, for finding repeats; see `repeats.digest`.
        stamp: size and time of change of the file at `path` when it was listed, see `audio.stamp`; of `encoded` bytes
            their number and 0; None if unknown.
        origin: what its id begins with, to stay apart from those of other sources; "" with a single source.
        piece: the (start, end) of the utterance in its file, seconds; None: the whole file.
        doubts: what is doubtful in it ("cut short: ..."): its header's when it was read, else noted by `audio.decode`.
    """

    id: str
    path: Path | None
    array: np.ndarray | None = field(compare=False)
    sampling_rate: int | None
    text: str
    speaker: str | None
    seconds: float
    encoded: Encoded | None = field(default=None, compare=False, repr=False)
    place: str = field(default="", compare=False)
    digest: bytes | None = field(default=None, compare=False, repr=False)
    stamp: tuple[int, int] | None = field(default=None, compare=False, repr=False)
    origin: str = field(default="", compare=False)
    piece: tuple[float, float] | None = None
    doubts: list[str] = field(default_factory=list, compare=False)

    @property
    def name(self) -> str:
        """The id with the place, since ids may collide."""
        return _name(self.id, self.place)


@dataclass(frozen=True)
class Problem:
    """An utterance that was left out, and why.

    Attributes:
        id: its name.
        reason: the reason; the part before its first colon is the same for all problems of one kind.
        place: its "file:line" in a manifest, or "".
    """

    id: str
    reason: str
    place: str = ""

    @property
    def name(self) -> str:
        """The id with the place, since ids may collide."""
        return _name(self.id, self.place)

    @property
    def kind(self) -> str:
        """The reason without the details of this utterance."""
        return self.reason.partition(":")[0]


def _name(identity: str, place: str) -> str:
    return f"{identity} ({place})" if place else identity
