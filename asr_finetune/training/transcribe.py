"""`asr-finetune transcribe`: recordings in, text out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from asr_finetune.config.schema import ConfigError, DataConfig
from asr_finetune.console import Reporter
from asr_finetune.data import listings, tables
from asr_finetune.data.audio import header, read_audio
from asr_finetune.data.records import TRANSCRIBING, Record
from asr_finetune.data.sources import read_records, utterance_of
from asr_finetune.data.utterance import AudioError, Problem, Utterance
from asr_finetune.files import MissingFile, write_text
from asr_finetune.models.longform import WINDOW_SECONDS, Progress, Segment, transcribe_long
from asr_finetune.models.recognizer import Recognizer
from dpkernels.files import writing

SUFFIXES = (".flac", ".wav", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".au", ".w64", ".sph")

_ANY_LENGTH = 1e9  # seconds


@dataclass(frozen=True)
class Transcript:
    """A recording's transcript.

    Attributes:
        audio: the file.
        seconds: its length.
        segments: the transcript with times; one segment for a recording that was decoded as a whole.
        problem: why there is none; "" if there is.
        id: the name of a piece of a file in its listing; "" for a whole file.
    """

    audio: str
    seconds: float
    segments: list[Segment]
    problem: str = ""
    id: str = ""

    @property
    def name(self) -> str:
        """What the transcript is called: the piece's name, or the file's without folder and suffix."""
        return self.id or Path(self.audio).stem

    @property
    def text(self) -> str:
        """The transcript as one line."""
        return " ".join(segment.text for segment in self.segments)


def recordings(sources: Sequence[Path], columns: Mapping[str, str] | None = None) -> list[Record]:
    """The recordings of files, folders and listings, in order.

    A folder stands for all audio in it and its folders. A listing is a file of any format that trains, or a folder of
    one without audio of its own (Kaldi's, a saved data set, parquet); it needs no transcripts.

    Args:
        sources: files and folders.
        columns: names of a listing's columns, as `data.columns`.

    Raises:
        MissingFile: a source does not exist.
        ConfigError: a folder holds neither audio nor a listing, or a listing has no column of audio.
    """
    data = DataConfig(train="-", columns=None if columns is None else dict(columns))
    found: list[Record] = []
    for source in sources:
        if not source.exists():
            raise MissingFile(f"{source}: no such file or folder")
        files = [source]
        if source.is_dir():
            files = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not files or source.suffix in (*listings.SUFFIXES, *tables.FILES):
            found += _listed(source, data)
        else:
            found += [Record(path.stem, path=path) for path in files]
    return found


def _listed(source: Path, data: DataConfig) -> list[Record]:
    try:
        return list(read_records(str(source.absolute()), None, data, TRANSCRIBING))
    except ConfigError as error:
        if source.is_file():
            raise
        raise ConfigError(
            f"{source}: no audio in this folder, and no listing: looked for {', '.join(SUFFIXES)}; {error}"
        ) from error


def transcribe(
    recognizer: Recognizer,
    files: Iterable[Record | Path],
    *,
    times: bool = False,
    reporter: Reporter | None = None,
) -> Iterator[Transcript]:
    """Transcripts of recordings, each as soon as it is made.

    A recording that fits into the model's window (CTC: 20 s) is decoded as in an evaluation; a longer one, or one
    whose times are wanted, by `longform.transcribe_long`. One that cannot be read gets a `problem`.

    Args:
        recognizer: the model.
        files: of any format that libsndfile reads, or records of `recordings`.
        times: segments with times for short recordings, too.
        reporter: progress; None prints nothing.
    """
    reporter = reporter or Reporter(enabled=False)
    records = [file if isinstance(file, Record) else Record(file.stem, path=file) for file in files]
    found = [_utterance(record) for record in records]
    total = sum(item.seconds for item in found if isinstance(item, Utterance))
    done = 0.0
    with reporter.bar("seconds of audio", max(round(total), 1)) as bar:
        for record, item in zip(records, found, strict=True):
            name = record.id if record.path is None else str(record.path)
            if isinstance(item, Problem):
                yield Transcript(name, 0.0, [], item.reason)
                continue
            known: dict[str, Any] = {"id": record.id if item.piece is not None else ""}
            begun = done

            def show(seconds: float, begun: float = begun, name: str = record.id) -> None:
                bar.update(round(begun + seconds), name)

            show(0.0)
            try:
                segments = _segments(recognizer, item, times, show)
                yield Transcript(name, item.seconds, segments, **known)
            except AudioError as error:
                yield Transcript(name, item.seconds, [], str(error), **known)
            done += item.seconds
            show(item.seconds)


def _utterance(record: Record) -> Utterance | Problem:
    """What is read of a recording, or why it cannot be; every length is accepted."""
    anything = DataConfig(train="-", min_seconds=0.0, max_seconds=_ANY_LENGTH)
    return utterance_of(replace(record, text="-"), anything, header, "")


def _segments(recognizer: Recognizer, item: Utterance, times: bool, show: Progress) -> list[Segment]:
    """The transcript, with the times in the recording's file."""
    samples = read_audio(item, recognizer.sampling_rate)
    longest = getattr(recognizer, "window_seconds", WINDOW_SECONDS)
    start = 0.0 if item.piece is None else item.piece[0]
    if times or len(samples) / recognizer.sampling_rate > longest:
        found = transcribe_long(recognizer, samples, show)
        return [replace(part, start=start + part.start, end=start + part.end) for part in found]
    reason = recognizer.audio_problem(item)
    if reason is not None:
        raise AudioError(reason)
    (text,) = recognizer.transcribe(recognizer.collate([recognizer.encode_audio(samples)]))
    return [Segment(start, start + item.seconds, text)]


def as_text(transcript: Transcript) -> str:
    """A line with the file (or the name of a piece of one) and its transcript, as transcripts_*.tsv has them."""
    return f"{transcript.id or transcript.audio}\t{transcript.text}\n"


def as_json(transcript: Transcript) -> str:
    """A line of JSON: audio, seconds, text and segments, and the id of a piece of a file."""
    values: dict[str, Any] = {"id": transcript.id} if transcript.id else {}
    values |= {"audio": transcript.audio, "seconds": round(transcript.seconds, 3), "text": transcript.text}
    segments = [
        {**asdict(segment), "start": round(segment.start, 2), "end": round(segment.end, 2)}
        for segment in transcript.segments
    ]
    return json.dumps({**values, "segments": segments}, ensure_ascii=False) + "\n"


def as_srt(transcript: Transcript) -> str:
    """Subtitles: numbered segments with their times."""
    blocks = [
        f"{number}\n{_clock(segment.start)} --> {_clock(segment.end)}\n{segment.text}\n"
        for number, segment in enumerate(transcript.segments, start=1)
    ]
    return "\n".join(blocks)


def _clock(seconds: float) -> str:
    milliseconds = round(1000 * seconds)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02},{rest % 1000:03}"


