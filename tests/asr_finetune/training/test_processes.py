"""`train` on several processes: one model, one ledger, one record; evaluations are shared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from asr_finetune.config.schema import Config
from asr_finetune.training.processes import of_all
from asr_finetune.training.run import train
from dpkernels.privacy import StepStats, epsilon, read_ledger
from tests.asr_finetune import tones
from tests.privacy.ranks.processes import Processes

ROOT = Path(__file__).parents[3]
UTTERANCES, BATCH, DELTA, SIGMA, STEPS = 24, 6, 1e-3, 4.0, 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tones.write_manifest(tmp_path, UTTERANCES)
    tones.write_manifest(tmp_path, 7, seed=1, name="test")
    with tones.one_thread():
        tones.write_model(tmp_path / "model")
    return tmp_path


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    values = {
        "method__kind": "head",
        "data__test": str(folder / "test.jsonl"),
        "privacy__epsilon": None,
        "privacy__delta": DELTA,
        "privacy__noise_multiplier": SIGMA,
        "train__batch_size": BATCH,
        "train__steps": STEPS,
        "train__checkpoint_every": 2,
        "train__optimizer": "adamw",
    }
    return tones.settings(folder, **{**values, **changes})


def trained(rank: int, group: Any, values: dict[str, Any]) -> dict[str, Any]:
    result = train(Config.from_dict(values), progress=False)
    return {"steps": result.steps, "epsilon": result.epsilon, "history": result.history}


@pytest.mark.slow  # two more interpreters import transformers
def test_two_processes_train_one_model_and_one_goes_on(folder: Path) -> None:
    values = settings(folder)
    with closing(Processes(folder, 2, wait=300.0)) as processes:
        first, second = processes.results(trained, 2, values)
    assert first == second
    assert first["epsilon"] == pytest.approx(epsilon(SIGMA, BATCH / UTTERANCES, STEPS, DELTA))
    output = Path(values["output"])
    assert read_ledger(output / "ledger.jsonl").steps == first["steps"] == STEPS
    assert [entry["step"] for entry in first["history"]] == list(range(1, STEPS + 1))
    record = json.loads((output / "run.json").read_text())
    # What both transcribed together is what one transcribes: before training, every run has this model.
    alone = settings(folder, output=str(folder / "alone"), train__steps=1)
    train(Config.from_dict(alone), progress=False)
    single = json.loads((folder / "alone" / "run.json").read_text())
    assert record["evaluation"]["before"] == single["evaluation"]["before"]
    # The record is gone, as after a crash before it: one process goes on from what two saved.
    (output / "run.json").unlink()
    assert train(Config.from_dict(values), progress=False).steps == STEPS
    assert (
        json.loads((output / "run.json").read_text())["evaluation"]["after"] == record["evaluation"]["after"]
    )


@pytest.mark.slow  # two interpreters start, and import transformers
def test_torchrun_trains_by_the_command(folder: Path) -> None:
    values = settings(folder)
    (folder / "run.yaml").write_text(Config.from_dict(values).to_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "asr_finetune", "train", "--config", str(folder / "run.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("written to") == 1
    assert read_ledger(Path(values["output"]) / "ledger.jsonl").steps == STEPS


def test_statistics_of_all_ranks() -> None:
    parts = [StepStats(3, 1 / 3, 2.0, 1), None, StepStats(1, 1.0, 5.0, 0), StepStats(0, 0.0, 0.0, 0)]
    assert of_all(parts) == StepStats(4, 0.5, 3.0, 1)
    assert of_all([None]) is None


@pytest.mark.slow  # two more interpreters import transformers
@pytest.mark.parametrize("family", ["parakeet", "whisper"])
def test_frozen_weights_are_in_parts(folder: Path, folders: dict[str, Path], family: str) -> None:
    changes = {"method__kind": "lora", "train__steps": 2, "model__name": str(folders[family])}
    values = settings(folder, model__shard=True, **changes)
    with closing(Processes(folder, 2, wait=300.0)) as processes:
        first, second = processes.results(trained, 2, values)
    assert first == second
    record = json.loads((Path(values["output"]) / "run.json").read_text())
    alone = settings(folder, output=str(folder / "alone"), **changes)
    train(Config.from_dict(alone), progress=False)
    single = json.loads((folder / "alone" / "run.json").read_text())
    assert record["model"] == single["model"]
    assert record["evaluation"]["before"] == single["evaluation"]["before"]
    assert (Path(values["output"]) / "adapter" / "adapter_model.safetensors").is_file()
