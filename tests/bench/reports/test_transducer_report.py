"""The transducer's table, plot and targets, from a results file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.cases.transducer import COMPOSED, FLOOR, OURS, TORCHAUDIO
from bench.harness.results import Results, Row, compare_rows
from bench.reports import transducer

ABOUT: dict[str, Any] = {
    "slug": "a-cpu-2-threads",
    "device": "A CPU",
    "threads": 2,
    "load": 0.1,
    "versions": {"torch": "2.13.0"},
    "commit": "abc1234",
    "dirty": False,
    "date": "2026-11-30T00:00:00+00:00",
}


def results(axis: str | None = None) -> Results:
    """Of ours 10 s, of products 8 s, of torchaudio 9 s and 4,000 MiB: at B = 8, or at two points over V."""
    places = [({"B": 8, "T": 188, "U": 50, "H": 640, "V": 8198}, None)]
    if axis is not None:
        places = [({"B": 1, "T": 94, "U": 25, "H": 640, "V": v}, axis) for v in (1026, 8198)]
    figures = {OURS: (10.0, 300.0), COMPOSED: (30.0, 400.0), TORCHAUDIO: (9.0, 4000.0), FLOOR: (8.0, None)}
    rows = []
    for shape, axis in places:
        for name, (seconds, mib) in figures.items():
            row = Row("rnnt", "RNN-T loss and gradient", shape, name, axis, peak_mib=mib)
            row.median_ms, row.iqr_ms, row.rounds = 1e3 * seconds, 20.0, 3
            rows.append(row)
    compare_rows(rows, base=FLOOR)
    return Results("transducer" if axis is None else "transducer_growth", ABOUT, rows)


def test_the_table_compares_with_the_products_and_with_the_loss_on_logits() -> None:
    (text,) = transducer.section([results(), Results("ops", ABOUT)])
    (line,) = [line for line in text.splitlines() if f"**{OURS}**" in line]
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[3:8] == ["**10000 ± 10**", "**1.25×**", "**1.11×**", "**300**", "**0.075×**"]
    assert "load 0.1" in text
    assert text.count(FLOOR) == 1


def test_a_contender_that_cannot_run_is_named_with_its_reason() -> None:
    shown = results()
    (row,) = [row for row in shown.rows if row.contender == TORCHAUDIO]
    row.status, row.reason, row.median_ms, row.peak_mib = (
        "cannot run",
        "torchaudio: no such module",
        None,
        None,
    )
    table, notes = transducer.section([shown])
    assert notes == f"- {TORCHAUDIO}: cannot run: torchaudio: no such module"
    assert "0.075×" not in table


def test_targets_are_met_or_missed_by_what_was_measured() -> None:
    assert transducer.targets([results()]) == [
        "met    a-cpu-2-threads: RNN-T loss and gradient: time, × the three products 1.25 (≤ 1.3)",
        f"MISSED a-cpu-2-threads: RNN-T loss and gradient: time, × {TORCHAUDIO} 1.11 (≤ 1.0)",
        f"met    a-cpu-2-threads: RNN-T loss and gradient: memory, × {TORCHAUDIO} 0.07 (≤ 0.1)",
    ]


def test_a_figure_has_a_panel_for_each_axis_with_two_points(tmp_path: Path) -> None:
    written = transducer.draw([results(), results("V")], tmp_path)
    assert [path.name for path in written] == ["a-cpu-2-threads-rnnt.svg", "a-cpu-2-threads-rnnt.png"]
    figure = transducer.curves(results("V").rows)
    assert figure is not None
    assert [axes.get_xlabel() for axes in figure.axes[len(figure.axes) // 2 :]] == ["V"]
    assert [len(axes.get_lines()) for axes in figure.axes] == [4, 3]  # the products keep no memory
    assert transducer.curves(results().rows) is None
