"""PrivateTrainer under torchrun: two processes over gloo take the steps of the engine's own loop on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from dpkernels.privacy import read_ledger
from tests.interop.trainers import case, engine_loop

ROOT = Path(__file__).resolve().parents[2]


def torchrun(folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.interop.trainer_script", str(folder), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr[-4000:]


@pytest.mark.slow  # two interpreters start, and import transformers, twice
def test_torchrun_takes_the_same_steps_and_goes_on(tmp_path: Path) -> None:
    torchrun(tmp_path, "4")
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert (facts["batch"], facts["steps"]) == (8, 4)
    expected = engine_loop(case("sequence"))[-1]
    found = torch.load(tmp_path / "weights.pt", weights_only=True)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
    assert read_ledger(tmp_path / "ledger.jsonl").steps == 4
    losses = [entry["loss_NOT_PRIVATE"] for entry in facts["log"] if "loss_NOT_PRIVATE" in entry]
    assert len(losses) == 4
    assert all(0.1 < loss < 5 for loss in losses)
    torchrun(tmp_path, "6", "resume")
    assert json.loads((tmp_path / "facts.json").read_text())["steps"] == 6
    assert read_ledger(tmp_path / "ledger.jsonl").steps == 6
