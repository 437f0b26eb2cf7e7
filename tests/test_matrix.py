"""The matrix of versions: its rows are the ends of what pyproject.toml states, and the page shows what was measured."""

import subprocess
from pathlib import Path

import pytest
from packaging.version import Version

from tests import matrix

TORCHES = [Version(v) for v in ("2.10.0", "2.11.0", "2.12.0", "2.12.1", "2.13.0", "2.13.0+cpu", "2.15.0")]


def test_the_rows_are_the_ends_of_what_is_stated() -> None:
    rows = matrix.rows(TORCHES)
    newest = [row.torch for row in rows if row.python == "3.11" and not row.peft]
    assert newest == [
        "2.11.0",
        "2.12.1",
        "2.13.0",
        "2.15.0",
    ]  # the last of each minor, and none below the oldest
    assert {row.python for row in rows if row.torch == "2.15.0"} == set(matrix.PYTHONS)
    oldest = [row for row in rows if row.peft]
    assert (oldest[0].torch, oldest[0].transformers, oldest[0].peft) == ("2.11.0", "5.23", "0.18")


def test_the_oldest_torch_is_the_first_of_its_minor() -> None:
    assert matrix.rows([Version("2.11.0"), Version("2.11.1"), Version("2.12.0")])[0].torch == "2.11.0"


def test_an_unknown_package_is_named() -> None:
    with pytest.raises(ValueError, match=r"pyproject\.toml requires no numba"):
        matrix.oldest("numba")


@pytest.mark.parametrize(
    ("printed", "result"),
    [
        ("....\n63 passed, 9 deselected in 61.10s (0:01:01)", "63 passed, 9 deselected"),
        (
            "FAILED tests/a.py::test_b - AssertionError\n1 failed, 2 passed in 3.00s",
            "1 failed, 2 passed: tests/a.py::test_b",
        ),
        ("", "no output"),
    ],
)
def test_a_failure_is_shown_with_its_name(monkeypatch: pytest.MonkeyPatch, printed: str, result: str) -> None:
    done = subprocess.CompletedProcess([], 1, stdout=printed, stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: done)
    assert matrix.run_tests(Path("python"), matrix.TESTS) == result


def test_a_python_that_is_not_here_is_not_skipped_in_silence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(matrix, "interpreter", lambda version: None)
    row = matrix.measure_fresh(matrix.Row("3.14", "2.15.0"), tmp_path / "env", (), cuda_builds=False)
    assert row.result == "not had: no python3.14 on this machine"


def test_the_page_holds_the_table_and_no_failure() -> None:
    page = matrix.PAGE.read_text()
    shown = page.split(matrix.BEGIN)[1].split(matrix.END)[0]
    row = matrix.Measured("3.11.7", "2.13.0", "5.24.0", "0.21.2", "1.6.0", "9 passed")
    assert matrix.table([row])[0] in shown
    assert " failed" not in shown
    assert " error" not in shown
    again = matrix.written(page, matrix.table([row]))
    assert again.count(matrix.BEGIN) == again.count(matrix.END) == 1
    assert "| 3.11.7 | 2.13.0 | 5.24.0 | 0.21.2 | 1.6.0 | 9 passed |" in again
    assert matrix.written(again, matrix.table([row])) == again
    oldest = matrix.oldest("torch")
    measured = [line.split("|")[2].split()[0] for line in shown.splitlines() if " passed" in line]
    assert any(Version(version).release[:2] == Version(oldest).release[:2] for version in measured)


def test_the_tests_of_the_selection_exist() -> None:
    assert all((matrix.ROOT / test).is_file() for test in matrix.TESTS)
