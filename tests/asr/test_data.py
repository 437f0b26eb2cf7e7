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

from asr_finetune import data
from asr_finetune.augment import SpecAugment
from asr_finetune.config import Config, ConfigError, MethodConfig
from asr_finetune.data import Corpus, Problem, SpeechDataset, Utterance, prepare_text
from asr_finetune.methods import apply_method
from asr_finetune.models import Recognizer
from asr_finetune.prepare import load as load_for
from asr_finetune.progress import Reporter
from asr_finetune.train import train
from dpkernels.privacy import read_ledger
from tests.asr import small_models, tones
from tests.asr.recordings import RATE, manifest, noise, options, read, reasons, write


def utterance(name: str, text: str = "low", seconds: float = 0.5, **values: Any) -> Utterance:
    return Utterance(name, None, noise(seconds, seed=len(name)), RATE, text, None, seconds, **values)


@pytest.fixture(scope="module")
def parakeet(folders: dict[str, Path]) -> Recognizer:
    return small_models.load(folders["parakeet"])


# Transcripts and corpora


@pytest.mark.parametrize(
    ("text", "values", "expected"),
    [
        ("  One \t two\n", {}, "One two"),
        ("One", {"text_case": "lower"}, "one"),
        ("Straße", {"text_case": "upper"}, "STRASSE"),
        ("well-known, it's “so”!", {"strip_punctuation": True}, "well known it's so"),
        ("...", {"strip_punctuation": True}, ""),
        ("a, b", {}, "a, b"),
    ],
)
def test_transcripts(text: str, values: dict[str, Any], expected: str) -> None:
    assert prepare_text(text, options(**values)) == expected


def test_repeated_recordings_are_noted_and_kept(tmp_path: Path) -> None:
    """Whether one is there may not change what becomes of another."""
    write(tmp_path / "a.wav")
    line = {"audio": "a.wav", "text": "x", "utt_id": "same"}
    corpus = read(manifest(tmp_path, [line, line, {**line, "utt_id": "other"}]))
    assert len(corpus) == 3
    ids, files = corpus.notes
    assert "1 ids appear more than once" in ids
    assert "1 audio files appear more than once" in files
    assert "weaker than stated" in corpus.summary()
    assert "appear" not in read(manifest(tmp_path, [line])).summary()


def test_the_summary_groups_what_was_left_out_by_kind() -> None:
    """Names of options, files and words in the reasons are neither grouped by nor mangled."""
    problems = [
        *(Problem(str(n), f"too short: 0.0{n} s, below data.min_seconds=0.05") for n in (1, 2)),
        Problem("x", "no such file: /a/b c.wav"),
        *(
            Problem(word, f"not in the vocabulary: '{word}'; see data.text_case")
            for word in ("A", "B.C", "D's")
        ),
    ]
    corpus = Corpus([utterance("a", seconds=90.0)], problems, "src")
    assert corpus.summary() == (
        "1 utterances, 1.5 min, speakers unknown\n"
        "6 left out: 3 × not in the vocabulary; 2 × too short; 1 × no such file"
    )
    assert corpus.hours == 90 / 3600


def test_reasons_begin_with_their_kind(parakeet: Recognizer, folders: dict[str, Path]) -> None:
    whisper = small_models.load(folders["whisper"])
    found = [
        parakeet.audio_problem(utterance("a", seconds=0.01)),
        parakeet.text_problem(utterance("a", "low WARP")),
        parakeet.text_problem(utterance("a", " ".join(["low"] * 30))),
        whisper.audio_problem(utterance("a", seconds=1.5)),
        whisper.text_problem(utterance("a", "low " * 30)),
    ]
    assert [Problem("a", reason or "").kind for reason in found] == [
        "too short for the model",
        "not in the vocabulary",
        "no CTC alignment",
        "longer than the encoder's window",
        "too many tokens",
    ]


# What a recogniser cannot take


def test_what_the_recognizer_cannot_take_is_left_out_by_name(parakeet: Recognizer) -> None:
    corpus = Corpus(
        [
            utterance("good"),
            utterance("brief", seconds=0.01),
            utterance("unknown", "low WARP"),
            utterance("crowded", " ".join(["low"] * 30)),
        ],
        [Problem("before", "no such file")],
    )
    fitted = corpus.fit(parakeet)
    assert [item.id for item in fitted.utterances] == ["good"]
    found = reasons(fitted)
    assert list(found) == ["before", "brief", "unknown", "crowded"]
    assert "too short" in found["brief"]
    assert "not in the vocabulary: 'WARP'" in found["unknown"]
    assert "no CTC alignment" in found["crowded"]
    # A test set keeps the transcripts that cannot be learnt: they are errors of the recogniser.
    tested = corpus.fit(parakeet, training=False)
    assert [item.id for item in tested.utterances] == ["good", "unknown", "crowded"]


