"""What `python -m tests.sanitize` adds to pytest: it leaves out what no native code runs in, and notes each result.

A sanitizer ends the process, so results are written as they come, and the name of a test before it runs.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

# Parameters that name a backend, and modules about others than the native one.
_BACKENDS = ("backend", "bounded_backend", "triton_backend")
_OTHERS = ("triton", "tensor_cores", "emulated", "gpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sanitize-log", type=Path, help="file that receives a line for each result")


def is_native(item: pytest.Item) -> bool:
    """Whether a test may run native code: it names no other backend."""
    case = getattr(item, "callspec", None)
    named = [case.params[name] for name in _BACKENDS if name in case.params] if case else []
    return all(name == "native" for name in named) and not any(part in item.path.stem for part in _OTHERS)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    others = [item for item in items if not is_native(item)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if is_native(item)]


def _note(config: pytest.Config, **line: object) -> None:
    log = config.getoption("--sanitize-log")
    if log is not None and not hasattr(config, "workerinput"):
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class Notes:
    """Writes the log of one run."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        _note(self.config, test=nodeid, outcome="began", seconds=0.0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            _note(self.config, test=report.nodeid, outcome=report.outcome, seconds=report.duration)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Notes(config), "sanitize-notes")
