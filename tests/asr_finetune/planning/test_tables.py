"""Corpora that come as `datasets` tables."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest

from asr_finetune.config.schema import ConfigError
from asr_finetune.data.audio import read_audio
from tests.asr_finetune.recordings import RATE, encoded, noise, read, reasons, texts, write


def rows(folder: Path) -> dict[str, list[Any]]:
    return {
        "audio": [
            {"bytes": encoded(seed=0), "path": None},
            {"bytes": None, "path": str(write(folder / "b.wav"))},
            {"bytes": b"damaged", "path": None},
            None,
            {"bytes": encoded(0.01), "path": None},
            {"bytes": encoded(), "path": None},
        ],
        "text": ["one", "two", "three", "four", "five", None],
        "speaker": ["s1", None, "s1", "s1", "s1", "s1"],
    }


def table(folder: Path) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    text = datasets.Value("string")
    columns = {"audio": {"bytes": datasets.Value("binary"), "path": text}, "text": text, "speaker": text}
    made = datasets.Dataset.from_dict(rows(folder), features=datasets.Features(columns))
    return made.cast_column("audio", datasets.Audio())


def as_parquet(folder: Path) -> tuple[Path, str]:
    table(folder / "audio").to_parquet(str(folder / "set" / "train.parquet"))
    return folder / "set", "train-"


def as_saved(folder: Path) -> tuple[Path, str]:
    table(folder / "audio").save_to_disk(str(folder / "set"))
    return folder / "set", "row-"


def as_saved_splits(folder: Path) -> tuple[Path, str]:
    datasets.DatasetDict({"train": table(folder / "audio")}).save_to_disk(str(folder / "set"))
    return folder / "set", "train-"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


@pytest.mark.parametrize("save", [as_parquet, as_saved, as_saved_splits])
def test_a_table_of_recordings(tmp_path: Path, save: Callable[[Path], tuple[Path, str]]) -> None:
    folder, prefix = save(tmp_path)
    corpus = read(folder)
    assert texts(corpus) == {f"{prefix}0": "one", f"{prefix}1": "two"}
    assert corpus.speakers == ["s1", None]
    assert [utterance.seconds for utterance in corpus.utterances] == [0.5, 0.5]
    np.testing.assert_allclose(read_audio(corpus.utterances[0], RATE), noise(0.5), atol=1e-4)
    found = reasons(corpus)
    assert len(found) == 4
    assert "unreadable audio" in found[f"{prefix}2"]
    assert "no audio in this row" in found[f"{prefix}3"]
    assert "too short" in found[f"{prefix}4"]
    assert found[f"{prefix}5"] == "no transcript"


@pytest.fixture
def audio_folder(tmp_path: Path) -> Path:
    for index, split in enumerate(("train", "test")):
        write(tmp_path / split / f"{index}.wav", seed=index)
        line = {"file_name": f"{index}.wav", "words": f"text {index}", "who": f"s{index}"}
        (tmp_path / split / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    return tmp_path


def test_an_audio_folder(audio_folder: Path) -> None:
    named = {"columns": {"text": "words", "speaker": "who"}}
    corpus = read(audio_folder, "train", **named)
    assert list(texts(corpus).values()) == ["text 0"]
    assert corpus.speakers == ["s0"]
    np.testing.assert_allclose(read_audio(corpus.utterances[0], RATE), noise(0.5), atol=1e-4)
    assert len(read(audio_folder, "train+test", **named)) == 2


def test_columns_and_splits_that_are_not_there_are_named(tmp_path: Path) -> None:
    folder, _ = as_parquet(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.columns={text: sentence}.*columns audio, text, speaker"):
        read(folder, columns={"text": "sentence"})
    with pytest.raises(ConfigError, match=r"data\.columns={audio: sound}"):
        read(folder, columns={"audio": "sound"})
    with pytest.raises(ConfigError, match=r"no split 'valid'.*there: train"):
        read(folder, "train+valid")
    saved, _ = as_saved(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"is one table .*leave the split 'train' out"):
        read(saved, "train")


def test_a_folder_without_recordings_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(ConfigError, match="a folder of no format that is known here: give a LibriSpeech"):
        read(tmp_path)
    (tmp_path / "notes.txt").unlink()
    with pytest.raises(ConfigError, match="a folder of no format"):
        read(tmp_path)


@pytest.fixture
def hub_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def waits(seconds: float) -> None:
        raise AssertionError(f"waited {seconds} s to ask again")

    monkeypatch.setattr(time, "sleep", waits)
    for place, name in ((huggingface_hub.constants, "ENDPOINT"), (datasets.config, "HF_ENDPOINT")):
        monkeypatch.setattr(place, name, "http://127.0.0.1:9")  # nothing listens there


@pytest.mark.usefixtures("hub_is_away")
def test_a_hub_that_is_away_is_one_error_at_once() -> None:
    """Its client would wait between repetitions for half a minute."""
    away = (
        r"cannot load 'nobody/no-such-data' \(the hub .http://127\.0\.0\.1:9. cannot be reached, .*no earlier"
    )
    with pytest.raises(ConfigError, match=away):
        read(Path("nobody/no-such-data"))
    assert not datasets.config.HF_HUB_OFFLINE


@pytest.mark.usefixtures("hub_is_away")
def test_an_earlier_download_is_read_where_the_hub_is_away(tmp_path: Path) -> None:
    folder, _ = as_parquet(tmp_path)
    here = datasets.load_dataset(str(folder))
    made = Path(here["train"].cache_files[0]["filename"]).parent
    kept = datasets.config.HF_DATASETS_CACHE / "somebody___set" / "default" / "0.0.0"
    kept.mkdir(parents=True)
    made.rename(kept / ("0" * 40))  # where `datasets` puts it: the hub's commit
    for file in kept.rglob("*.arrow"):
        file.rename(file.with_name("set-train.arrow"))
    assert texts(read(Path("somebody/set"))) == {"train-0": "one", "train-1": "two"}


def test_a_hub_that_answers_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def load(name: str, configuration: str | None) -> None:
        assert not datasets.config.HF_HUB_OFFLINE
        raise datasets.exceptions.DatasetNotFoundError("no such data set")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", asked.append)
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        ConfigError, match=r"cannot load 'nobody/no-such-data': give .*error: no such data set"
    ):
        read(Path("nobody/no-such-data"))
    assert [url.partition("/datasets/")[2] for url in asked] == ["nobody/no-such-data/resolve/main/README.md"]


@pytest.fixture
def hub_without_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that answers, and a `datasets` that cannot load an audiofolder without torchcodec."""

    def load(name: str, configuration: str | None) -> None:
        try:
            raise ImportError("To support encoding audio data, please install 'torchcodec'.")
        except ImportError as error:
            raise datasets.exceptions.DatasetGenerationError("An error occurred") from error

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: None)
    monkeypatch.setattr(datasets, "load_dataset", load)


@pytest.mark.usefixtures("hub_without_codec")
def test_an_audio_folder_on_the_hub_needs_no_torchcodec_either(
    audio_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def download(name: str, repo_type: str) -> str:
        asked.append((name, repo_type))
        return str(audio_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    named = {"columns": {"text": "words", "speaker": "who"}}
    assert texts(read(Path("nobody/audio"), "train+test", **named)) == {"0": "text 0", "1": "text 1"}
    assert asked == [("nobody/audio", "dataset")]


@pytest.mark.usefixtures("hub_without_codec")
def test_an_audio_folder_that_the_hub_does_not_give_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, repo_type: str) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no such file here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(
        ConfigError, match=r"torchcodec.*hf download nobody/audio --repo-type dataset --local-dir"
    ):
        read(Path("nobody/audio"))
