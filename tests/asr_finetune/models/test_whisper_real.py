"""A real checkpoint on real recordings; neither is part of the project. Skipped, saying why, where absent.

DPKERNELS_TEST_WHISPER   a folder with openai/whisper-tiny.en in Hugging Face format
DPKERNELS_TEST_SPEECH    a folder with manifest.jsonl over LibriSpeech and FSDD recordings; by default
                         shared/speech beside the checkout
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from asr_finetune.config.schema import Config, DataConfig, EvaluateConfig, ModelConfig
from asr_finetune.data.sources import load_corpus
from asr_finetune.models.loading import load_recognizer
from asr_finetune.training.evaluate import evaluate
from asr_finetune.training.run import train
from dpkernels.privacy import epsilon
from tests.asr_finetune import tones

BESIDE = Path(__file__).parents[3].parent / "shared" / "speech"
UTTERANCES = 6


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with tones.one_thread():
        yield


@pytest.fixture(scope="module")
def manifest() -> str:
    path = Path(os.environ.get("DPKERNELS_TEST_SPEECH", BESIDE)) / "manifest.jsonl"
    if not path.is_file():
        pytest.skip(f"no recordings: there is no {path}; set DPKERNELS_TEST_SPEECH")
    return str(path)


@pytest.fixture(scope="module")
def whisper() -> str:
    folder = os.environ.get("DPKERNELS_TEST_WHISPER")
    if folder is None:
        pytest.skip("no checkpoint: DPKERNELS_TEST_WHISPER is not set")
    if not (Path(folder) / "config.json").is_file():
        pytest.skip(f"no checkpoint: there is no config.json in DPKERNELS_TEST_WHISPER={folder}")
    return folder


def test_whisper_tiny_transcribes_librispeech(whisper: str, manifest: str) -> None:
    corpus = load_corpus(manifest, split="test", data=DataConfig(train=manifest, corpus="librispeech"))
    longest = sorted(corpus.utterances, key=lambda utterance: utterance.seconds)[-UTTERANCES:]
    recognizer = load_recognizer(ModelConfig(whisper, device="cpu"))
    result = evaluate(recognizer, replace(corpus, utterances=longest), EvaluateConfig(bootstrap=0))
    assert result.words > 50
    assert result.wer < 0.10, result.hypotheses


def test_two_private_lora_steps_on_spoken_digits(
    whisper: str, manifest: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {
        "model": {"name": whisper, "window_seconds": 1.0, "device": "cpu"},
        "data": {
            "train": manifest,
            "train_split": "test",
            "corpus": "fsdd",
            "text_case": "lower",
            "max_seconds": 1.0,
        },
        "method": {"kind": "lora", "targets": ["q_proj", "v_proj"], "layers": "decoder"},
        "privacy": {"noise_multiplier": 1.0, "delta": 1e-3},
        "train": {"batch_size": 16, "physical_batch_size": 8, "steps": 2},
        "output": str(tmp_path / "run"),
    }
    result = train(Config.from_dict(values))
    assert "self-check passed" in capsys.readouterr().out
    assert result.steps == 2
    units = len(load_corpus(manifest, split="test", data=Config.from_dict(values).data))
    assert result.epsilon == pytest.approx(epsilon(1.0, 16 / units, 2, 1e-3), rel=1e-9)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").stat().st_size > 4 * 98304
