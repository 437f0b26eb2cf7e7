"""A multilingual Whisper is prompted, decoded, saved and reported in the language and for the task it is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from asr_finetune.config.schema import ConfigError, ModelConfig
from asr_finetune.models.loading import load_with_adapter
from asr_finetune.models.whisper import WhisperRecognizer, language_code
from asr_finetune.report.report import write_report
from tests.asr_finetune import small_models
from tests.asr_finetune.models.test_methods import prepared
from tests.asr_finetune.report import report_run


def load(folder: Path, **options: Any) -> WhisperRecognizer:
    recognizer = small_models.load(folder, **options)
    assert isinstance(recognizer, WhisperRecognizer)
    return recognizer


def prompted(recognizer: WhisperRecognizer) -> list[str]:
    return recognizer.tokenizer.convert_ids_to_tokens(recognizer.prompt)[1:-1]


@pytest.mark.parametrize("language", ["de", "DE", "German", "<|de|>", " german "])
def test_a_language_by_code_name_or_token(folders: dict[str, Path], language: str) -> None:
    assert language_code(language) == "de"
    recognizer = load(folders["multilingual"], language=language, task="translate")
    assert prompted(recognizer) == ["<|de|>", "<|translate|>"]
    facts = recognizer.describe()
    assert (facts["language"], facts["task"]) == ("de", "translate")


def test_the_language_reaches_losses_scores_and_decoding(folders: dict[str, Path]) -> None:
    english, german = load(folders["multilingual"]), load(folders["multilingual"], language="de")
    batch = english.collate(small_models.items(english))
    losses = [r.loss_per_example(r.model, batch) for r in (english, german)]
    assert not torch.isclose(*losses, rtol=1e-4).any()
    assert not torch.isclose(*(r._scores(batch, ["low"]) for r in (english, german)), rtol=1e-4).any()
    seen: list[torch.Tensor] = []
    german.base.model.decoder.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(inputs["input_ids"]), with_kwargs=True
    )
    german.transcribe(batch)
    assert seen[0].tolist() == [german.prompt] * 3


def test_the_checkpoints_own_language_comes_before_english(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["multilingual"], tmp_path / "german")
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"language": "german", "task": "translate"}))
    assert prompted(load(folders["multilingual"])) == ["<|en|>", "<|transcribe|>"]
    assert prompted(load(folder)) == ["<|de|>", "<|translate|>"]
    assert prompted(load(folder, language="en", task="transcribe")) == ["<|en|>", "<|transcribe|>"]


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("multilingual", {"language": "fr"}, r"model\.language='fr': .* knows <\|de\|>, <\|en\|>"),
        ("whisper", {"language": "de"}, r"model\.language='de', .* is English-only"),
        ("whisper", {"task": "translate"}, r"model\.task='translate': .* is English-only"),
        ("parakeet", {"language": "en"}, r"model\.language=en, model\.task=None: they are for Whisper"),
        ("parakeet", {"task": "transcribe"}, r"model\.task=transcribe: they are for Whisper"),
    ],
)
def test_what_the_checkpoint_does_not_know_is_refused(
    folders: dict[str, Path], family: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        small_models.load(folders[family], **options)


def test_an_english_only_model_may_be_told_what_it_does(folders: dict[str, Path]) -> None:
    told = load(folders["whisper"], language="English", task="transcribe")
    assert told.prompt == load(folders["whisper"]).prompt
    assert (told.language, told.task) == (None, None)


def test_adapters_and_models_keep_their_language(folders: dict[str, Path], tmp_path: Path) -> None:
    base = folders["multilingual"]
    adapted = prepared(base, "lora", language="de", task="translate")
    adapted.save(tmp_path / "adapter")
    loaded = load_with_adapter(ModelConfig(str(base), device="cpu"), tmp_path / "adapter")
    whole = load(base, language="de", task="translate")
    whole.save(tmp_path / "model")
    for again in (loaded, load(tmp_path / "adapter"), load(tmp_path / "model")):
        assert isinstance(again, WhisperRecognizer)
        assert prompted(again) == ["<|de|>", "<|translate|>"]
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert (generation["language"], generation["task"]) == (
        "de",
        "translate",
    )  # what plain transformers reads
    assert prompted(load(tmp_path / "adapter", language="en")) == ["<|en|>", "<|translate|>"]


@pytest.mark.slow
@pytest.mark.parametrize("language", ["de", None])
def test_the_report_says_it(language: str | None, tmp_path: Path) -> None:
    run = report_run.record()
    run["model"] |= {"language": language, "task": language and "translate"}
    folder = report_run.write_run(tmp_path / "run", run)
    page = write_report(folder, tmp_path / "report.html").read_text()
    assert ("; language de, task translate)" in page) == (language is not None)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"lang_to_id": {"<|en|>": 0, "<|de|>": 9}}, {"language": "de"}, r"'de': .* knows $"),
        ({"task_to_id": {"translate": 99}}, {"task": "translate"}, r"'translate': .* knows $"),
        ({"lang_to_id": None}, {"language": "de"}, r"'de': .* knows $"),
    ],
)
def test_a_token_that_the_checkpoint_lacks_is_refused(
    folders: dict[str, Path], tmp_path: Path, change: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    """A generation configuration may list what the tokenizer, or the output layer, does not have."""
    folder = shutil.copytree(folders["multilingual"], tmp_path / "changed")
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        load(folder, **options)
