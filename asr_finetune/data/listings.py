"""Sources that list recordings by the paths of their files: JSON lines, tables of text, Kaldi and LibriSpeech folders.

Their layouts are those of the formats' own specifications; docs/data.md quotes them.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from asr_finetune.config.schema import ConfigError, DataConfig
from asr_finetune.data.records import TRAINING, Needs, Record, column, record_of, require_columns, value

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
SUFFIXES = (*JSON_SUFFIXES, ".csv", ".tsv")
AUDIO_SUFFIXES = (".flac", ".wav", ".mp3", ".ogg", ".opus")
_LJSPEECH = ("id", "transcription", "normalized_transcription")


def read_listing(
    path: Path, split: str | None, data: DataConfig, needs: Needs = TRAINING
) -> Iterator[Record]:
    """The records of a listing: JSON lines (also NeMo's), or a table of text with a header (also LJSpeech's without).

    Args:
        path: the file. Its audio paths start from its folder, or from `clips` there (Common Voice).
        split: keep rows with this value ("train+dev": one of these) in the column `split`; None: all.
        data: `columns`, and `corpus`, a filter.
        needs: what each row must have.

    Raises:
        ConfigError: a table is not well formed or lacks a column, or no row passes the filters.
    """
    rows = _json_rows(path) if path.suffix in JSON_SUFFIXES else _table_rows(path, data, needs)
    splits: set[str] = set()
    corpora: set[str] = set()
    matched = False
    for number, row in rows:
        name = f"{path.name}:{number}"
        if isinstance(row, str):
            yield Record(name, reason=row)
            continue
        part, corpus = value(row, "split", data), value(row, "corpus", data)
        splits.add(str(part))
        corpora.add(str(corpus))
        if split is not None and part not in split.split("+"):
            continue
        if data.corpus is not None and corpus != data.corpus:
            continue
        matched = True
        yield record_of(row, name, (path.parent, path.parent / "clips"), data, needs)
    if not matched and (split is not None or data.corpus is not None):
        raise ConfigError(
            f"data: no line of {str(path)!r} has split={split!r} and data.corpus={data.corpus!r}; "
            f"splits there: {', '.join(sorted(splits))}; corpora: {', '.join(sorted(corpora))}"
        )


def find_listings(folder: Path, data: DataConfig, needs: Needs = TRAINING) -> dict[str, Path]:
    """The listings in a folder by split: `train.tsv` is the split train, and so is `train/metadata.csv` (audiofolder).

    Files without columns for what is needed are no listings.
    """
    files = {file.stem: file for file in sorted(folder.iterdir()) if file.suffix in SUFFIXES}
    files |= {file.parent.name: file for suffix in SUFFIXES for file in folder.glob(f"*/metadata{suffix}")}
    return {name: file for name, file in files.items() if file.is_file() and _is_listing(file, data, needs)}


def is_audiofolder(found: dict[str, Path]) -> bool:
    """Whether all these listings are an audiofolder's, each the only one of its split."""
    return all(file.stem == "metadata" for file in found.values())


def _is_listing(file: Path, data: DataConfig, needs: Needs) -> bool:
    try:
        _, first = next(_json_rows(file) if file.suffix in JSON_SUFFIXES else _table_rows(file, data, needs))
    except (StopIteration, ConfigError):
        return False
    return not isinstance(first, str) and None not in (column(first, name, data) for name in needs)


def lines(path: Path) -> Iterator[str]:
    """The lines of a text file, without a byte order mark.

    Only line feeds (and the returns before them) end a line: JSON and transcripts may hold U+2028 and the like.
    """
    with path.open(encoding="utf-8-sig", errors="replace", newline="\n") as file:
        for line in file:
            yield line.removesuffix("\n")


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line, object, or why it is none) of each line that is not empty; or (place, object) of each in a JSON list."""
    if path.suffix == ".json" and next(lines(path), "").startswith("["):
        try:
            entries = _parsed("\n".join(lines(path)))
        except ValueError as error:
            raise ConfigError(
                f"data: {str(path)!r} is no JSON list: {error}; write one object a line"
            ) from error
        yield from enumerate((e if isinstance(e, dict) else "not a JSON object" for e in entries), start=1)
        return
    for number, line in enumerate(lines(path), start=1):
        if not line.strip():
            continue
        try:
            entry = _parsed(line)
        except json.JSONDecodeError as error:
            yield number, f"not JSON: {error.msg} at column {error.colno}"
            continue
        except ValueError as error:
            yield number, f"not JSON: {error}"
            continue
        yield number, entry if isinstance(entry, dict) else "not a JSON object with audio and text"


def _parsed(text: str) -> Any:
    """What JSON says. Raises ValueError for any other text."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _table_rows(path: Path, data: DataConfig, needs: Needs) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line, row by the header's names, or why it is none) of a table of text.

    Tabs and vertical bars separate plain text; quotes have a meaning where commas and semicolons separate (RFC 4180).
    """
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        header = file.readline()
        try:
            separator = "\t" if path.suffix == ".tsv" else _separator(header, data)
            quoting = csv.QUOTE_MINIMAL if separator in ",;" else csv.QUOTE_NONE
            options: dict[str, Any] = {"delimiter": separator, "quoting": quoting, "strict": True}
            names = next(csv.reader([header], **options), [])
        except csv.Error as error:
            raise _no_table(path, 1, error) from error
        ljspeech = "|" in header and (path.parent / "wavs").is_dir() and column(names, "audio", data) is None
        if ljspeech:
            options |= {"delimiter": "|", "quoting": csv.QUOTE_NONE}
            file.seek(0)
        else:
            require_columns(names, str(path), data, needs)
        skipped = 0 if ljspeech else 1
        reader = csv.reader(file, **options)
        try:
            for fields in reader:
                number = reader.line_num + skipped
                if ljspeech and len(fields) in (2, 3):
                    row = dict(zip(_LJSPEECH, fields, strict=False))
                    yield number, {"audio": f"wavs/{fields[0]}.wav", "text": fields[-1], **row}
                elif len(fields) == len(names):
                    yield number, dict(zip(names, fields, strict=True))
                elif fields:
                    yield number, f"a row unlike the header: {len(fields)} fields in place of {len(names)}"
        except csv.Error as error:
            raise _no_table(path, reader.line_num + skipped, error) from error


def _no_table(path: Path, line: int, error: csv.Error) -> ConfigError:
    return ConfigError(
        f"data: {str(path)!r}, line {line}: {error}: a quoted field needs a quote at both its ends, and two for each "
        "within it"
    )


def _separator(header: str, data: DataConfig) -> str:
    """What separates the names of a header: that with which one of them is the audio's, else the most frequent."""
    known = (mark for mark in ",;\t|" if column(next(csv.reader([header], delimiter=mark)), "audio", data))
    return next(known, max(",;\t|", key=header.count))


