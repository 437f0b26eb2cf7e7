"""The three sources of a corpus: a LibriSpeech tree, a manifest, a `datasets` table.

Each source yields records; each record becomes an utterance or a problem.

`data.text_case` and `data.strip_punctuation` change the training transcripts. `evaluate.normalise` normalises texts for
scoring separately, references and hypotheses alike. Neither spells out digits, so transcripts with "FIVE" do not match
a model that writes "5" until one of them is changed.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asr_finetune.config.schema import ConfigError, DataConfig
from asr_finetune.data.audio import duration
from asr_finetune.data.corpus import Corpus, require_utterances
from asr_finetune.data.repeats import digest
from asr_finetune.data.utterance import AudioError, DatasetRow, Encoded, Problem, Utterance
from asr_finetune.hub import hub_answers, unreachable

_AUDIO_SUFFIXES = (".flac", ".wav", ".mp3", ".ogg", ".opus")


@dataclass(frozen=True)
class _Record:
    """A source's entry for one recording; `reason` if it is unusable, `place` in a manifest."""

    id: str
    text: str | None = None
    path: Path | None = None
    speaker: str | None = None
    encoded: Encoded | None = None
    reason: str | None = None
    place: str = ""


def load_corpus(source: str, *, split: str | None = None, data: DataConfig) -> Corpus:
    """Read a corpus: headers and transcripts, no samples.

    Args:
        source: a LibriSpeech tree (a folder with *.trans.txt somewhere below), a manifest (*.jsonl), or a
            `datasets` id ("name" or "name:configuration"), saved dataset or dataset folder. A manifest's line
            holds audio (path, relative to the manifest), text, and optionally utt_id, speaker, split and
            corpus.
        split: LibriSpeech subset folder ("train-clean-100+train-clean-360"), value of `split` in a manifest,
            or split of a dataset; None: everything.
        data: filters, limits, and the preparation of transcripts.

    Raises:
        ConfigError: the source or split does not exist, or has no usable recording. Single unusable recordings and
            repeats of a recording are `Corpus.problems` instead.
    """
    path = Path(source).expanduser()
    if path.suffix == ".jsonl":
        if not path.is_file():
            raise ConfigError(f"data: no manifest at {source!r}: give the path of a .jsonl file that exists")
        records = _manifest(path, split, data)
    elif path.is_dir():
        path = path.resolve()  # the names of the folders above are subset and speaker
        trees = sorted(path.rglob("*.trans.txt"))
        records = _librispeech(path, trees, split) if trees else _table(source, split, data)
    elif path.is_absolute() or source.startswith((".", "~")) or path.exists():
        raise ConfigError(
            f"data: {source!r} is not a folder and not a .jsonl manifest: give a LibriSpeech folder, a "
            "manifest with "
            "one JSON object a line, or the id of a `datasets` dataset"
        )
    else:
        records = _table(source, split, data)
    speaks = _speaker_filter(data)
    utterances: list[Utterance] = []
    problems: list[Problem] = []
    for record in records:
        if not speaks(record.speaker):
            continue
        result = _utterance(record, data)
        if isinstance(result, Problem):
            problems.append(result)
        else:
            utterances.append(result)
    return require_utterances(Corpus(utterances, problems, source)).distinct()


def prepare_text(text: str, data: DataConfig) -> str:
    """A training transcript: single spaces, the configured case, and on request no punctuation but apostrophes."""
    if data.strip_punctuation:
        text = "".join(
            " " if unicodedata.category(char).startswith("P") and char not in "'’" else char for char in text
        )
    text = " ".join(text.split())
    return {"keep": text, "lower": text.lower(), "upper": text.upper()}[data.text_case]


def _speaker_filter(data: DataConfig) -> Callable[[str | None], bool]:
    wanted = None if data.speakers is None else set(data.speakers)
    unwanted = set(data.exclude_speakers or ())
    return lambda speaker: (wanted is None or speaker in wanted) and speaker not in unwanted


def _utterance(record: _Record, data: DataConfig) -> Utterance | Problem:
    def problem(reason: str) -> Problem:
        return Problem(record.id, reason, record.place)

    if record.reason is not None:
        return problem(record.reason)
    text = prepare_text(record.text or "", data)
    if not text:
        return problem("no transcript")
    try:
        source = record.encoded.read() if record.encoded is not None else record.path
        if source is None:
            return problem("no audio")
        seconds = duration(source)
    except (AudioError, OSError) as error:
        return problem(str(error))
    if seconds < data.min_seconds:
        return problem(f"too short: {seconds:.3f} s, below data.min_seconds={data.min_seconds:g}")
    if seconds > data.max_seconds:
        return problem(f"too long: {seconds:.3f} s, above data.max_seconds={data.max_seconds:g}")
    return Utterance(
        id=record.id,
        path=record.path,
        array=None,
        sampling_rate=None,
        text=text,
        speaker=record.speaker,
        seconds=seconds,
        encoded=record.encoded,
        place=record.place,
        digest=digest(source) if isinstance(source, bytes) else None,
    )


def _librispeech(root: Path, transcripts: list[Path], split: str | None) -> Iterator[_Record]:
    """<root>/[.../]<subset>/<speaker>/<chapter>/<speaker>-<chapter>.trans.txt, with <id>.flac beside it."""
    subsets = {_folder(path, 2) for path in transcripts}
    wanted = set(split.split("+")) if split else subsets
    if not wanted <= subsets:
        raise ConfigError(
            f"data: no subset {', '.join(sorted(wanted - subsets))!r} in {str(root)!r}; there: "
            f"{', '.join(sorted(subsets))}"
        )
    for listing in transcripts:
        if _folder(listing, 2) not in wanted:
            continue
        speaker, seen = _folder(listing, 1), set()
        for line in _lines(listing):
            if not line.strip():
                continue
            name, _, text = line.strip().partition(" ")
            seen.add(name)
            files = [listing.parent / f"{name}{suffix}" for suffix in _AUDIO_SUFFIXES]
            path = next((file for file in files if file.is_file()), files[0])
            yield _Record(name, text, path, speaker)
        for file in sorted(listing.parent.iterdir()):
            if file.suffix in _AUDIO_SUFFIXES and file.stem not in seen:
                yield _Record(file.stem, speaker=speaker, reason=f"no line in its listing: {listing.name}")


