"""bench.asr.recipes on small models of the recipes' own classes, on the CPU: every part runs, and adds up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from bench.asr import recipes
from tests.asr_finetune import tones


def small(name: str) -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    if "parakeet" in name:
        encoder = {**sizes, "subsampling_conv_channels": 4, "num_mel_bins": 80}
        config = transformers.ParakeetCTCConfig(vocab_size=40, pad_token_id=0, encoder_config=encoder)
        config._attn_implementation = "sdpa"
        return transformers.ParakeetForCTC(config)
    bert = transformers.Wav2Vec2BertConfig(
        vocab_size=40, pad_token_id=0, conv_depthwise_kernel_size=5, **sizes
    )
    return transformers.Wav2Vec2BertForCTC(bert)


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(recipes, "full_size", small)
    monkeypatch.setattr(recipes, "UTTERANCES", 200)
    monkeypatch.setattr(recipes, "LONGEST", 2.0)
    monkeypatch.setattr(recipes, "librispeech_like_seconds", lambda count: np.linspace(1.0, 2.0, count))
    with tones.one_thread():
        yield


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param("parakeet_lora", "bfloat16", marks=pytest.mark.slow),
        pytest.param("parakeet_full", "float32", marks=pytest.mark.slow),
        pytest.param("wav2vec2_bert_bitfit", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_a_recipe_is_predicted_and_then_run(tmp_path: Path, name: str, dtype: str) -> None:
    chosen = ["--recipes", name, "--dtypes", dtype]
    predicted, measured = tmp_path / "predicted.json", tmp_path / "measured.json"
    recipes.main([*chosen, "--predict-only", "--output", str(predicted)])
    told = json.loads(predicted.read_text())["rows"][0]
    assert "rate" not in told
    run = ["--device", "cpu", "--batch", "12", "--predicted", str(predicted), "--output", str(measured)]
    recipes.main([*chosen, *run])
    (row,) = json.loads(measured.read_text())["rows"]
    assert row.items() >= told.items()
    assert row["self_check_error"] < 2e-3
    spent = row["batch_size"] / row["rate"] + row["step_seconds"]
    assert row["hours"] == pytest.approx(row["steps"] * spent / 3600, rel=0.05, abs=0.01)
    assert row["micro_batches"] * row["largest"] >= row["examples"] > 0


def test_noise_is_as_long_as_it_says() -> None:
    data = recipes.Noise("wav2vec2-bert", np.array([2.0, 0.001]))
    assert [tuple(data[i]["input_features"].shape) for i in range(2)] == [(100, 160), (2, 160)]
    assert [len(data[i]["labels"]) for i in range(2)] == [30, 1]
