from __future__ import annotations

import json
import logging
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asr_finetune.config.schema import Config, ConfigError, MethodConfig
from asr_finetune.console import Reporter
from asr_finetune.data import audio
from asr_finetune.data.corpus import Corpus
from asr_finetune.models.ctc import CTCRecognizer
from asr_finetune.models.loading import Recognizer
from asr_finetune.models.methods import apply_method
from asr_finetune.training import dataset as module
from asr_finetune.training.augment import SpecAugment
from asr_finetune.training.dataset import SpeechDataset
from asr_finetune.training.run import train
from dpkernels.privacy import read_ledger
from tests.asr_finetune import small_models, tones
from tests.asr_finetune.recordings import manifest, noise, read, utterance, write


@pytest.fixture(scope="module")
def parakeet(folders: dict[str, Path]) -> Recognizer:
    return small_models.load(folders["parakeet"])


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(torch.as_tensor(first[key]), torch.as_tensor(second[key])) for key in first
    )


@pytest.mark.parametrize("family", ["parakeet", "wav2vec2", "whisper"])
def test_an_item_is_features_labels_and_its_index(folders: dict[str, Path], family: str) -> None:
    recognizer = small_models.load(folders[family])
    corpus = Corpus([utterance("a"), utterance("b", "high low", 0.7)])
    dataset = SpeechDataset(corpus, recognizer)
    assert len(dataset) == 2
    item = dataset[1]
    assert item["index"] == 1
    assert torch.equal(item["labels"], recognizer.encode_text(recognizer.target_prefix + "high low"))
    assert item[getattr(recognizer, "input_name", "input_features")].dtype == torch.float32
    prefixed = SpeechDataset(corpus, recognizer, target_prefix="low ")
    assert torch.equal(prefixed[0]["labels"], recognizer.encode_text("low low"))


