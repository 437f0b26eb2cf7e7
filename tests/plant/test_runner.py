"""What `python -m tests.plant` calls caught, and what it does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.plant.__main__ import main
from tests.plant.data import Fault
from tests.plant.runner import CAUGHT, ERROR, NOT_CAUGHT, STALE, TIMEOUT, Copy, copy_sources, planted

ROOT = Path(__file__).resolve().parents[2]
SOURCE = """\
def one():
    return 1


def unused():
    return 2
"""
TESTS = """\
import pytest
from module import one


@pytest.fixture
def made():
    return 1 / one()


def test_one():
    assert one() == 1


@pytest.mark.parametrize("times", [1, 2])
def test_times(times):
    assert times * one() == times


def test_made(made):
    assert made == 1


def test_wrong():
    assert one() == 2
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Copy]:
    folder = tmp_path_factory.mktemp("sources")
    (folder / "pyproject.toml").write_text('[tool.pytest.ini_options]\npythonpath = ["."]\n')
    (folder / "module.py").write_text(SOURCE)
    (folder / "test_module.py").write_text(TESTS)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take seconds
        with closing(Copy(folder, preloaded=("pytest",))) as made:
            yield made


@pytest.mark.thinned(4)
@pytest.mark.parametrize(
    ("word", "old", "new", "test"),
    [
        (CAUGHT, "return 1", "return 3", "test_one"),
        (CAUGHT, "return 1", "return 3", "test_times[2]"),
        (CAUGHT, "return 1", "raise ValueError", "test_one"),
        (NOT_CAUGHT, "return 2", "return 3", "test_one"),
        (STALE, "return 4", "return 3", "test_one"),
        (STALE, "return", "pass", "test_one"),
        (TIMEOUT, "return 1", "while True: pass", "test_one"),
        (ERROR, "def one():", "def two():", "test_one"),  # at import
        (ERROR, "return 1", "return 0", "test_made"),  # in a fixture
        (ERROR, "return 1", "return three", "test_one"),
        (ERROR, "return 1", "return one.three", "test_one"),
        (ERROR, "return 1", "return 3", "test_that_is_not_there"),
        (ERROR, "return 1", "return 3", "test_wrong"),  # without the fault too
        (ERROR, "return 1", "import os; os._exit(1)", "test_one"),
    ],
)
def test_only_a_failure_of_a_named_test_is_caught(
    copy: Copy, word: str, old: str, new: str, test: str
) -> None:
    fault = Fault("a fault", "module.py", old, new, f"test_module.py::{test}")
    outcome = copy.judge(fault, timeout=1 if word == TIMEOUT else 60)
    assert outcome.word == word, outcome.detail
    assert (copy.folder / "module.py").read_text() == SOURCE


def test_a_file_that_is_not_there_is_stale(tmp_path: Path) -> None:
    with planted(tmp_path, Fault("a fault", "gone.py", "a", "b")) as there:
        assert not there


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")
def test_the_copy_holds_the_sources_and_nothing_of_git(tmp_path: Path) -> None:
    copy_sources(ROOT, tmp_path)
    for name in ("pyproject.toml", "dpkernels/__init__.py", "tests/plant/runner.py"):
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes()
    assert not (tmp_path / ".git").exists()


def test_faults_are_chosen_by_name_path_and_line(capsys: pytest.CaptureFixture[str]) -> None:
    for pattern in ("no fsync", "no f*c", "11", "*/ledger.py"):
        assert main(["--list", "--only", pattern]) == 0
        assert "no fsync: dpkernels/" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--list", "--only", "no such fault"])
    assert "no fault has such a name, path or line" in capsys.readouterr().err
