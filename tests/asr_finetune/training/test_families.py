"""Every family of recognisers from its dry run to plain transformers: three private steps, an evaluation, an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from asr_finetune.config.schema import Config
from asr_finetune.models.loading import CTCRecognizer, load_recognizer
from asr_finetune.planning.dry_run import check_run
from asr_finetune.training.run import train
from asr_finetune.training.setup import load
from asr_finetune.training.evaluate import evaluate
from tests.asr_finetune import families, small_models, tones

EQUAL_LENGTHS_ONLY = ("hubert-group", "data2vec-audio", "sew", "sew-d")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    tones.write_manifest(folder, 12)
    tones.write_manifest(folder, 4, seed=1, name="test")
    return folder


def configured(recordings: Path, model: Path, output: Path, **changes: Any) -> Config:
    values = {
        "model__name": str(model),
        "data__test": str(recordings / "test.jsonl"),
        "method__kind": "lora",
        "method__rank": 2,
        "privacy__noise_multiplier": 4.0,
        "train__steps": 3,
        "train__batch_size": 4,
        "train__physical_batch_size": 4,
        "output": str(output),
    }
    return Config.from_dict(tones.settings(recordings, **{**values, **changes}))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_from_the_dry_run_to_plain_transformers(
    folders: dict[str, Path], recordings: Path, tmp_path: Path, family: str
) -> None:
    base = folders[family]
    single = family in EQUAL_LENGTHS_ONLY
    config = configured(recordings, base, tmp_path / "run", **({"train__physical_batch_size": 1} if single else {}))
    checks = check_run(config)
    assert [check for check in checks if not check.passed] == []
    result = train(config, progress=False)
    assert result.steps == 3
    own = load_recognizer(Config.from_dict({"model": {"name": str(tmp_path / "run" / "adapter"), "device": "cpu"}, "data": {"train": "x"}, "output": "x"}).model)
