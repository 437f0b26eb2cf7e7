"""Report and compare, on made-up results."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from bench.compare import alternate, compare, sign_test
from bench.harness.memory import largest_batch
from bench.harness.results import Results, Row, compare_rows, load
from bench.harness.table import show
from bench.reports import plots, report
from bench.reports import step as step_report

ABOUT = {
    "device": "A Processor",
    "slug": "a-processor-2-threads",
    "threads": 2,
    "load": 0.1,
    "versions": {"torch": "2.13.0", "opacus": "1.6.0"},
    "cuda": None,
    "commit": "abc1234",
    "dirty": False,
    "date": "2026-01-02T03:04:05+00:00",
}
TIMES = {"non-private": 100.0, "dpkernels bookkeeping": 105.0, "Opacus hooks": 140.0, "Opacus ghost": 230.0}


def rows(axis: str | None = None, **shape: int) -> list[Row]:
    found = []
    for name, ms in TIMES.items():
        scale = shape.get("T", 150) / 150
        row = Row("parakeet-lora", "Parakeet, LoRA r=8", {"B": 8, "T": 150, "r": 8} | shape, name, axis)
        row.median_ms, row.iqr_ms, row.rounds, row.peak_mib = ms * scale, 2.0, 9, ms * scale / 2
        found.append(row)
    compare_rows(found)
    return found


@pytest.fixture
def results() -> Results:
    shape = {"B": 8, "T": 150, "r": 8}
    wrong = Row(
        "parakeet-lora", "Parakeet, LoRA r=8", shape, "torch.func", None, "wrong", "off by 1.0e+00", 1.0
    )
    curve = [row for t in (32, 150, 1500) for row in rows("T", T=t)]
    return Results("step", ABOUT, [*rows(), wrong, *curve])


def test_ratios_are_between_rows_of_one_place(results: Results) -> None:
    ours = next(row for row in results.rows if row.contender.startswith("dpkernels"))
    assert (ours.ratio, ours.over_ghost, ours.over_hooks, ours.memory_ratio) == (1.05, 2.19, 1.33, 1.05)
    wrong = next(row for row in results.rows if row.status == "wrong")
    assert (wrong.ratio, wrong.over_ghost) == (None, None)


def test_a_file_comes_back_as_it_was_written(results: Results, tmp_path: Path) -> None:
    path = results.save(tmp_path)
    assert path == tmp_path / "a-processor-2-threads" / "step.json"
    assert load(path) == results


def test_the_readme_has_the_default_strategy_of_each_case(results: Results) -> None:
    text = step_report.summary([results])
    assert "A Processor, 2 threads" in text
    assert (
        "| Parakeet, LoRA r=8, B = 8, T = 150 | 100 ± 1 | 105 ± 1 | **1.05×** | 1.05× | 2.19× | 1.33× |"
        in text
    )
    assert text.count("| Parakeet") == 1  # no curve, no other contender
    assert step_report.summary([]) == ""


@pytest.mark.parametrize(
    "page", [report.README, report.BENCHMARKS, report.DISTRIBUTED], ids=lambda page: page.name
)
def test_the_pages_are_what_the_results_make_of_them(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert report.replace_section(text, report.pages(report.FOLDER)[page]) == text


def test_the_table_of_all_contenders(results: Results) -> None:
    text = step_report.markdown([results])
    assert "A Processor, 2 threads" in text
    assert "commit abc1234, 2026-01-02" in text
    assert "| **105 ± 1** | **1.05×** | **2.19×** | **1.33×** | **52 (1.05×)** |" in text
    assert "torch.func | wrong |" in text
    assert "torch.func: wrong: off by 1.0e+00" in text
    assert text.count("Parakeet, LoRA r=8, B = 8, T = 150") == 1


def test_what_was_not_run_is_told_from_what_failed(results: Results) -> None:
    """Also where one of Opacus's ways failed: then its row says so, and the cell stays empty."""
    assert "not run" not in step_report.markdown([results])
    ours = ("non-private", "dpkernels bookkeeping")
    larger = [row for row in rows(B=16) if row.contender in ours]
    compare_rows(larger)
    failed = next(row for row in results.rows if row.contender == "Opacus ghost")
    failed.status, failed.median_ms = "wrong", None
    compare_rows(results.rows)
    text = step_report.markdown([Results("step", ABOUT, [*results.rows, *larger])])
    assert "| **105 ± 1** | **1.05×** | not run | not run | **52 (1.05×)** |" in text
    assert "| **105 ± 1** | **1.05×** |  | **1.33×** | **52 (1.05×)** |" in text
    said = "\n\nParakeet, LoRA r=8, B = 16, T = 150: Opacus hooks and Opacus ghost not run at this size.\n"
    assert said in f"{text}\n"
    assert text.count("at this size") == 1


