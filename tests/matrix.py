"""The supported versions, measured: `make matrix`, or `python -m tests.matrix`.

Each row is a fresh virtual environment with one choice of Python, torch, transformers, PEFT and Opacus, in which a
quick selection of the tests runs. The rows are the ends of what pyproject.toml states: every minor version of torch
from the oldest to the registry's newest, each Python with the newest torch, and the oldest and newest libraries.

A row that cannot be had says why. Without --cuda-builds a torch that would be downloaded as a CUDA build (several
gigabytes) is not; a wheel on this disk or a CPU build in pip's configuration is taken. --environment adds one that was
made by hand. --write docs/versions.md puts the table into the documentation; `tests/test_matrix.py` holds that
pyproject.toml claims nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/versions.md"
BEGIN, END = "<!-- matrix -->", "<!-- /matrix -->"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
LIBRARIES = ("transformers", "peft", "opacus")
NEEDED = ("pytest", "hypothesis", "pyyaml", "setuptools", "packaging")
TESTS = (
    "tests/ops/test_registry.py",
    "tests/nn/layers/test_norm.py",
    "tests/nn/recording/test_compiled.py",
    "tests/privacy/step/test_clipping.py",
    "tests/interop/test_peft.py",
    "tests/interop/test_opacus_norms.py",
)


@dataclass(frozen=True)
class Row:
    """One environment: the versions that are asked for ("" for the newest)."""

    python: str
    torch: str
    transformers: str = ""
    peft: str = ""
    opacus: str = ""

    def requirements(self) -> list[str]:
        """For pip, without torch."""
        pinned = [f"{name}=={v}" if (v := getattr(self, name)) else name for name in LIBRARIES]
        numbers = [r for r in project()["dependencies"] if Requirement(r).name != "torch"]
        return [*numbers, *pinned, *NEEDED]


@dataclass(frozen=True)
class Measured:
    """A row of the table: versions as they were installed, and what the tests said."""

    python: str
    torch: str
    transformers: str
    peft: str
    opacus: str
    result: str


def project() -> dict[str, object]:
    """The [project] table of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def oldest(name: str) -> str:
    """The oldest version of a package that pyproject.toml allows."""
    extras = project()["optional-dependencies"]
    stated = [*project()["dependencies"], *(r for extra in extras.values() for r in extra)]
    for requirement in map(Requirement, stated):
        if requirement.name == name:
            return next(s.version for s in requirement.specifier if s.operator == ">=")
    raise ValueError(f"pyproject.toml requires no {name}")


def released(name: str) -> list[Version]:
    """The final versions of a package that the registry has, oldest first."""
    said = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", name], check=True, capture_output=True, text=True
    ).stdout
    line = re.search(r"Available versions: (.*)", said)
    return (
        sorted({v for text in line[1].split(", ") if not (v := Version(text)).is_prerelease}) if line else []
    )


def rows(torches: Sequence[Version], python: str = PYTHONS[0]) -> list[Row]:
    """What to measure, given the released versions of torch."""
    minors: dict[tuple[int, ...], Version] = {}
    for version in sorted(v for v in torches if v >= Version(oldest("torch")) and not v.local):
        minors.setdefault(version.release[:2], version)  # the first of a minor: the oldest is what is stated
        if version.release[:2] > Version(oldest("torch")).release[:2]:
            minors[version.release[:2]] = version  # of the others the last
    chosen = [str(v) for v in minors.values()]
    table = [Row(python, torch) for torch in chosen]
    table += [Row(other, chosen[-1]) for other in PYTHONS[1:]]
    table += [Row(python, t, *(oldest(name) for name in LIBRARIES)) for t in (chosen[0], "2.13.0")]
    return table


def interpreter(version: str) -> str | None:
    """A working interpreter of this version on the PATH."""
    path = shutil.which(f"python{version}")
    works = (
        path and subprocess.run([path, "-c", "import venv, ensurepip"], capture_output=True).returncode == 0
    )
    return path if works else None


