"""Tables of the `datasets` library: saved ones, folders, parquet and arrow files, ids. It decodes no audio."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from asr_finetune.config.schema import ConfigError, DataConfig
from asr_finetune.data.records import TRAINING, Needs, Record, column, record_of, require_columns, value
from asr_finetune.data.utterance import DatasetRow
from asr_finetune.hub import hub_answers, unreachable

FILES = {".parquet": "parquet", ".arrow": "arrow"}  # suffix -> the builder of `datasets`


class NeedsDecoder(ConfigError):
    """A data set of the hub whose loading encodes audio, as an audiofolder's does: its files are read instead."""


def read_table(source: str, split: str | None, data: DataConfig, needs: Needs = TRAINING) -> Iterator[Record]:
    """The records of a table, whose audio is a path, the bytes of a file, or samples.

    Raises:
        ConfigError: `datasets` cannot load it, it is a stream, or it lacks a column or split.
    """
    import datasets

    root = Path(source).expanduser()
    root = root if root.is_dir() else root.parent
    for label, table in _load_table(source, split).items():
        require_columns(table.column_names, source, data, needs)
        audio = column(table.column_names, "audio", data)
        if isinstance(table.features[audio], datasets.Audio):
            # The default decoder (torchcodec) needs FFmpeg; soundfile reads the same bytes.
            table = table.cast_column(audio, datasets.Audio(decode=False))
        feature = table.features[audio]
        paths = getattr(feature, "dtype", "") == "string" and isinstance(feature, datasets.Value)
        rest = table if paths else table.remove_columns([audio])
        for index, row in enumerate(rest if rest.column_names else itertools.repeat({}, len(table))):
            name = f"{label}-{index}"
            if paths:
                yield record_of(row, name, (root,), data, needs)
                continue
            speaker, text = value(row, "speaker", data), value(row, "text", data)
            yield Record(
                id=str(value(row, "id", data) or name),
                text=text if isinstance(text, str) else None,
                speaker=None if speaker is None else str(speaker),
                encoded=DatasetRow(
                    table,
                    index,
                    str(audio),
                    sampling_rate=value(row, "sampling_rate", data) or data.sampling_rate,
                    dtype=_dtype(feature),
                    root=root,
                ),
            )


def _dtype(feature: Any) -> str:
    """The type of the samples in a column of lists, or of structs with such an `array`."""
    feature = feature.get("array", "") if isinstance(feature, dict) else feature
    while hasattr(feature, "feature"):
        feature = feature.feature
    return str(getattr(feature, "dtype", ""))


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

    path = Path(source).expanduser()
    name, _, configuration = source.partition(":")
    away = not path.exists() and not hub_answers(name, kind="dataset")
    try:
        if is_saved(path):
            loaded = datasets.load_from_disk(str(path))
        elif path.is_file():
            loaded = datasets.load_dataset(FILES[path.suffix], data_files=str(path), split="train")
        else:
            with _offline() if away else nullcontext():
                loaded = datasets.load_dataset(str(path) if path.is_dir() else name, configuration or None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        there = f" ({unreachable()}, and there is no earlier download)" if away else ""
        reason = _first_line(error)
        if "torchcodec" in reason and not path.exists():
            raise NeedsDecoder(
                f"data: `datasets` needs torchcodec to load {source!r}: run `hf download {name} --repo-type dataset "
                f"--local-dir FOLDER`, and give FOLDER, which is read without it. Its error: {reason}"
            ) from error
        raise ConfigError(
            f"data: `datasets` cannot load {source!r}{there}: give one of the formats of docs/data.md, or a "
            f"dataset id that this machine can download. Its error: {reason}"
        ) from error
    if isinstance(loaded, datasets.IterableDataset | datasets.IterableDatasetDict):
        raise ConfigError(f"data: {source!r} {STREAM}")
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


STREAM = (
    "is a stream: Poisson sampling draws each of N recordings in every step, so N must be known and every recording "
    "be at hand; download it to a folder first"
)


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return any((folder / mark).is_file() for mark in ("state.json", "dataset_dict.json"))
