"""The calculated step: its parts by hand, one GPU as it was measured, and that it is never taken for a measurement."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.harness.results import FOLDER
from bench.reports import report, scaling
from bench.scaling import modelled
from bench.scaling.modelled import Links, OneGpu, one_gpu, step, uneven_parts
from bench.scaling.traffic import Plan, plan

SAVED = json.loads((FOLDER / scaling.CALCULATED).read_text(encoding="utf-8"))
ONE = OneGpu(rate=100.0, update=0.02, an_entry=1e-11, copy=1e12)
MOVES = Plan(entries=10**9, processes=8, pieces=1000, rounds=10, padded=2 * 10**9, copies=1000)


def test_each_part_by_hand() -> None:
    parts = step(ONE, MOVES, Links("", nvlink=100e9, reached=0.5), batch=1600, uneven=1.1)
    assert parts.backward == 1600 / 8 / 100
    assert parts.uneven == pytest.approx(0.2)
    # 8 and 4 bytes of two billion, 7 of 8 parts, at half of 100 GB/s; a ring of eight, twenty times
    assert parts.links == pytest.approx(12 * 2e9 * 7 / 8 / 50e9 + 20 * (8.4e-6 + 8 * 3.4e-6))
    assert parts.copies == pytest.approx((16e9 + 24e9 + 3e9 + 8e9) / 1e12)
    assert parts.launches == pytest.approx(5e-6 * 3040)
    assert parts.meetings == pytest.approx(50e-6 * (7 + 6))
    assert parts.update == pytest.approx(0.02 - 0.01 + 0.01 / 8)
    assert parts.seconds == pytest.approx(sum(vars(parts).values()))


def test_a_network_is_used_between_nodes_only() -> None:
    links = Links("", nvlink=450e9, network=50e9, reached=1.0)
    assert links.bus(8) == 450e9
    assert links.bus(9) == 50e9


@pytest.mark.parametrize("recipe", ["parakeet_lora", "parakeet_full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_gpu_takes_the_hours_that_were_measured(recipe: str, dtype: str) -> None:
    measured = json.loads((modelled.MEASURED / "recipes.json").read_text(encoding="utf-8"))["rows"]
    (row,) = [row for row in measured if (row["recipe"], row["dtype"]) == (recipe, dtype)]
    one, origin = one_gpu(recipe, dtype)
    alone = step(one, plan([torch.empty(3)], 1), modelled.LINKS[0], batch=row["batch_size"], uneven=1.0)
    assert alone.seconds * row["steps"] / 3600 == pytest.approx(row["hours"], rel=5e-3)
    assert origin == "measured on one H100"


def test_what_was_not_measured_says_so() -> None:
    _, origin = one_gpu("wav2vec2_bert_lora", "float32")
    assert origin.startswith("by FLOPs from parakeet_lora")
    assert SAVED["calculated"].startswith("NOT MEASURED")
    text = scaling.calculated(SAVED)
    assert text.startswith("**Calculated, NOT measured")
    assert "No run of more than one GPU has been made" in text
    page = report.DISTRIBUTED.read_text(encoding="utf-8")
    assert page.count(f"{scaling.PLOT}.png") == text.count(f"{scaling.PLOT}.png") == 1
    svg = (FOLDER / "plots" / f"{scaling.PLOT}.svg").read_text(encoding="utf-8")
    assert "Calculated, not measured" in svg


def test_parts_of_many_examples_are_nearly_equal() -> None:
    assert uneven_parts(64, 1) == 1.0
    assert 1.0 < uneven_parts(256, 8) < 1.01
    assert uneven_parts(16, 8) > uneven_parts(256, 8)


@pytest.mark.slow
def test_the_plot_is_drawn_the_same_twice(tmp_path: Path) -> None:
    for name in ("a", "b"):
        target = tmp_path / name / scaling.CALCULATED
        target.parent.mkdir(parents=True)
        target.write_text(json.dumps(SAVED))
    first, second = (scaling.draw(tmp_path / name) for name in ("a", "b"))
    assert [path.name for path in first] == [f"{scaling.PLOT}.svg", f"{scaling.PLOT}.png"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert scaling.draw(tmp_path / "nothing") == []


@pytest.mark.slow
@pytest.mark.parametrize("recipe", modelled.RECIPES)
def test_the_saved_rows_are_what_is_calculated(recipe: str) -> None:
    saved = [row for row in SAVED["rows"] if row["recipe"] == recipe]
    assert modelled.rows_of(recipe) == saved