def test_only_what_is_between_the_markers_changes() -> None:
    text = f"before\n{report.START}\nold\n{report.END}\nafter"
    once = report.replace_section(text, "new")
    assert once == f"before\n{report.START}\n\nnew\n\n{report.END}\nafter"
    assert report.replace_section(once, "new") == once


@pytest.mark.parametrize(
    "text", ["none", f"{report.END} {report.START}", f"{report.START}{report.END}{report.START}"]
)
def test_a_readme_without_its_markers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="each once"):
        report.replace_section(text, "new")


def test_targets_say_what_was_missed(results: Results) -> None:
    lines = report.targets([results])
    assert len(lines) == 4
    assert all(line.startswith("met") for line in lines)
    for row in results.rows:
        row.ratio = 1.2 if row.ratio is not None else None
    assert [
        line for line in report.targets([results]) if line.startswith("MISSED") and "1.20 (≤ 1.1)" in line
    ]


@pytest.mark.slow
def test_plots_are_drawn_the_same_twice(results: Results, tmp_path: Path) -> None:
    paths = plots.draw([results], tmp_path / "a")
    assert {path.name for path in paths} == {
        f"a-processor-2-threads-{name}.{kind}"
        for name in ("time-over-T", "memory-over-T", "step-ratios")
        for kind in ("svg", "png")
    }
    again = plots.draw([results], tmp_path / "b")
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]


def test_the_terminal_table_says_why_there_is_no_time(results: Results) -> None:
    text = show(results)
    assert "torch.func: wrong: off by 1.0e+00" in text
    assert "105 ± 1" in text


def test_two_commits_that_differ() -> None:
    first = [1.00, 1.10, 0.95, 1.30, 1.02, 0.99, 1.05, 1.00]
    found = compare(first, [0.9 * one for one in first])
    assert found.real
    assert found.ratio == pytest.approx(0.9)
    assert "FASTER by 10.0%" in str(found)
    assert "SLOWER" in str(compare([0.9 * one for one in first], first))


def test_two_commits_that_do_not() -> None:
    first = [1.00, 1.10, 0.95, 1.30, 1.02, 0.99, 1.05, 1.00]
    noise = [1.02, 0.97, 1.03, 0.99, 1.01, 0.98, 1.02, 0.99]
    found = compare(first, [a * b for a, b in zip(first, noise, strict=True)])
    assert not found.real
    assert "no difference beyond the noise" in str(found)


def test_few_pairs_never_tell() -> None:
    assert not compare([1.0] * 5, [0.5] * 5).real
    assert compare([1.0] * 6, [0.5] * 6).real


def test_the_sign_test_is_exact() -> None:
    assert sign_test([1.0] * 6) == pytest.approx(2 / 64)
    assert sign_test([1.0, -1.0, 0.0]) == 1.0
    assert sign_test([]) == 1.0


@pytest.mark.parametrize(("first", "second"), [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0])])
def test_what_cannot_be_compared(first: list[float], second: list[float]) -> None:
    with pytest.raises(ValueError, match=r"pairs|positive"):
        compare(first, second)


def test_commits_take_turns_in_changing_order() -> None:
    order: list[int] = []

    def take(which: int) -> float:
        order.append(which)
        return float(which)

    assert alternate(3, take) == ([0.0] * 3, [1.0] * 3)
    assert order == [0, 1, 1, 0, 0, 1]


@pytest.mark.parametrize(("most", "found"), [(0, 0), (1, 1), (7, 7), (8, 8), (13, 12), (1000, 64)])
def test_the_largest_batch_by_doubling_and_halving(most: int, found: int) -> None:
    tried: list[int] = []

    def peak(size: int) -> float:
        tried.append(size)
        return float(size)

    assert largest_batch(peak, most, most=64) == found
    assert len(tried) <= 9


def test_a_batch_that_cannot_run_does_not_fit() -> None:
    assert largest_batch(lambda size: None if size > 4 else math.pi, 100.0) == 4
