"""`asr-finetune transcribe`: recordings in, text out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from asr_finetune.config.schema import ConfigError
from asr_finetune.console import Reporter
from asr_finetune.data.audio import duration, read_audio
from asr_finetune.data.utterance import AudioError, Utterance
from asr_finetune.files import MissingFile, write_text
from asr_finetune.models.longform import WINDOW_SECONDS, Progress, Segment, transcribe_long
from asr_finetune.models.recognizer import Recognizer
from dpkernels.files import writing

SUFFIXES = (".flac", ".wav", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".au", ".w64", ".sph")
_MANIFEST_KEYS = ("audio", "audio_filepath", "path")


@dataclass(frozen=True)
class Transcript:
    """A recording's transcript.

    Attributes:
        audio: the file.
        seconds: its length.
        segments: the transcript with times; one segment for a recording that was decoded as a whole.
        problem: why there is none; "" if there is.
    """

    audio: str
    seconds: float
    segments: list[Segment]
    problem: str = ""

    @property
    def text(self) -> str:
        """The transcript as one line."""
        return " ".join(segment.text for segment in self.segments)


def recordings(sources: Sequence[Path]) -> list[Path]:
    """The audio files of files, folders (and theirs) and manifests (.jsonl), in order.

    Raises:
        MissingFile: a source does not exist.
        ConfigError: a folder holds no audio, or a manifest's line names none.
    """
    found: list[Path] = []
    for source in sources:
        if source.is_dir():
            files = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
            if not files:
                raise ConfigError(f"{source}: no audio in this folder; looked for {', '.join(SUFFIXES)}")
            found += files
        elif not source.is_file():
            raise MissingFile(f"{source}: no such file or folder")
        elif source.suffix == ".jsonl":
            found += _listed(source)
        else:
            found.append(source)
    return found


def _listed(manifest: Path) -> Iterator[Path]:
    for number, line in enumerate(manifest.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            audio = next(entry[key] for key in _MANIFEST_KEYS if isinstance(entry.get(key), str))
        except (json.JSONDecodeError, AttributeError, StopIteration):
            raise ConfigError(
                f"{manifest}:{number}: expected a JSON object with the path of a recording as `audio`"
            ) from None
        yield manifest.parent / audio


def transcribe(
    recognizer: Recognizer, files: Iterable[Path], *, times: bool = False, reporter: Reporter | None = None
) -> Iterator[Transcript]:
    """Transcripts of recordings, each as soon as it is made.

    A recording that fits into the model's window (CTC: 20 s) is decoded as in an evaluation; a longer one, or one
    whose times are wanted, by `longform.transcribe_long`. One that cannot be read gets a `problem`.

    Args:
        recognizer: the model.
        files: of any format that libsndfile reads.
        times: segments with times for short recordings, too.
        reporter: progress; None prints nothing.
    """
    paths, reporter = list(files), reporter or Reporter(enabled=False)
    lengths = [_seconds(path) for path in paths]
    known = [0.0 if isinstance(length, str) else length for length in lengths]
    done = 0.0
    with reporter.bar("seconds of audio", max(round(sum(known)), 1)) as bar:
        for path, length, seconds in zip(paths, lengths, known, strict=True):
            if isinstance(length, str):
                yield Transcript(str(path), 0.0, [], length)
                continue
            begun = done

            def show(seconds: float, begun: float = begun, name: str = path.name) -> None:
                bar.update(round(begun + seconds), name)

            show(0.0)
            try:
                yield Transcript(str(path), seconds, _segments(recognizer, path, seconds, times, show))
            except AudioError as error:
                yield Transcript(str(path), seconds, [], str(error))
            done += seconds
            show(seconds)


def _seconds(path: Path) -> float | str:
    """The length of a recording, or why it cannot be read."""
    try:
        return duration(path)
    except AudioError as error:
        return str(error)


def _segments(
    recognizer: Recognizer, path: Path, seconds: float, times: bool, show: Progress
) -> list[Segment]:
    utterance = Utterance(path.stem, path, None, None, "", None, seconds)
    samples = read_audio(utterance, recognizer.sampling_rate)
    longest = getattr(recognizer, "window_seconds", WINDOW_SECONDS)
    if times or len(samples) / recognizer.sampling_rate > longest:
        return transcribe_long(recognizer, samples, show)
    reason = recognizer.audio_problem(utterance)
    if reason is not None:
        raise AudioError(reason)
    (text,) = recognizer.transcribe(recognizer.collate([recognizer.encode_audio(samples)]))
    return [Segment(0.0, seconds, text)]


def as_text(transcript: Transcript) -> str:
    """A line with the file and its transcript, as transcripts_*.tsv has them."""
    return f"{transcript.audio}\t{transcript.text}\n"


def as_json(transcript: Transcript) -> str:
    """A line of JSON: audio, seconds, text and segments."""
    values = {"audio": transcript.audio, "seconds": round(transcript.seconds, 3), "text": transcript.text}
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
                name = stem = Path(transcript.audio).stem
                while name in names:  # files of one name in several folders
                    name = f"{stem}-{len(names)}"
                names.add(name)
                write_text(output / f"{name}.srt", text)
    return failed


FORMATS = {"text": as_text, "json": as_json, "srt": as_srt}
