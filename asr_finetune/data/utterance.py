"""One recording with its transcript and audio source, and the reasons why recordings are unusable."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np


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
