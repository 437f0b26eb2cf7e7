"""A source's entry for one recording, read from a row of columns: a JSON line, or a row of a table or data set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asr_finetune.config.schema import COLUMNS, ConfigError, DataConfig
from asr_finetune.data.utterance import Encoded

Needs = Sequence[str]
TRAINING: Needs = ("audio", "text")  # what a source must have of each recording
TRANSCRIBING: Needs = ("audio",)


@dataclass(frozen=True)
class Record:
    """A source's entry for one recording, before its audio is looked at.

    Attributes:
        id: its name.
        text: the transcript as listed.
        path: the audio file.
        speaker: the speaker's name, or None if unknown.
        encoded: an audio file's bytes held elsewhere, instead of `path`.
        reason: why it is unusable, or None.
        place: its "file:line", or "".
        offset: seconds from the file's start, if it is a piece of the file; None: the whole file.
        seconds: its listed duration, or None.
    """

    id: str
    text: str | None = None
    path: Path | None = None
    speaker: str | None = None
    encoded: Encoded | None = None
    reason: str | None = None
    place: str = ""
    offset: float | None = None
    seconds: float | None = None


def column(names: Iterable[str], wanted: str, data: DataConfig) -> str | None:
    """The one of these columns that holds `wanted` (a key of COLUMNS), by `data.columns` or else by its usual names."""
    there = set(names)
    chosen = (data.columns or {}).get(wanted)
    usual = COLUMNS[wanted] if chosen is None else (chosen,)
    return next((name for name in usual if name in there), None)


def require_columns(names: list[str], source: str, data: DataConfig, needs: Needs = TRAINING) -> None:
    """Check that a table has columns for what is needed.

    Raises:
        ConfigError: it has not; the message lists those it has.
    """
    for wanted in needs:
        if column(names, wanted, data) is None:
            named = (data.columns or {}).get(wanted)
            usual = " or ".join(COLUMNS[wanted])
            raise ConfigError(
                f"data.columns={{{wanted}: {named or '?'}}}: {source!r} has the columns {', '.join(names)}: say which "
                f"of them holds the {wanted}{'' if named else f', since none is called {usual}'}"
            )


def _seconds(given: Any) -> float | None:
    return None if given in (None, "") else float(given)


def value(row: Mapping[str, Any], wanted: str, data: DataConfig) -> Any:
    """What a row holds of `wanted` (a key of COLUMNS); None if it has no such column."""
    name = column(row, wanted, data)
    return None if name is None else row[name]


def record_of(
    row: Mapping[str, Any], name: str, roots: Iterable[Path], data: DataConfig, needs: Needs = TRAINING
) -> Record:
    """The record of a row whose audio is a path.

    Only the row itself decides: which columns count does not depend on other rows.

    Args:
        row: values by column.
        name: the row's place, "file:line"; also its id where it has no other.
        roots: the folders that a relative path may start from; the first one in which the file is counts.
        data: names of the columns.
        needs: without "text", a row may lack its transcript.
    """
    audio, text = value(row, "audio", data), value(row, "text", data)
    stem = Path(audio).stem if isinstance(audio, str) else ""
    identity = str(value(row, "id", data) or stem or name)
    place = "" if identity == name else name
    speaker = value(row, "speaker", data)
    known: dict[str, Any] = {"place": place, "speaker": None if speaker in (None, "") else str(speaker)}
    if not isinstance(audio, str) or not audio:
        return Record(
            identity, reason=f"no `audio` path: its columns are {', '.join(map(str, row))}", **known
        )
    if not isinstance(text, str):
        text = None
        if "text" in needs:
            return Record(identity, reason="no transcript", **known)
    try:
        offset, end, seconds = (_seconds(value(row, key, data)) for key in ("offset", "end", "duration"))
    except (TypeError, ValueError, OverflowError) as error:
        return Record(identity, reason=f"its times are no seconds: {error}", **known)
    if end is not None:
        seconds = end - (offset or 0)
    paths = [root / audio for root in roots]
    try:
        path = next((path for path in paths if path.is_file()), paths[0])
    except OSError as error:  # a name that no file can have
        return Record(identity, reason=f"its path cannot be a file's: {error.strerror}", **known)
    return Record(identity, text, path, offset=offset, seconds=seconds, **known)
