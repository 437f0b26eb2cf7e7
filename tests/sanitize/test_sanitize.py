"""What `python -m tests.sanitize` runs, and that it does not take a stopped process for a passed test."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.plant.runner import planted
from tests.sanitize import __main__ as command
from tests.sanitize import build
from tests.sanitize.faults import ADDRESS_FAULTS, THREAD_FAULTS
from tests.sanitize.plugin import is_native

ROOT = Path(__file__).resolve().parents[2]


def item(file: str, **parameters: Any) -> Any:
    return SimpleNamespace(
        path=Path(file), callspec=SimpleNamespace(params=parameters) if parameters else None
    )


def test_what_names_another_backend_is_left_out() -> None:
    assert is_native(item("test_native.py"))
    assert is_native(item("test_values.py", backend="native", family="linear"))
    assert not is_native(item("test_values.py", backend="torch", family="linear"))
    assert not is_native(item("test_soundness.py", bounded_backend="triton"))
    assert not is_native(item("test_triton_layers.py"))


def test_a_test_that_was_under_way_has_not_passed() -> None:
    lines = [("a.py::x", "began"), ("a.py::x", "passed"), ("a.py::y", "began"), ("b.py::z", "skipped")]
    log = [json.dumps({"test": test, "outcome": outcome, "seconds": 1.0}) for test, outcome in lines]
    table, wrong = command.table_of(log)
    assert wrong == ["a.py::y"]
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == ["a.py", "b.py", "all"]
    assert [column[-1] for column in columns[1:4]] == ["1", "1", "1"]


@pytest.mark.parametrize("native", [*ADDRESS_FAULTS, *THREAD_FAULTS], ids=lambda native: native.fault.name)
def test_each_fault_has_its_text_and_its_tests(native: Any, tmp_path: Path) -> None:
    fault = native.fault
    (tmp_path / fault.path).parent.mkdir(parents=True)
    (tmp_path / fault.path).write_text((ROOT / fault.path).read_text())
    with planted(tmp_path, fault) as there:
        assert there
    for test in fault.tests:
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text() or not name


class Copy:
    """A copy whose commands end as the test wants."""

    def __init__(self, code: int, findings: list[str], tests: list[str], folder: Path) -> None:
        self.code, self._findings, self.tests = code, findings, tests
        self.folder, self.reports = folder, folder / "reports"

    def make(self) -> None:
        pass

    def run(self, *arguments: str) -> int:
        log = next((a.partition("=")[2] for a in arguments if a.startswith("--sanitize-log=")), "")
        if log:
            lines = [json.dumps({"test": f"a.py::{t}", "outcome": t, "seconds": 0.0}) for t in self.tests]
            Path(log).write_text("\n".join(lines))
        return self.code

    def findings(self) -> list[str]:
        return self._findings


@pytest.mark.parametrize(
    ("code", "findings", "tests", "ends"),
    [
        (0, [], ["passed"], 0),
        (1, [], ["failed"], 1),
        (build.STOPPED, ["heap-buffer-overflow"], ["passed", "began"], 1),
        (0, ["heap-buffer-overflow"], ["passed"], 1),  # in a process that a test starts
        (0, [], [], 1),  # nothing ran
    ],
)
def test_only_a_clean_run_is_well(
    code: int,
    findings: list[str],
    tests: list[str],
    ends: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "Copy", lambda kind: Copy(code, findings, tests, tmp_path))
    assert command.main(["--only", "tests/ops"]) == ends


def test_a_compiler_without_sanitizers_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\necho "${1#-print-file-name=}"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(build.SanitizeError, match=r"has no libasan.so; fix: install gcc's sanitizers"):
        build.Copy(build.ADDRESS, ROOT, tmp_path).environment()
