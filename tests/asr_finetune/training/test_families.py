"""Every family of recognisers from the dry run to an evaluation of what three private steps made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from asr_finetune import cli
from asr_finetune.config.schema import Config
from asr_finetune.planning.dry_run import check_run
from asr_finetune.training.run import train
from tests.asr_finetune import families, tones
from tests.asr_finetune.families import EQUAL_LENGTHS_ONLY, method_of


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    tones.write_manifest(folder, 12)
    tones.write_manifest(folder, 4, seed=1, name="test")
    return folder


def configured(recordings: Path, family: str, model: Path, output: Path) -> Config:
    size = 1 if family in EQUAL_LENGTHS_ONLY else 4
    values = {
        "model__name": str(model),
        "data__test": str(recordings / "test.jsonl"),
        "method__kind": method_of(family),
        "method__rank": 2,
        "privacy__noise_multiplier": 4.0,  # else the noise is calibrated, which takes seconds
        "train__steps": 3,
        "train__batch_size": 4,
        "train__physical_batch_size": size,
        "output": str(output),
    }
    return Config.from_dict(tones.settings(recordings, **values))


@pytest.mark.slow
@pytest.mark.parametrize("family", families.FAMILIES)
def test_from_the_dry_run_to_an_evaluation(
    folders: dict[str, Path], recordings: Path, tmp_path: Path, family: str
) -> None:
    """What a user types, one after the other; `test_families.py` of models loads the result in plain transformers."""
    config = configured(recordings, family, folders[family], tmp_path / "run")
    checks = check_run(config, progress=False)
    assert [check for check in checks if not check.passed] == []
    with tones.one_thread():
        result = train(config, progress=False)
    assert result.steps == 3
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["privacy"]["epsilon"] > 0
    kept = tmp_path / "run" / ("adapter" if method_of(family) == "lora" else "model")
    out = tmp_path / "evaluation.json"
    flags: list[Any] = ["--model", kept, "--data", recordings / "test.jsonl", "--out", out, "--device", "cpu"]
    done = CliRunner().invoke(cli.app, ["evaluate", *map(str, flags)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert json.loads(out.read_text())["wer"] == record["evaluation"]["after"]["wer"]