def write(
    transcripts: Iterable[Transcript], form: str, output: Path | None, say: Callable[[str], None]
) -> list[Transcript]:
    """Write transcripts, each as soon as it is made.

    Args:
        transcripts: from `transcribe`.
        form: a key of FORMATS.
        output: a file, or for "srt" a folder; None: each is given to `say`.
        say: prints a text.

    Returns:
        Those that have a problem instead of a text.

    Raises:
        WriteError: the output cannot be written; what was written before is kept.
    """
    failed: list[Transcript] = []
    names: set[str] = set()
    with ExitStack() as stack:
        lines = None
        if output is not None:
            stack.enter_context(writing(output))
            if form != "srt":
                lines = stack.enter_context(output.open("w", encoding="utf-8"))
        for transcript in transcripts:
            if transcript.problem:
                failed.append(transcript)
                continue
            text = FORMATS[form](transcript)
            if lines is not None:
                lines.write(text)
                lines.flush()
            elif output is None:
                say(text.removesuffix("\n"))
            else:
                output.mkdir(parents=True, exist_ok=True)
                name = stem = transcript.name
                while name in names:  # files of one name in several folders
                    name = f"{stem}-{len(names)}"
                names.add(name)
                write_text(output / f"{name}.srt", text)
    return failed


FORMATS = {"text": as_text, "json": as_json, "srt": as_srt}