def test_features_are_made_once_and_stay_equal(parakeet: Recognizer, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = module.read_audio
    monkeypatch.setattr(module, "read_audio", lambda item, rate: made.append(item.id) or original(item, rate))
    corpus = Corpus([utterance("a"), utterance("b")])
    cached, fresh = SpeechDataset(corpus, parakeet, cache=True), SpeechDataset(corpus, parakeet)
    first = [cached[index] for index in (0, 1, 0, 1)]
    assert made == ["a", "b"]
    assert all(same(item, fresh[item["index"]]) for item in first)
    assert made == ["a", "b", *"abab"]


def test_a_full_cache_keeps_what_it_has(parakeet: Recognizer, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = Corpus([utterance("a"), utterance("b")])
    fresh = SpeechDataset(corpus, parakeet)
    size = sum(value.nbytes for value in fresh[0].values() if isinstance(value, torch.Tensor))
    monkeypatch.setattr(module, "CACHE_BYTES", size)
    cached = SpeechDataset(corpus, parakeet, cache=True)
    for index in (0, 1, 1, 0):
        assert same(cached[index], fresh[index])
    assert cached._cache is not None
    assert list(cached._cache) == [0]


def test_a_frozen_encoders_states_are_kept_and_give_the_same_loss(folders: dict[str, Path]) -> None:
    recognizer = small_models.load(folders["whisper"])
    corpus = Corpus([utterance("a"), utterance("b", "high low")])
    cached, fresh = SpeechDataset(corpus, recognizer, cache=True), SpeechDataset(corpus, recognizer)
    before = cached[0]
    assert "encoder_states" not in before  # nothing is frozen yet
    apply_method(recognizer, MethodConfig(kind="lora", rank=2, layers="decoder"))
    assert "input_features" not in cached[0]
    assert "input_features" in SpeechDataset(corpus, recognizer, cache=True, cache_states=False)[0]
    kept, plain = (recognizer.collate([dataset[0], dataset[1]]) for dataset in (cached, fresh))
    losses = [recognizer.loss_per_example(recognizer.model, batch) for batch in (kept, plain)]
    torch.testing.assert_close(losses[0], losses[1])
    assert recognizer.transcribe(kept) == recognizer.transcribe(plain)
    recognizer.model.requires_grad_(True)  # they are out of date from here on
    assert same(cached[0], before)


def test_masks_are_drawn_anew_over_kept_features(parakeet: Recognizer) -> None:
    dataset = SpeechDataset(
        Corpus([utterance("a")]), parakeet, cache=True, augment=SpecAugment(time_share=0.5)
    )
    draws = [dataset[0]["input_features"] for _ in range(5)]
    assert len({draw.numpy().tobytes() for draw in draws}) > 1
    assert dataset._cache is not None
    assert same({**dataset._cache[0], "index": 0}, SpeechDataset(dataset.corpus, parakeet)[0])


def test_masks_stay_within_the_speech_of_a_fixed_window(folders: dict[str, Path]) -> None:
    recognizer = small_models.load(folders["whisper"])
    corpus = Corpus([utterance("a", seconds=0.3)])
    plain = SpeechDataset(corpus, recognizer)[0]["input_features"]
    augmented = SpeechDataset(corpus, recognizer, augment=SpecAugment(time_share=1.0))
    seen = torch.stack([augmented[0]["input_features"] != plain for _ in range(30)]).any(dim=0)
    assert not seen[30:].any()
    assert seen[:30].any(dim=1).all()


def test_raw_waveforms_have_no_bands_to_mask(folders: dict[str, Path]) -> None:
    recognizer = small_models.load(folders["wav2vec2"])
    with pytest.raises(ConfigError, match=r"train\.spec_augment=true: .*raw waveform"):
        SpeechDataset(Corpus([utterance("a")]), recognizer, augment=SpecAugment())


def test_a_dataset_goes_to_a_spawned_worker(parakeet: Recognizer) -> None:
    corpus = Corpus([utterance("a")])
    dataset = SpeechDataset(corpus, parakeet, cache=True, augment=SpecAugment(0, time_masks=0))
    item, spawned = dataset[0], pickle.loads(pickle.dumps(dataset))
    assert not spawned._cache, "each cached tensor would take a file handle"
    assert same(spawned[0], item)


# The check of the audio


@pytest.fixture
def files(tmp_path: Path) -> Corpus:
    """A recording that is cut in half, and three that are whole; no two of one length."""
    names = ("cut", "a", "b", "c")
    for place, name in enumerate(names):
        write(tmp_path / f"{name}.flac", 1 + place / 10)
    cut = tmp_path / "cut.flac"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    return read(manifest(tmp_path, [{"audio": f"{name}.flac", "text": "low"} for name in names]))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are decoded, in order."""
    files: list[str] = []
    original = audio.soundfile.read
    monkeypatch.setattr(
        audio.soundfile, "read", lambda file, **how: files.append(Path(file).stem) or original(file, **how)
    )
    return files


def test_a_recording_that_is_checked_is_not_decoded_again(
    parakeet: Recognizer, files: Corpus, decoded: list[str]
) -> None:
    dataset = SpeechDataset(files, parakeet, cache=True)
    dataset.check_audio(Reporter(False), "audio")
    assert sorted(decoded) == ["a", "b", "c", "cut"]
    assert [problem.id for problem in dataset.corpus.problems] == ["cut"]
    assert "unreadable audio" in dataset.corpus.problems[0].reason
    items = [dataset[index] for index in range(3)]
    assert len(decoded) == 4
    fresh = SpeechDataset(dataset.corpus, parakeet)
    assert [utterance.id for utterance in fresh.corpus.utterances] == ["a", "b", "c"]
    assert all(same(item, fresh[index]) for index, item in enumerate(items))


@pytest.mark.parametrize("held", [None, 0, 1])
def test_the_check_names_what_does_not_decode_without_room_too(
    parakeet: Recognizer,
    files: Corpus,
    decoded: list[str],
    monkeypatch: pytest.MonkeyPatch,
    held: int | None,
) -> None:
    """held: the number of recordings whose features fit into the cache; None: there is no cache."""
    files = replace(files, utterances=files.utterances[::-1])  # the broken one is the last
    fresh = SpeechDataset(files, parakeet)
    monkeypatch.setattr(module, "CACHE_BYTES", (held or 0) * module._size(fresh._item(0)))
    dataset = SpeechDataset(files, parakeet, cache=held is not None)
    decoded.clear()
    dataset.check_audio(Reporter(False), "audio")
    assert [problem.id for problem in dataset.corpus.problems] == ["cut"]
    assert len(decoded) == 4
    assert all(same(dataset[index], fresh[index]) for index in range(3))
    again = 3 - (held or 0)
    assert len(decoded) == 4 + again + 3  # 3 of the other data set


# Recordings that are lost after loading


@pytest.mark.thinned(5)
@pytest.mark.parametrize("family", ["parakeet", "wav2vec2", "wav2vec2-bert", "whisper"])
@pytest.mark.parametrize("content", [None, b"", b"damaged"])
def test_a_lost_recording_is_silence_without_labels(
    folders: dict[str, Path],
    tmp_path: Path,
    family: str,
    content: bytes | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    recognizer = small_models.load(folders[family])
    path = write(tmp_path / "lost.wav")
    corpus = read(manifest(tmp_path, [{"audio": "lost.wav", "text": "low"}]))
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    dataset = SpeechDataset(Corpus([*corpus.utterances, utterance("good")]), recognizer)
    with caplog.at_level(logging.WARNING, logger="asr_finetune"):
        items = [dataset[0], dataset[0], dataset[1]]
    assert len(dataset) == 2, "sampling must not change"
    assert [problem.id for problem in dataset.problems] == ["lost"]
    assert ("removed" if content is None else "changed") in dataset.problems[0].reason
    assert "lost contributes nothing: " in caplog.text
    losses = recognizer.loss_per_example(recognizer.model, recognizer.collate(items[1:]))
    assert losses[0] == 0
    assert losses[1] > 0
    others = SpeechDataset(Corpus([utterance("good"), *corpus.utterances]), recognizer)
    empty = recognizer.empty_item()
    for item in (dataset[0], others[1]):  # none of another's sound stands in for it
        assert item.keys() - {"index"} == empty.keys()
        assert all(torch.equal(item[name], value) for name, value in empty.items())


def test_a_header_that_promised_more_than_there_is(parakeet: Recognizer) -> None:
    short = replace(utterance("cut", seconds=2.0), array=noise(0.005))
    dataset = SpeechDataset(Corpus([short]), parakeet)
    assert len(dataset[0]["labels"]) == 0
    assert "too few" in dataset.problems[0].reason


def test_training_counts_impossible_labels_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such an utterance is left out by name; where one slips through, it adds exactly nothing and is counted."""
    with tones.one_thread():
        path = tones.write_manifest(tmp_path, 8)
        tones.write_model(tmp_path / "model")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines[2]["text"] = "<pad>"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        changes: dict[str, Any] = {"method__kind": "head", "train__batch_size": 7, "train__steps": 2}
        changes |= {"privacy__epsilon": None, "privacy__noise_multiplier": 4.0}
        result = train(Config.from_dict(tones.settings(tmp_path, **changes)), progress=False)
        assert [entry["non_finite_losses"] for entry in result.history] == [0, 0]
        left_out = (tmp_path / "run" / "not_private" / "problems_train.tsv").read_text()
        assert left_out.startswith("u2 (tones.jsonl:3)\tthe blank as a label: '<pad>' in the transcript")
        capsys.readouterr()
        monkeypatch.setattr(CTCRecognizer, "text_problem", lambda self, utterance: None)
        changes |= {"train__batch_size": 8, "output": str(tmp_path / "second")}
        result = train(Config.from_dict(tones.settings(tmp_path, **changes)))
    assert [(entry["examples"], entry["non_finite_losses"]) for entry in result.history] == [(8, 1), (8, 1)]
    assert all(np.isfinite(entry["loss"]) for entry in result.history)
    assert "".join(capsys.readouterr()).count("1 of 8 losses are not finite (NOT PRIVATE)") == 1


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_training_goes_on_when_recordings_are_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    """The units, the sampling rate and ε are those of all the recordings that were loaded.

    cached: the check of the audio has cached every recording's features, so none is lost.
    """
    with tones.one_thread():
        tones.write_manifest(tmp_path, 8)
        tones.write_model(tmp_path / "model")
        original = Corpus.decoded

        def decode_and_lose(self: Corpus, *arguments: Any) -> Corpus:
            decoded = original(self, *arguments)
            for name in ("0", "3"):
                (tmp_path / "tones" / f"{name}.wav").unlink()
            return decoded

        monkeypatch.setattr(Corpus, "decoded", decode_and_lose)
        changes: dict[str, Any] = {"method__kind": "head", "train__batch_size": 8, "train__steps": 2}
        changes |= {"privacy__epsilon": None, "privacy__noise_multiplier": 4.0}
        changes["train__cache_features"] = cached
        config = Config.from_dict(tones.settings(tmp_path, **changes))
        result = train(config, progress=False)
    assert [entry["examples"] for entry in result.history] == [8, 8]
    assert all(np.isfinite(entry["loss"]) for entry in result.history)
    contents = read_ledger(tmp_path / "run" / "ledger.jsonl")
    assert contents.steps == 2
    values = json.loads((tmp_path / "run" / "run.json").read_text())
    assert values["privacy"]["dataset_size"] == 8
    assert values["privacy"]["sample_rate"] == 1.0
    later = tmp_path / "run" / "not_private" / "problems_train_later.tsv"
    if cached:
        assert not later.exists()
        return
    lost = later.read_text()
    assert [line.split("\t")[0] for line in lost.splitlines()] in (
        ["u0 (tones.jsonl:1)", "u3 (tones.jsonl:4)"],
        ["u3 (tones.jsonl:4)", "u0 (tones.jsonl:1)"],
    )
