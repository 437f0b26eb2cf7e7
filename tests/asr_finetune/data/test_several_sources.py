"""Several sources as one corpus."""

from __future__ import annotations

import shutil
from pathlib import Path

import datasets
import pytest
import yaml
from typer.testing import CliRunner

from asr_finetune.cli import app
from asr_finetune.config.schema import Config, ConfigError
from asr_finetune.data.provenance import shared_recordings
from asr_finetune.data.sources import load_corpus
from asr_finetune.training.record import data_record
from tests.asr_finetune.recordings import manifest, options, reasons, texts, write


def source(folder: Path, names: str, **values: str) -> str:
    lines = [
        {"audio": write(folder / f"{n}.wav", seed=ord(n)).name, "text": n.upper(), **values} for n in names
    ]
    return str(manifest(folder, lines))


def test_ids_stay_apart(tmp_path: Path) -> None:
    first, second = source(tmp_path / "x", "ab", split="train"), str(tmp_path / "y")
    shutil.move(source(tmp_path / "y", "cd", split="dev"), tmp_path / "y" / "other.jsonl")
    write(tmp_path / "y" / "c.wav", seed=7)
    corpus = load_corpus([first, second], data=options())
    assert texts(corpus) == {"all.jsonl/a": "A", "all.jsonl/b": "B", "y/c": "C", "y/d": "D"}
    assert not corpus.notes
    assert corpus.source == f"{first}, {second}"
    config = Config.from_dict(
        {
            "model": {"name": "m"},
            "data": {"train": [first, second], "train_split": [None, "dev"]},
            "output": "o",
        }
        | {"privacy": {"enabled": False}}
    )
    shown = data_record(config, corpus, "")
    assert (shown["source"], shown["split"]) == ("all.jsonl + y", "all + dev")
    chosen = load_corpus([first, second], split=[None, "dev"], data=options())
    assert len(chosen) == 4
    assert list(texts(load_corpus([first], data=options()))) == ["a", "b"]
    with pytest.raises(ConfigError, match="3 splits for 2 sources"):
        load_corpus([first, second], split=["a", "b", "c"], data=options())


def test_sources_of_one_name_are_numbered(tmp_path: Path) -> None:
    sources = [source(tmp_path / "x", "a"), source(tmp_path / "y", "b")]
    assert list(texts(load_corpus(sources, data=options()))) == ["1:all.jsonl/a", "2:all.jsonl/b"]


def test_a_recording_in_two_sources_is_one_example_and_named(tmp_path: Path) -> None:
    sources = [source(tmp_path / "x", "ab"), source(tmp_path / "y", "bc")]
    corpus = load_corpus(sources, data=options())
    assert list(texts(corpus)) == ["1:all.jsonl/a", "1:all.jsonl/b", "2:all.jsonl/c"]
    assert reasons(corpus) == {
        "2:all.jsonl/b": "the same recording as one listed before: 1:all.jsonl/b (all.jsonl:2)"
    }
    assert len(load_corpus([sources[0], sources[0]], data=options())) == 2


def test_a_copy_in_another_format_is_noted(tmp_path: Path) -> None:
    """It is not left out: two people's recordings may agree in name, text and length."""
    first, folder = source(tmp_path / "x", "ab"), tmp_path / "y"
    lines = [{"audio": write(folder / "a.flac", seed=ord("a")).name, "text": "A"}]
    corpus = load_corpus([first, str(manifest(folder, lines))], data=options())
    assert len(corpus) == 3
    (note,) = corpus.notes
    assert note in corpus.summary()
    assert "1 recordings have the name, transcript and length of one in another source" in note
    assert "2:all.jsonl/a" in note
    assert not load_corpus(first, data=options()).notes


def test_a_file_and_the_same_bytes_in_a_table_are_one_recording(tmp_path: Path) -> None:
    first = source(tmp_path / "x", "ab")
    content = [(tmp_path / "x" / "b.wav").read_bytes(), write(tmp_path / "c.wav", seed=3).read_bytes()]
    table = datasets.Dataset.from_dict({"audio": content, "text": ["B", "C"], "id": ["b", "c"]})
    table.save_to_disk(str(tmp_path / "table"))
    corpus = load_corpus([first, str(tmp_path / "table")], data=options())
    assert list(texts(corpus)) == ["all.jsonl/a", "all.jsonl/b", "table/c"]
    assert reasons(corpus)["table/b"] == "the same recording as one listed before: all.jsonl/b (all.jsonl:2)"


def test_a_test_recording_is_found_in_several_sources(tmp_path: Path) -> None:
    """As a copy in another format, too."""
    sources, folder = [source(tmp_path / "x", "ab"), source(tmp_path / "y", "cd")], tmp_path / "z"
    lines = [{"audio": write(folder / f"{n}.flac", seed=ord(n)).name, "text": n.upper()} for n in "ce"]
    tested = load_corpus(str(manifest(folder, lines)), data=options())
    assert shared_recordings(load_corpus(sources, data=options()), tested) == ["c"]


def test_a_list_in_the_configuration() -> None:
    def data(**values: object) -> Config:
        return Config.from_dict({"model": {"name": "m"}, "data": values, "output": "o"})

    assert data(train=["a", 7], train_split=["x", None]).data.train == ["a", "7"]
    assert data(train=["a"]).data.train == "a"
    assert data(train="a", valid=["b", "c"]).data.valid == ["b", "c"]
    for wrong in ([], [[]], {"a": "b"}, ["a", None], 1.5):
        with pytest.raises(ConfigError, match="expected a folder, a file or an id, or a list of them"):
            data(train=wrong)
    with pytest.raises(ConfigError, match="expected text, or a list with one for each source"):
        data(train="a", train_split=[1.5])


def test_sources_from_the_command_line() -> None:
    printed = CliRunner().invoke(
        app, ["train", "--model", "m", "--data", "a", "--data", "b", "--test", "c", "--print-config"]
    )
    data = Config.from_dict(yaml.safe_load(printed.output)).data
    assert (data.train, data.test, data.valid) == (["a", "b"], "c", None)
