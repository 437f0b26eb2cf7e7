"""bench.asr.strategies, on the smallest step, and its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.asr import strategies
from bench.reports import kernel as kernel_report


@pytest.mark.slow
def test_each_way_is_timed_and_recomputing_holds_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strategies, "STRATEGIES", ("mixed",))
    path = tmp_path / "new" / "strategies.json"
    options = "--cases parakeet-lora --size 2 --frames 16 --rounds 1 --output"
    strategies.main([*options.split(), str(path)])
    saved = json.loads(path.read_text())
    kept, again = saved["rows"]
    assert (kept["checkpointing"], again["checkpointing"]) == (False, True)
    assert kept["cpu_seconds"] > 0
    assert again["peak"] < kept["peak"]
    text = kernel_report.strategies(saved)
    memory = f"{kept['peak'] / 2**20:.0f} | {again['peak'] / 2**20:.0f} |"
    assert "B = 2, T = 16 | `mixed` | " in text
    assert memory in text