def _folder(path: Path, up: int) -> str:
    """The name of the folder `up` levels above the one that holds a file; "" above the root."""
    return path.parents[min(up, len(path.parents) - 1)].name


def _lines(path: Path) -> list[str]:
    """The lines of a text file, without a byte order mark.

    Only line feeds (and the returns before them) end a line: JSON and transcripts may hold U+2028 and the like.
    """
    return path.read_text(encoding="utf-8-sig", errors="replace").split("\n")


def _manifest(path: Path, split: str | None, data: DataConfig) -> Iterator[_Record]:
    splits: set[str] = set()
    corpora: set[str] = set()
    matched = False
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        name = f"{path.name}:{number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            yield _Record(name, reason=f"not JSON: {error.msg} at column {error.colno}")
            continue
        if not isinstance(entry, dict):
            yield _Record(name, reason="not a JSON object with audio and text")
            continue
        splits.add(str(entry.get("split")))
        corpora.add(str(entry.get("corpus")))
        if split is not None and entry.get("split") not in split.split("+"):
            continue
        if data.corpus is not None and entry.get("corpus") != data.corpus:
            continue
        matched = True
        yield _manifest_record(path, name, entry)
    if not matched and (split is not None or data.corpus is not None):
        raise ConfigError(
            f"data: no line of {str(path)!r} has split={split!r} and data.corpus={data.corpus!r}; "
            f"splits there: {', '.join(sorted(splits))}; corpora: {', '.join(sorted(corpora))}"
        )


def _manifest_record(path: Path, name: str, entry: dict[str, Any]) -> _Record:
    audio, text = entry.get("audio"), entry.get("text")
    stem = Path(audio).stem if isinstance(audio, str) else ""
    identity = str(entry.get("utt_id") or stem or name)
    place = "" if identity == name else name
    speaker = None if entry.get("speaker") is None else str(entry["speaker"])
    if not isinstance(audio, str) or not audio:
        return _Record(identity, speaker=speaker, reason="no `audio` path", place=place)
    if entry.get("offset"):
        return _Record(
            identity,
            speaker=speaker,
            reason="a piece of a longer recording (`offset`): pieces of one recording would count as several "
            "examples; cut it into a file of its own if each piece is to be a privacy unit",
            place=place,
        )
    if not isinstance(text, str):
        return _Record(identity, speaker=speaker, reason="no transcript", place=place)
    return _Record(identity, text, path.parent / audio, speaker, place=place)


def _table(source: str, split: str | None, data: DataConfig) -> Iterator[_Record]:
    import datasets

    tables = _load_table(source, split)
    for label, table in tables.items():
        for option, column in (("audio_column", data.audio_column), ("text_column", data.text_column)):
            if column not in table.column_names:
                raise ConfigError(
                    f"data.{option}={column!r}: {source!r} has the columns {', '.join(table.column_names)}"
                )
        # The default decoder (torchcodec) needs FFmpeg; soundfile reads the same bytes.
        table = table.cast_column(data.audio_column, datasets.Audio(decode=False))
        rest = table.remove_columns([data.audio_column])
        for index, row in enumerate(rest):
            speaker = row.get(data.speaker_column)
            yield _Record(
                id=str(row.get("id") or f"{label}-{index}"),
                text=row[data.text_column],
                speaker=None if speaker is None else str(speaker),
                encoded=DatasetRow(table, index, data.audio_column),
            )


def _first_line(error: BaseException) -> str:
    import datasets

    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__  # the cause has the reason, e.g. that torchcodec is missing
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _offline() -> Iterator[None]:
    """Within it, `datasets` reads earlier downloads and sends no request to the hub."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True  # load_dataset has no argument for this
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _load_table(source: str, split: str | None) -> dict[str, Any]:
    """split -> datasets.Dataset."""
    import datasets

    folder = Path(source).expanduser()
    name, _, configuration = source.partition(":")
    away = not folder.is_dir() and not hub_answers(name, kind="dataset")
    try:
        if folder.is_dir() and any((folder / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(str(folder))
        else:
            with _offline() if away else nullcontext():
                loaded = datasets.load_dataset(
                    str(folder) if folder.is_dir() else name, configuration or None
                )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        there = f" ({unreachable()}, and there is no earlier download)" if away else ""
        raise ConfigError(
            f"data: `datasets` cannot load {source!r}{there}: give a folder with *.trans.txt, a .jsonl manifest, or a "
            f"dataset id that this machine can download. Its error: {_first_line(error)}"
        ) from error
    if isinstance(loaded, datasets.Dataset):
        if split is not None and str(loaded.split) != split:
            raise ConfigError(
                f"data: {source!r} is one table (split {loaded.split}); leave the split {split!r} out"
            )
        return {str(loaded.split or "row"): loaded}
    unknown = set(split.split("+") if split else ()) - set(loaded)
    if unknown:
        raise ConfigError(
            f"data: no split {', '.join(sorted(unknown))!r} in {source!r}; there: "
            f"{', '.join(map(str, loaded))}"
        )
    return {key: loaded[key] for key in (split.split("+") if split else loaded)}
