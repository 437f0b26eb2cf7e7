"""The sources of a corpus, in any of the formats of docs/data.md, and several of them as one corpus.

A source yields records; each record becomes an utterance or a problem.

`data.text_case` and `data.strip_punctuation` change the training transcripts. `evaluate.normalise` normalises texts for
scoring separately, references and hypotheses alike. Neither spells out digits, so transcripts with "FIVE" do not match
a model that writes "5" until one of them is changed.
"""

from __future__ import annotations

import functools
import itertools
import logging
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from asr_finetune.config.schema import ConfigError, DataConfig
from asr_finetune.data import listings, tables
from asr_finetune.data.audio import HEADER_TOLERANCE, header, stamp
from asr_finetune.data.corpus import Corpus, require_utterances
from asr_finetune.data.records import TRAINING, Needs, Record
from asr_finetune.data.repeats import digest
from asr_finetune.data.utterance import AudioError, Problem, Utterance
from asr_finetune.hub import downloaded

logger = logging.getLogger("asr_finetune")
Source = str | Sequence[str]
Split = str | Sequence[str | None] | None
KNOWN = (
    "a LibriSpeech tree (*.trans.txt), a Common Voice folder (*.tsv and clips/), a Kaldi data folder (wav.scp, text), "
    "LJSpeech (metadata.csv and wavs/), an audiofolder (metadata.csv or .jsonl), a saved data set, or a folder or file "
    "of JSON lines (also NeMo's), .csv or .tsv with a header, .parquet or .arrow; or the id of a `datasets` data set"
)


def load_corpus(source: Source, *, split: Split = None, data: DataConfig) -> Corpus:
    """Read a corpus: headers and transcripts, no samples.

    Args:
        source: a folder, a file or an id, in a format of docs/data.md; several of them become one corpus, whose ids
            begin with the name of their source.
        split: LibriSpeech subset folder ("train-clean-100+train-clean-360"), value of `split` in a listing, name of
            one of several listings, or split of a dataset; None: everything. A list has one for each source.
        data: filters, limits, names of columns, and the preparation of transcripts.

    Raises:
        ConfigError: a source or split does not exist, or no recording is usable. Single unusable recordings and
            repeats of a recording are `Corpus.problems` instead.
    """
    sources = [source] if isinstance(source, str) else list(source)
    splits = [split] * len(sources) if split is None or isinstance(split, str) else list(split)
    if len(splits) != len(sources):
        raise ConfigError(
            f"data: {len(splits)} splits for {len(sources)} sources: give one for all, or one for each"
        )
    speaks = _speaker_filter(data)
    utterances: list[Utterance] = []
    problems: list[Problem] = []
    for label, name, part in zip(_labels(sources), sources, splits, strict=True):
        headers = functools.lru_cache(maxsize=64)(header)  # of recordings that many pieces are cut from
        for record in read_records(name, part, data):
            if not speaks(record.speaker):
                continue
            result = utterance_of(replace(record, id=label + record.id), data, headers, label)
            if isinstance(result, Problem):
                problems.append(result)
            else:
                utterances.append(result)
    corpus = require_utterances(Corpus(utterances, problems, ", ".join(sources))).distinct()
    return replace(corpus, copied=tuple(_copied(corpus)))


def _copied(corpus: Corpus) -> Iterator[str]:
    """Names of the utterances with the name, transcript and length of one in another source.

    They are noted and kept: two people's recordings may agree in these, and whether one person's is an example may not
    depend on another's.
    """
    found: dict[tuple[str, str, float], str] = {}
    for item in corpus.utterances:
        described = item.id.removeprefix(item.origin), item.text, round(item.seconds, 2)
        if found.setdefault(described, item.origin) != item.origin:
            yield item.name


def _labels(sources: Sequence[str]) -> list[str]:
    """A prefix of the ids of each source; "" if there is only one."""
    if len(sources) == 1:
        return [""]
    names = [Path(source).name for source in sources]
    return [f"{n}:{name}/" if names.count(name) > 1 else f"{name}/" for n, name in enumerate(names, start=1)]


def read_records(
    source: str, split: str | None, data: DataConfig, needs: Needs = TRAINING
) -> Iterator[Record]:
    """The records of one source; its format is recognised by its files.

    Args:
        source: a folder, a file or an id, in a format of docs/data.md.
        split: as in `load_corpus`.
        data: names of columns, and `corpus`, a filter.
        needs: what each recording must have; `records.TRANSCRIBING` are those without transcripts.

    Raises:
        ConfigError: the source or split does not exist, or lacks a column.
    """
    path = Path(source).expanduser()
    if "://" in source or (path.exists() and not path.is_file() and not path.is_dir()):
        raise ConfigError(f"data: {source!r} {tables.STREAM}")
    if path.is_dir():
        return _folder_records(source, path.resolve(), split, data, needs)
    if path.suffix in tables.FILES and path.is_file():
        return tables.read_table(source, split, data, needs)
    if path.suffix in listings.SUFFIXES:
        if not path.is_file():
            raise ConfigError(
                f"data: no manifest at {source!r}: give the path of a {path.suffix} file that exists"
            )
        return listings.read_listing(path, split, data, needs)
    if path.is_absolute() or source.startswith((".", "~")) or path.exists():
        raise ConfigError(
            f"data: {source!r} is {'no format' if path.exists() else 'not there, or nothing'} that is "
            f"known here: give {KNOWN}"
        )
    return _hub_records(source, split, data, needs)


