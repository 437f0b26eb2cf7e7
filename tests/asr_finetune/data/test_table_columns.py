"""The kinds of columns in which tables of the `datasets` library hold recordings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import Features, List, Value

from asr_finetune.config.schema import ConfigError
from asr_finetune.data.audio import read_audio
from tests.asr_finetune.recordings import RATE, encoded, noise, read, reasons, texts, write

SAMPLES = [noise(0.5, seed=0), noise(0.6, seed=1)]
BYTES = [encoded(0.5, seed=0), encoded(0.6, seed=1)]


@pytest.fixture(autouse=True)
def _no_decoder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec", None)  # importing it fails
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def scaled(dtype: str) -> list[np.ndarray]:
    return [(samples * np.iinfo(dtype).max).astype(dtype) for samples in SAMPLES]


def paths(folder: Path) -> list[str]:
    return [write(folder / f"{seed}.wav", 0.5 + 0.1 * seed, seed=seed).name for seed in (0, 1)]


def structs(**columns: list[Any]) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


RATES = [RATE, RATE]
FILE = {"bytes": Value("binary"), "path": Value("string")}
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {  # kind -> values of the column, its type, options
    "bytes": (lambda _: BYTES, Value("binary"), {}),
    "paths": (paths, Value("string"), {}),
    "struct of bytes": (lambda _: structs(bytes=BYTES, path=["a.wav", None]), FILE, {}),
    "struct of paths": (lambda folder: structs(bytes=[None, None], path=paths(folder)), FILE, {}),
    "audio of paths": (
        lambda folder: structs(bytes=[None, None], path=[str(folder / name) for name in paths(folder)]),
        datasets.Audio(decode=False),
        {},
    ),
    "audio of bytes": (lambda _: structs(bytes=BYTES, path=[None, None]), datasets.Audio(), {}),
    "array and rate": (
        lambda _: structs(array=SAMPLES, sampling_rate=RATES),
        {"array": List(Value("float32")), "sampling_rate": Value("int64")},
        {},
    ),
    "array of doubles": (
        lambda _: structs(array=SAMPLES, sampling_rate=RATES, path=["a", "b"]),
        {"array": List(Value("float64")), "sampling_rate": Value("int32"), "path": Value("string")},
        {},
    ),
    "floats": (lambda _: SAMPLES, List(Value("float32")), {"sampling_rate": RATE}),
    "16-bit": (lambda _: scaled("int16"), List(Value("int16")), {"sampling_rate": RATE}),
    "32-bit": (lambda _: scaled("int32"), List(Value("int32")), {"sampling_rate": RATE}),
}


def table(folder: Path, kind: str, **more: list[Any]) -> datasets.Dataset:
    values, feature, _ = KINDS[kind]
    columns = {"audio": values(folder), "text": ["one two", "three"], "id": ["a", "b"], **more}
    features = {"text": Value("string"), "id": Value("string"), "audio": feature}
    features |= {
        name: datasets.Dataset.from_dict({name: column}).features[name] for name, column in more.items()
    }
    audio = isinstance(feature, datasets.Audio)
    made = datasets.Dataset.from_dict(
        columns, features=Features({**features, "audio": FILE if audio else feature})
    )
    return (
        made.cast_column("audio", feature) if audio else made
    )  # encoding asks for torchcodec, casting does not


def as_parquet(made: datasets.Dataset, folder: Path) -> Path:
    made.to_parquet(str(folder / "train.parquet"))
    return folder / "train.parquet"


def as_arrow(made: datasets.Dataset, folder: Path) -> Path:
    made.save_to_disk(str(folder / "saved"))
    return next((folder / "saved").glob("*.arrow")).rename(folder / "train.arrow")


def as_folder(made: datasets.Dataset, folder: Path) -> Path:
    as_parquet(made, folder)
    return folder


def saved(made: datasets.Dataset, folder: Path) -> Path:
    made.save_to_disk(str(folder))
    return folder


@pytest.mark.thinned(5)
@pytest.mark.parametrize(
    ("save", "kind"),
    [
        *((as_parquet, kind) for kind in KINDS),
        *(
            (save, kind)
            for save in (as_arrow, as_folder, saved)
            for kind in ("paths", "audio of bytes", "16-bit")
        ),
    ],
)
def test_a_column_of_recordings(tmp_path: Path, save: Any, kind: str) -> None:
    corpus = read(save(table(tmp_path, kind), tmp_path), **KINDS[kind][2])
    assert texts(corpus) == {"a": "one two", "b": "three"}
    assert [item.seconds for item in corpus.utterances] == [0.5, 0.6]
    for item, samples in zip(corpus.utterances, SAMPLES, strict=True):
        np.testing.assert_allclose(read_audio(item, RATE), samples, atol=1e-4)


def test_the_rate_of_samples_may_be_a_column(tmp_path: Path) -> None:
    path = as_parquet(table(tmp_path, "floats", sampling_rate=[RATE, 2 * RATE]), tmp_path)
    assert [item.seconds for item in read(path).utterances] == [0.5, 0.3]


def test_samples_without_rate_or_scale_are_left_out_with_the_fix(tmp_path: Path) -> None:
    audio = List(Value("int64"))
    made = datasets.Dataset.from_dict(
        {"audio": [[1, 2]], "text": ["x"]}, features=Features(audio=audio, text=Value("string"))
    )
    made.to_parquet(str(tmp_path / "a.parquet"))
    good = table(tmp_path, "floats", sampling_rate=[None, RATE])
    good.to_parquet(str(tmp_path / "b.parquet"))
    assert reasons(read(tmp_path / "b.parquet")) == {
        "a": "samples without their rate: add a column sampling_rate, or set data.sampling_rate"
    }
    with pytest.raises(
        Exception, match="no samples of one channel: 1 axes of int64; store a list of float32"
    ):
        read(tmp_path / "a.parquet", sampling_rate=RATE)
    two = datasets.Dataset.from_dict({"audio": [[[0.1, 0.2], [0.3, 0.4]]], "text": ["x"]})
    two.to_parquet(str(tmp_path / "c.parquet"))
    with pytest.raises(ConfigError, match="no samples of one channel: 2 axes"):
        read(tmp_path / "c.parquet", sampling_rate=RATE)


def test_deprecated_names_of_columns(tmp_path: Path) -> None:
    made = table(tmp_path, "bytes", words=["1", "2"], who=["x", "y"]).rename_column("audio", "sound")
    path = as_parquet(made, tmp_path)
    with pytest.warns(
        DeprecationWarning, match=r"data\.audio_column is now called data\.columns={audio: \.\.\.}"
    ):
        corpus = read(path, audio_column="sound", text_column="words", speaker_column="who")
    assert (texts(corpus), corpus.speakers) == ({"a": "1", "b": "2"}, ["x", "y"])


def test_a_transcript_that_is_no_text_is_left_out(tmp_path: Path) -> None:
    made = datasets.Dataset.from_dict(
        {"audio": BYTES, "text": [5, 6], "sentence": ["five", "six"], "id": ["a", "b"]}
    )
    path = as_parquet(made, tmp_path)
    assert texts(read(path, columns={"text": "sentence"})) == {"a": "five", "b": "six"}
    with pytest.raises(ConfigError, match=r"all 2 recordings were left out.*\n  a: no transcript"):
        read(path)
