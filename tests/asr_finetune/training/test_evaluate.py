from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asr_finetune.config.schema import DataConfig, EvaluateConfig, ModelConfig
from asr_finetune.console import Reporter
from asr_finetune.data.sources import load_corpus
from asr_finetune.models.loading import load_recognizer, load_with_adapter
from asr_finetune.training.evaluate import bootstrap_interval, evaluate, normalise, score
from tests.asr_finetune import small_models, tones

BASIC = EvaluateConfig(bootstrap=200)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Don't  STOP, now! ", "dont stop now"),
        ("well-known — “quoted”", "well known quoted"),
        ("it’s $5", "its $5"),
        ("ﬁne", "fine"),
        ("", ""),
        ("...", ""),
    ],
)
def test_basic_normalisation(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_no_normalisation() -> None:
    assert normalise(" A, b ", "none") == "A, b"
    with pytest.raises(ValueError, match="'whisper'"):
        normalise("a", "whisper")


def test_english_normalisation_is_whispers() -> None:
    assert normalise("Twenty-one, um, don't!", "english") == normalise("21 do not", "english") == "21 do not"


def test_rates_are_pooled_over_utterances() -> None:
    # 1 substitution of 3 words, 2 insertions on an empty reference, 1 deletion of 1: 4 errors over 4 words.
    result = score([("a", "one two three", "one two tree"), ("b", "", "x y"), ("c", "four", "")], BASIC)
    assert result.wer == pytest.approx(4 / 4)
    assert (result.utterances, result.words) == (3, 4)
    # 1 + 3 + 4 character errors over 13 + 0 + 4 characters.
    assert result.cer == pytest.approx(8 / 17)
    assert result.hypotheses[0] == ("a", "one two three", "one two tree")


def test_perfect_and_normalised() -> None:
    result = score([("a", "One, TWO.", "one two")], BASIC)
    assert (result.wer, result.cer, result.wer_ci) == (0.0, 0.0, (0.0, 0.0))
    assert score([("a", "One", "one")], EvaluateConfig(bootstrap=0, normalize="none")).wer == 1.0


@pytest.mark.parametrize(
    ("entries", "message"), [([], "no utterances"), ([("a", "!", "x")], "every reference")]
)
def test_nothing_to_score(entries: list[tuple[str, str, str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(entries, BASIC)


def test_bootstrap_interval() -> None:
    generator = np.random.default_rng(1)
    errors = generator.binomial(10, 0.2, size=400)
    counts = np.stack([errors, np.full(400, 10)], axis=1)
    low, high = bootstrap_interval(counts, 2000)
    mean = errors.sum() / 4000
    # The standard error of a mean of 400 utterances, from their own spread.
    error = (errors / 10).std() / 20
    assert low == pytest.approx(mean - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.3 * error)
    assert bootstrap_interval(counts, 100) == bootstrap_interval(counts, 100)
    with_empty = np.array([[0, 0], [0, 0], [1, 2]])
    assert np.isfinite(bootstrap_interval(with_empty, 50)).all()


def test_to_dict_keeps_texts_back_unless_asked() -> None:
    result = score([("a", "secret", "words")], BASIC)
    assert "secret" not in str(result.to_dict())
    assert result.to_dict(hypotheses=True)["hypotheses"] == [["a", "secret", "words"]]
    assert "WER 100.0%" in str(result)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluate")
    tones.write_manifest(path, 7)
    tones.write_model(path / "model")
    return path


def test_evaluate_keeps_the_order_of_the_corpus(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recognizer = load_recognizer(ModelConfig(str(folder / "model"), device="cpu"))
    corpus = load_corpus(str(folder / "tones.jsonl"), data=DataConfig(train="-"))

    def transcribe(batch: dict[str, Any], restrict_to: list[str] | None = None) -> list[str]:
        return [corpus.utterances[int(index)].text for index in batch["index"]]

    monkeypatch.setattr(recognizer, "transcribe", transcribe)
    result = evaluate(recognizer, corpus, EvaluateConfig(batch_size=3, bootstrap=10))
    assert result.wer == 0.0  # wrong if batches of like lengths were put back in another order
    assert [entry[0] for entry in result.hypotheses] == [utterance.id for utterance in corpus.utterances]


def test_decoding_may_be_held_to_texts(folder: Path) -> None:
    recognizer = load_recognizer(ModelConfig(str(folder / "model"), device="cpu"))
    corpus = load_corpus(str(folder / "tones.jsonl"), data=DataConfig(train="-"))
    texts = ["low", "high high"]
    result = evaluate(recognizer, corpus, EvaluateConfig(bootstrap=0, restrict_to=texts))
    assert {hypothesis for _, _, hypothesis in result.hypotheses} <= set(texts)
    assert not recognizer.model.training


@pytest.mark.parametrize("family", small_models.EQUAL_LENGTHS_ONLY)
def test_a_model_that_padding_changes_is_evaluated_one_by_one_and_says_so(
    folder: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str], family: str
) -> None:
    recognizer = small_models.load(folders[family])
    corpus = load_corpus(str(folder / "tones.jsonl"), data=DataConfig(train="-"))
    result = evaluate(recognizer, corpus, EvaluateConfig(bootstrap=0), reporter=Reporter(), name="test")
    said = " ".join(capsys.readouterr().out.split())
    assert f"test: one utterance at a time, since {recognizer.equal_lengths_only}" in said
    one = evaluate(recognizer, corpus, EvaluateConfig(batch_size=1, bootstrap=0), reporter=Reporter())
    assert one == result
    assert "one utterance at a time" not in capsys.readouterr().out


def test_an_adapter_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        load_with_adapter(ModelConfig("m"), tmp_path)
