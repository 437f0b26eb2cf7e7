"""Copy the sources, plant one fault, run the tests that are to catch it, and say what came of it."""

from __future__ import annotations

import itertools
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.plant.data import Fault

CAUGHT, NOT_CAUGHT, STALE, TIMEOUT, ERROR = "caught", "NOT CAUGHT", "stale", "timeout", "error"
# What git does not list, and the tests compute with.
BUILT = ("dpkernels/lib/*.so",)
# How a test fails where a fault uses a name that its file does not have (any more): this does not show that the test
# notices the fault.
MISSING_NAME = re.compile(r"(?:NameError|UnboundLocalError|AttributeError): .*'(\w+)'")
WORKER = Path(__file__).with_name("worker.py")
# What tests import before the sources, and takes seconds.
PRELOADED = (
    "numpy",
    "torch",
    "pytest",
    "hypothesis",
    "dp_accounting.pld",
    "dp_accounting.rdp",
    "transformers",
    "peft",
)


@dataclass(frozen=True)
class Outcome:
    """What came of a fault: one of the five words, after how many seconds, and what says so."""

    word: str
    seconds: float = 0.0
    detail: str = ""


def copy_sources(root: Path, target: Path) -> None:
    """Copy what git tracks, or would, and the built libraries; times of files too, for their byte code's sake."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=root, check=True, capture_output=True, text=True).stdout.split("\0")
    names += [str(path.relative_to(root)) for pattern in BUILT for path in root.glob(pattern)]
    for name in filter(None, names):
        if (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)


_SECONDS = itertools.count(2)


@contextmanager
def planted(root: Path, fault: Fault) -> Iterator[bool]:
    """Within it the file below `root` has the fault; False where its text is not there exactly once."""
    path = root / fault.path
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    if before.count(fault.old) != 1:
        yield False
        return
    times = path.stat()
    path.write_text(before.replace(fault.old, fault.new), encoding="utf-8")
    # Python knows byte code that is out of date by the source's second and size: no two plants have the same.
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + next(_SECONDS) * 10**9))
    try:
        yield True
    finally:
        path.write_text(before, encoding="utf-8")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


class Copy:
    """A copy of the sources, and a process in it that runs tests: see worker.py."""

    def __init__(self, folder: Path, preloaded: Sequence[str] = PRELOADED) -> None:
        self.folder = folder
        self._passing: set[tuple[str, ...]] = set()  # without a fault
        # Byte code of the copy is kept, whatever the caller wants of his own: each fault compiles one file anew.
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), *preloaded],
            cwd=folder,
            env=kept | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def judge(self, fault: Fault, timeout: float) -> Outcome:
        """Plant a fault, run its tests, and take it out again.

        The same tests are run without it first, as alone as with it: where one does not pass, its failing says nothing.
        """
        if fault.tests not in self._passing:
            word, detail = self.run_tests(fault.tests, timeout)
            if word != NOT_CAUGHT:
                return Outcome(ERROR, detail=f"without the fault: {word}, {detail}")
            self._passing.add(fault.tests)
        began = time.monotonic()
        with planted(self.folder, fault) as there:
            if not there:
                return Outcome(STALE, detail=f"{fault.path} has its text not exactly once")
            word, detail = self.run_tests(fault.tests, timeout, fault.new)
        return Outcome(word, time.monotonic() - began, detail)

    def run_tests(self, tests: Sequence[str], timeout: float, planted: str = "") -> tuple[str, str]:
        """Run these tests: NOT_CAUGHT where all pass, CAUGHT where one of them fails while it runs.

        ERROR is whatever else ends pytest: a module that cannot be imported, a fixture that raises, no test of that
        name; and a test that fails since a name is missing that stands in `planted`, the text of the fault.
        """
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            code, said = self._ask(
                [timeout, "-x", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
            )
            if code is None:
                return TIMEOUT, f"after {timeout:.0f} s"
            if code == 0:
                return NOT_CAUGHT, f"passes: {', '.join(tests)}"
            failures = failed(report, tests) if code == 1 and report.is_file() else []
            if failures:
                name, message = failures[0]
                missing = MISSING_NAME.match(message)
                stale = missing is not None and re.search(rf"\b{missing[1]}\b", planted) is not None
                return ERROR if stale else CAUGHT, f"{name}: {message}"
            return ERROR, f"pytest ended with {code}: {' | '.join(said.strip().splitlines()[-3:])}"

    def _ask(self, request: list[Any]) -> tuple[int | None, str]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        code, said = json.loads(self._process.stdout.readline())
        return code, said


def failed(report: Path, tests: Sequence[str]) -> list[tuple[str, str]]:
    """The names and messages of those of these tests that failed while they ran, from a JUnit report."""
    named = {test.partition("[")[0] for test in tests}
    found = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        failure = case.find("failure")  # what fails in a fixture or at import is an <error>
        node = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name', '')}"
        if failure is not None and node.partition("[")[0] in named:
            message = " ".join(failure.get("message", "").split())
            found.append((node.rpartition("::")[2], message[:160]))
    return found


def run_all(
    root: Path,
    faults: Sequence[Fault],
    *,
    jobs: int,
    timeout: float,
    tell: Callable[[int, Fault, Outcome], None],
) -> list[Outcome]:
    """Judge each fault in one of `jobs` copies of `root`; `tell` each outcome as it comes."""
    with tempfile.TemporaryDirectory(prefix="plant-") as folder, ExitStack() as opened:
        copies: queue.Queue[Copy] = queue.Queue()
        for number in range(jobs):
            copy_sources(root, Path(folder) / str(number))
            copies.put(opened.enter_context(closing(Copy(Path(folder) / str(number)))))

        def judged(fault: Fault) -> Outcome:
            copy = copies.get()
            try:
                return copy.judge(fault, timeout)
            finally:
                copies.put(copy)

        with ThreadPoolExecutor(jobs) as pool:
            running = {pool.submit(judged, fault): fault for fault in faults}
            outcomes = []
            for done in as_completed(running):
                outcomes.append(done.result())
                tell(len(outcomes), running[done], outcomes[-1])
    return outcomes
