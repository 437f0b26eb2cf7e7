"""The Makefile, by dry runs: what is documented exists, and `make lint` edits nothing."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EDITING = re.compile(r"\s(--fix|--fix-only|--unsafe-fixes|-i|--inplace|sed|rm|mv|cp|>)\b")


def make(*arguments: str) -> str:
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    done = subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def recipe(target: str) -> list[str]:
    """What `make target` would run, the set-up of the virtual environment included."""
    return make("--dry-run", "VENV=no-such-folder", target).splitlines()


def documented() -> list[str]:
    """The targets that `make help` and the README name."""
    code = re.findall(r"(?s:```.*?```)|`[^`\n]+`", (ROOT / "README.md").read_text())
    return re.findall(r"\bmake ([a-z-]+)", "\n".join([make("help"), *code]))


def test_every_documented_target_has_a_recipe() -> None:
    assert {"setup", "demo", "test", "lint", "format"} <= set(documented())
    for target in documented():
        assert "Nothing to be done" not in "".join(recipe(target)), target


def test_every_target_is_documented() -> None:
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.M)
    assert phony
    assert set(phony[1].split()) - {"help"} == set(documented())


def test_lint_changes_nothing_and_format_does() -> None:
    lint = [line for line in recipe("lint") if re.match(r"no-such-folder/bin/(ruff|mypy|clang-format)", line)]
    assert [line.split()[0].rpartition("/")[2] for line in lint] == ["ruff", "ruff", "mypy", "clang-format"]
    for line in lint:
        assert not EDITING.search(line), line
        assert "/ruff format" not in line or " --check" in line, line
        assert "/clang-format" not in line or " --dry-run --Werror " in line, line
    assert any(EDITING.search(line) for line in recipe("format"))


def test_the_tests_run_on_every_core_and_on_one_where_asked() -> None:
    for wanted, arguments in (("-n logical ", []), ("-n 0 ", ["JOBS=0"])):
        said = make("--dry-run", "VENV=no-such-folder", *arguments, "test").splitlines()
        (line,) = [line for line in said if line.startswith("no-such-folder/bin/python -m pytest ")]
        assert wanted in line


def test_clang_format_sees_every_c_and_cpp_file() -> None:
    files = [path for folder in ("csrc", "tests", "bench") for path in (ROOT / folder).rglob("*.*")]
    sources = [path for path in files if path.suffix in (".c", ".h", ".cpp", ".cu", ".cuh")]
    line = next(line for line in recipe("lint") if "/clang-format" in line)
    assert sorted(line.partition("--Werror")[2].split()) == sorted(str(s.relative_to(ROOT)) for s in sources)


def test_native_code_and_settings_are_what_the_set_up_depends_on() -> None:
    """A changed exports.map or header is a new build."""
    rules = make("--dry-run", "--print-data-base", "VENV=no-such-folder", "help")
    line = re.search(r"^no-such-folder/\.installed: (.+)$", rules, re.M)
    assert line
    native = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert native | {"setup.py", "CMakeLists.txt", "pyproject.toml"} <= set(line[1].split())