def _hub_records(source: str, split: str | None, data: DataConfig, needs: Needs) -> Iterator[Record]:
    """The records of a data set of the hub; the files of one that `datasets` could load with FFmpeg only."""
    try:
        yield from tables.read_table(source, split, data, needs)
    except tables.NeedsDecoder as error:  # before the first record
        folder = downloaded(source)
        if folder is None:
            raise
        logger.info("%s; its files are read from %s", error, folder)
        yield from _folder_records(str(folder), folder, split, data, needs)


def _folder_records(
    source: str, path: Path, split: str | None, data: DataConfig, needs: Needs
) -> Iterator[Record]:
    if (path / "wav.scp").is_file():
        return listings.read_kaldi(path, split, needs)
    if tables.is_saved(path):
        return tables.read_table(source, split, data, needs)
    if (path / "metadata.parquet").is_file():  # an audiofolder's, too
        return tables.read_table(str(path / "metadata.parquet"), split, data, needs)
    found = listings.find_listings(path, data, needs)
    if len(found) == 1 and (split is None or split not in found):
        return listings.read_listing(next(iter(found.values())), split, data, needs)
    if found:
        chosen = split.split("+") if split else list(found) if listings.is_audiofolder(found) else []
        if not chosen or not set(chosen) <= set(found):
            raise ConfigError(
                f"data: {source!r} has the splits {', '.join(found)}, which may share recordings: choose with "
                f"data.train_split (--split), e.g. {next(iter(found))}; given: {split}"
            )
        return itertools.chain.from_iterable(
            listings.read_listing(found[name], None, data, needs) for name in chosen
        )
    trees = sorted(path.rglob("*.trans.txt"))  # the names of the folders above are subset and speaker
    if trees:
        return listings.read_librispeech(path, trees, split)
    if any(file for suffix in (*tables.FILES, ".tar") for file in path.rglob(f"*{suffix}")):
        return tables.read_table(source, split, data, needs)
    raise ConfigError(f"data: {source!r} is a folder of no format that is known here: give {KNOWN}")


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


def utterance_of(
    record: Record, data: DataConfig, headers: Callable[[Path | bytes], tuple[float, str]], origin: str
) -> Utterance | Problem:
    """The utterance of a record, or why it is unusable.

    Args:
        record: of a source.
        data: limits of length, and the preparation of transcripts.
        headers: `audio.header`, which may be cached.
        origin: what the ids of its source begin with.
    """

    def problem(reason: str) -> Problem:
        return Problem(record.id, reason, record.place)

    if record.reason is not None:
        return problem(record.reason)
    text = prepare_text(record.text or "", data)
    if not text:
        return problem("no transcript")
    if "\ufffd" in text:
        return problem(f"a transcript that is not UTF-8: {text!r}")
    try:
        source = record.encoded.read() if record.encoded is not None else record.path
        if source is None:
            return problem("no audio")
        if isinstance(source, bytes):
            stamped: tuple[int, int] | None = (len(source), 0)
        else:
            stamped = stamp(source) if source.is_file() else None  # before it is read
        seconds, doubt = headers(source) if isinstance(source, Path) else header(source)
    except (AudioError, OSError) as error:
        return problem(str(error))
    piece = None
    if record.offset is not None:
        piece = record.offset, seconds if record.seconds is None else record.offset + record.seconds
        if not 0 <= piece[0] < piece[1] <= seconds + HEADER_TOLERANCE:
            return problem(
                f"a piece outside its recording: {piece[0]:g} to {piece[1]:g} s of {seconds:.3f} s"
            )
        piece = piece[0], min(piece[1], seconds)
        if piece[1] - piece[0] > seconds - HEADER_TOLERANCE:
            piece = None
        else:
            seconds = piece[1] - piece[0]
    elif record.seconds is not None and abs(record.seconds - seconds) > HEADER_TOLERANCE and not doubt:
        doubt = f"another length than listed: {seconds:.3f} s in place of {record.seconds:g} s"
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
        stamp=stamped,
        origin=origin,
        piece=piece,
        doubts=[doubt] if doubt else [],
    )
