"""`python -m bench.asr.peaks`, on the CPU: a rehearsal predicts the live bytes of the same steps with real tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.asr import peaks

FEW = ["--device", "cpu", "--frames", "32", "--sizes", "2", "3"]


@pytest.mark.slow  # tests/asr_finetune/planning/test_memory_plan.py compares more of them
@pytest.mark.parametrize("case", ["tiny-lora", "tiny-full"])
def test_predictions_and_measurements_agree(case: str, tmp_path: Path) -> None:
    output = tmp_path / "peaks.json"
    peaks.main([*FEW, "--case", case, "--dtype", "float32", "--output", str(output)])
    found = json.loads(output.read_text())
    assert {row["strategy"] for row in found["rows"]} == {"bookkeeping", "mixed"}
    assert [row["shape"] for row in found["rows"]] == 2 * [{"B": 2, "T": 32}, {"B": 3, "T": 32}]
    for row in found["rows"]:
        assert abs(row["error"]) < 0.02, row
        assert sum(row["parts"].values()) == row["predicted"]


@pytest.mark.slow
def test_predictions_need_no_device_and_are_read_back(tmp_path: Path) -> None:
    ahead, output = tmp_path / "ahead.json", tmp_path / "peaks.json"
    arguments = [*FEW, "--case", "tiny-lora", "--strategies", "bookkeeping"]
    peaks.main([*arguments, "--predict-only", "--output", str(ahead)])
    predicted = json.loads(ahead.read_text())["rows"]
    assert [row["parts"]["workspace"] > 0 for row in predicted] == [True, True]  # CUDA's
    assert not any("measured" in row for row in predicted)
    peaks.main([*arguments, "--predicted", str(ahead), "--output", str(output)])
    again = json.loads(output.read_text())["rows"]
    assert [row["predicted"] for row in again] == [row["predicted"] for row in predicted]
    assert all(row["measured"] > 0 for row in again)