def read_kaldi(folder: Path, split: str | None, needs: Needs = TRAINING) -> Iterator[Record]:
    """The records of a Kaldi data folder: wav.scp and text, and if there are any segments and utt2spk.

    Raises:
        ConfigError: the folder has no file `text` where one is needed, or a split is given.
    """
    if split is not None:
        raise ConfigError(f"data: the Kaldi folder {str(folder)!r} has no splits: leave {split!r} out")
    if "text" in needs and not (folder / "text").is_file():
        raise ConfigError(
            f"data: {str(folder)!r} is a Kaldi folder (wav.scp) without `text`: add the transcripts"
        )
    audio, texts, speakers, segments = (
        dict(_kaldi_lines(folder / name)) for name in ("wav.scp", "text", "utt2spk", "segments")
    )
    listing = "segments" if segments else "wav.scp"
    own = DataConfig(train="-")  # Kaldi's columns have no names that `data.columns` could change
    for number, name in enumerate(segments or audio, start=1):
        recording, *times = segments[name].split() if segments else [name]
        file = audio.get(recording, "")
        reason = _kaldi_problem(recording, file)
        if reason is not None:
            yield Record(name, reason=reason, place=f"{listing}:{number}", speaker=speakers.get(name))
            continue
        row = {"id": name, "audio": file, "text": texts.get(name), "speaker": speakers.get(name)}
        row |= dict(zip(("offset", "end"), times, strict=False))
        yield record_of(row, f"{listing}:{number}", (folder, Path()), own, needs)


def _kaldi_problem(recording: str, file: str) -> str | None:
    """Why an entry of wav.scp is not the path of a file; None if it is."""
    if not file:
        return f"no line in wav.scp: {recording!r}"
    if file.endswith("|"):
        return (
            f"a command in wav.scp: {file!r} is not run: write its output to a file (run it with "
            f"`> {recording}.wav`, or Kaldi's wav-copy for all), and name that file in wav.scp"
        )
    if re.search(r":\d+$", file):
        return f"an archive in wav.scp: {file!r}: write it to files with Kaldi's wav-copy, and name those"
    return None


def _kaldi_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(first word, rest) of each line; nothing if there is no such file."""
    for line in lines(path) if path.is_file() else ():
        name, *rest = line.split(maxsplit=1) or [""]  # at a blank or a tab
        if name:
            yield name, "".join(rest).strip()


def read_librispeech(root: Path, transcripts: Sequence[Path], split: str | None) -> Iterator[Record]:
    """<root>/[.../]<subset>/<speaker>/<chapter>/<speaker>-<chapter>.trans.txt, with <id>.flac beside it.

    Raises:
        ConfigError: the split names a subset that is not there.
    """
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
        for line in lines(listing):
            if not line.strip():
                continue
            name, _, text = line.strip().partition(" ")
            seen.add(name)
            files = [listing.parent / f"{name}{suffix}" for suffix in AUDIO_SUFFIXES]
            path = next((file for file in files if file.is_file()), files[0])
            yield Record(name, text, path, speaker)
        for file in sorted(listing.parent.iterdir()):
            if file.suffix in AUDIO_SUFFIXES and file.stem not in seen:
                yield Record(file.stem, speaker=speaker, reason=f"no line in its listing: {listing.name}")


def _folder(path: Path, up: int) -> str:
    """The name of the folder `up` levels above the one that holds a file; "" above the root."""
    return path.parents[min(up, len(path.parents) - 1)].name