def test_whisper_leaves_out_what_its_window_does_not_hold(folders: dict[str, Path]) -> None:
    recognizer = small_models.load(folders["whisper"])
    fitted = Corpus([utterance("fits", seconds=1.0), utterance("long", seconds=1.01)]).fit(recognizer)
    assert [item.id for item in fitted.utterances] == ["fits"]
    assert "raise model.window_seconds" in reasons(fitted)["long"]


def test_nothing_left_is_refused_with_names(parakeet: Recognizer) -> None:
    with pytest.raises(ConfigError, match=r"all 1 recordings were left out(.|\n)*unknown: not in the vocab"):
        Corpus([utterance("unknown", "WARP")], source="here").fit(parakeet)


def test_what_does_not_decode_is_found_by_reading_it(tmp_path: Path) -> None:
    for name in ("good", "cut"):
        write(tmp_path / f"{name}.flac", 2.0)
    cut = tmp_path / "cut.flac"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    lines = [{"audio": f"{name}.flac", "text": "low"} for name in ("good", "cut")]
    corpus = read(manifest(tmp_path, lines))
    assert len(corpus) == 2  # the header says nothing
    decoded = corpus.decoded(Reporter(False), "audio")
    assert [item.id for item in decoded.utterances] == ["good"]
    assert "unreadable audio" in reasons(decoded)["cut"]


def test_loading_says_what_was_left_out(
    tmp_path: Path, parakeet: Recognizer, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a.wav")
    lines = [{"audio": "a.wav", "text": "low", "utt_id": "good"}]
    lines += [{"audio": "lost.wav", "text": "low", "utt_id": f"lost{index}"} for index in range(12)]
    load_for(str(manifest(tmp_path, lines)), None, options(), Reporter(True), "train", parakeet)
    said = " ".join(capsys.readouterr().out.split())
    assert "train: 1 utterances" in said
    assert "12 left out: 12 × no such file" in said
    assert "left out lost0 (all.jsonl:2): no such file" in said
    assert "lost9" in said
    assert "lost10" not in said
    assert "and 2 more" in said


# Items


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
    original = data.read_audio
    monkeypatch.setattr(data, "read_audio", lambda item, rate: made.append(item.id) or original(item, rate))
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
    monkeypatch.setattr(data, "CACHE_BYTES", size)
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
    assert same(pickle.loads(pickle.dumps(dataset))[0], dataset[0])


# Recordings that are lost after loading


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
    assert "unreadable" in dataset.problems[0].reason
    assert "lost contributes nothing: " in caplog.text
    losses = recognizer.loss_per_example(recognizer.model, recognizer.collate(items[1:]))
    assert losses[0] == 0
    assert losses[1] > 0


def test_a_header_that_promised_more_than_there_is(parakeet: Recognizer) -> None:
    short = replace(utterance("cut", seconds=2.0), array=noise(0.005))
    dataset = SpeechDataset(Corpus([short]), parakeet)
    assert len(dataset[0]["labels"]) == 0
    assert "too few" in dataset.problems[0].reason


def test_training_goes_on_when_recordings_are_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The units, the sampling rate and ε are those of all the recordings that were loaded."""
    with tones.one_thread():
        tones.write_manifest(tmp_path, 8)
        tones.write_model(tmp_path / "model")
        original = Corpus.decoded

        def decode_and_lose(self: Corpus, reporter: Reporter, name: str) -> Corpus:
            decoded = original(self, reporter, name)
            for name in ("0", "3"):
                (tmp_path / "tones" / f"{name}.wav").unlink()
            return decoded

        monkeypatch.setattr(Corpus, "decoded", decode_and_lose)
        changes: dict[str, Any] = {"method__kind": "head", "train__batch_size": 8, "train__steps": 2}
        changes |= {"privacy__epsilon": None, "privacy__noise_multiplier": 4.0}
        config = Config.from_dict(tones.settings(tmp_path, **changes))
        result = train(config, progress=False)
    assert [entry["examples"] for entry in result.history] == [8, 8]
    assert all(np.isfinite(entry["loss"]) for entry in result.history)
    contents = read_ledger(tmp_path / "run" / "ledger.jsonl")
    assert contents.steps == 2
    values = json.loads((tmp_path / "run" / "run.json").read_text())
    assert values["privacy"]["dataset_size"] == 8
    assert values["privacy"]["sample_rate"] == 1.0
    lost = (tmp_path / "run" / "not_private" / "problems_train_later.tsv").read_text()
    assert [line.split("\t")[0] for line in lost.splitlines()] in (
        ["u0 (tones.jsonl:1)", "u3 (tones.jsonl:4)"],
        ["u3 (tones.jsonl:4)", "u0 (tones.jsonl:1)"],
    )