def would_download(python: Path, torch: str) -> str:
    """Why this torch is not installed: it is not there, or it is a CUDA build that is not on this disk; else ""."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [python, "-m", "pip", "install", "--dry-run", "--quiet", "--no-deps", "--report", report]
        done = subprocess.run([*command, f"torch=={torch}"], capture_output=True, text=True)
        if done.returncode:
            return f"pip has no torch {torch} for this Python here ({done.stderr.strip().splitlines()[-1]})"
        (found,) = json.loads(report.read_text())["install"]
    cuda = any(re.match(r"(nvidia|cuda)-", r) for r in found["metadata"].get("requires_dist", []))
    if cuda and not found["download_info"]["url"].startswith("file:"):
        return "the registry has only a CUDA build, several gigabytes (--cuda-builds installs it)"
    return ""


def installed(python: Path, name: str) -> str:
    """The version of a package in an environment, or "none"."""
    code = f"import importlib.metadata as m; print(m.version({name!r}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() or "none"


def run_tests(python: Path, tests: Sequence[str]) -> str:
    """The last line of pytest in an environment, from the sources of this checkout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--show-capture=no", *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    lines = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()
    summary = re.sub(r" in \d.*", "", lines[-1]).strip("= ")
    return summary + (f": {', '.join(failed[:5])}" if failed else "")


def measure(python: Path, result: str) -> Measured:
    """A row of the table for an environment that exists."""
    code = "import platform; print(platform.python_version())"
    version = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    return Measured(version, *(installed(python, name) for name in ("torch", *LIBRARIES)), result)


def measure_fresh(row: Row, folder: Path, tests: Sequence[str], cuda_builds: bool) -> Measured:
    """Make the row's environment, run the tests, and remove it again."""

    def absent(reason: str) -> Measured:
        named = (getattr(row, name) or "newest" for name in LIBRARIES)
        return Measured(row.python, row.torch, *named, f"not had: {reason}")

    base = interpreter(row.python)
    if base is None:
        return absent(f"no python{row.python} on this machine")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        subprocess.run([base, "-m", "venv", folder], check=True)
        python = folder / "bin/python"
        reason = would_download(python, row.torch)
        if reason and not (cuda_builds and "CUDA build" in reason):
            return absent(reason)
        for wanted in ([f"torch=={row.torch}"], row.requirements()):
            command = [python, "-m", "pip", "install", "--quiet", *wanted]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                return absent(f"pip: {done.stderr.strip().splitlines()[-1]}")
        return measure(python, run_tests(python, tests))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def table(measured: Iterable[Measured]) -> list[str]:
    """The rows as a table in Markdown."""
    lines = ["| Python | torch | transformers | PEFT | Opacus | tests |", "|---|---|---|---|---|---|"]
    return lines + [f"| {' | '.join(vars(row).values())} |" for row in measured]


def written(page: str, lines: Sequence[str]) -> str:
    """The page with these lines between its markers."""
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    return "\n".join([f"{before}{BEGIN}", "", *lines, "", f"{END}{after}"])


def main() -> None:
    """Measure and print, and write the page where that is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cuda-builds", action="store_true", help="also download CUDA builds of torch")
    parser.add_argument("--only", default="", help="only rows whose versions contain this text")
    parser.add_argument(
        "--environment", type=Path, action="append", default=[], help="python of an environment made by hand"
    )
    parser.add_argument("--no-fresh", action="store_true", help="only the environments made by hand")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build/matrix", help="the folder of the environments"
    )
    parser.add_argument("--write", type=Path, help=f"the page to write the table into ({PAGE.name})")
    parser.add_argument("tests", nargs="*", default=TESTS, help="the tests to run, instead of the selection")
    options = parser.parse_args()
    measured: list[Measured] = []
    for python in options.environment:
        measured.append(measure(python, run_tests(python, options.tests)))
        print(table(measured)[-1], flush=True)
    for row in [] if options.no_fresh else rows(released("torch")):
        if options.only in " ".join(vars(row).values()):
            measured.append(measure_fresh(row, options.work.resolve(), options.tests, options.cuda_builds))
            print(table(measured)[-1], flush=True)
    print("\n".join(["", *table(measured)]))
    if options.write:
        options.write.write_text(written(options.write.read_text(), table(measured)))
    if any("failed" in row.result or "error" in row.result for row in measured):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
