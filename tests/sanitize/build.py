"""A copy of the sources with a sanitized CPU library, and the environment in which Python can load it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.plant.runner import copy_sources

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitize"
LIBRARY = "libdpkernels_cpu.so"
# What a process that a sanitizer stops ends with: pytest and the fuzzer end with smaller numbers.
STOPPED = 97
# Where UndefinedBehaviorSanitizer writes: beside AddressSanitizer it does not know of log_path.
_STDERR = "stderr"
_MARKS = ("Sanitizer", "runtime error:")


class SanitizeError(RuntimeError):
    """The sanitized library cannot be built here; the message has the fix."""


@dataclass(frozen=True)
class Kind:
    """One kind of sanitizer.

    Attributes:
        name: DPK_SANITIZE of CMakeLists.txt.
        runtime: the library that a program must load before all others.
        options: by environment variable.
    """

    name: str
    runtime: str
    options: dict[str, str]


ADDRESS = Kind(
    "address",
    "libasan.so",
    {
        # Python and torch free little at their end, and tests ask for more memory than there is on purpose.
        "ASAN_OPTIONS": f"detect_leaks=0:allocator_may_return_null=1:exitcode={STOPPED}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:exitcode={STOPPED}",
    },
)
THREAD = Kind(
    "thread",
    "libtsan.so",
    {
        "TSAN_OPTIONS": f"halt_on_error=1:die_after_fork=0:exitcode={STOPPED}",
        "OMP_NUM_THREADS": "1",  # torch's threads wait by futexes of libgomp, which ThreadSanitizer does not see
    },
)


class Copy:
    """A copy of the sources below build/sanitize, which is kept for the next run, and its library."""

    def __init__(self, kind: Kind, root: Path = ROOT, build: Path = BUILD) -> None:
        self.kind, self.root = kind, root
        self.folder, self.objects = build / kind.name / "source", build / kind.name / "objects"
        self.reports = build / kind.name / "reports"

    def make(self) -> None:
        """Copy the sources anew and build what changed.

        Raises:
            SanitizeError: cmake or the compiler fails, or the compiler is another one than gcc.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        copy_sources(self.root, self.folder)
        for library in (self.folder / "dpkernels/lib").glob("*.so"):
            library.unlink()  # nothing falls back to one that is not sanitized
        configure = ["cmake", "-S", str(self.folder), "-B", str(self.objects), "-DDPK_CUDA=OFF"]
        configure += [f"-DDPK_SANITIZE={self.kind.name}", f"-DDPK_OUTPUT_DIR={self.objects / 'lib'}"]
        if shutil.which("ninja", path=_path()):
            configure += ["-G", "Ninja"]
        _run(configure)
        self.rebuild()

    def rebuild(self) -> None:
        """Build what changed in the copy."""
        _run(["cmake", "--build", str(self.objects), "--parallel", str(len(os.sched_getaffinity(0)))])
        (self.folder / "dpkernels/lib").mkdir(parents=True, exist_ok=True)
        shutil.copy2(self.objects / "lib" / LIBRARY, self.folder / "dpkernels/lib" / LIBRARY)

    def environment(self) -> dict[str, str]:
        """Of a Python that loads the library; a sanitizer writes to `reports`, since pytest keeps what is printed."""
        shutil.rmtree(self.reports, ignore_errors=True)
        self.reports.mkdir(parents=True)
        log = f":log_path={self.reports / 'report'}"
        # The run-time library looks for the C++ library's functions when it is loaded, before Python loads torch's.
        preload = " ".join(_library(name) for name in (self.kind.runtime, "libstdc++.so.6"))
        kept = {name: value for name, value in os.environ.items() if not name.startswith("DPKERNELS_")}
        options = {
            name: value + log if name.endswith("SAN_OPTIONS") else value
            for name, value in self.kind.options.items()
        }
        return (
            kept
            | options
            | {
                "LD_PRELOAD": preload,
                "PYTHONPATH": str(self.folder),
                "OMP_WAIT_POLICY": "passive",
                "PYTHONDONTWRITEBYTECODE": "1",
            }
        )

    def run(self, *arguments: str) -> int:
        """Run Python with these arguments in the copy; how it ended."""
        command, environment = [sys.executable, *arguments], self.environment()
        with open(self.reports / _STDERR, "w+", encoding="utf-8", errors="replace") as errors:
            done = subprocess.run(command, cwd=self.folder, env=environment, stderr=errors, check=False)
            errors.seek(0)
            sys.stderr.write(errors.read())
        return done.returncode

    def findings(self) -> list[str]:
        """What the sanitizers wrote in the last run, report by report."""
        paths = [*sorted(self.reports.glob("report.*")), self.reports / _STDERR]
        texts = [path.read_text(errors="replace") for path in paths if path.is_file()]
        return [text for text in texts if any(mark in text for mark in _MARKS)]


def _path() -> str:
    return os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def _library(name: str) -> str:
    """The path of a library of the compiler's."""
    found = subprocess.run(
        [*_compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    path = found.stdout.strip()
    if not os.path.isabs(path):  # gcc repeats the name of what it does not have
        raise SanitizeError(
            f"{_compiler()[0]} has no {name}; fix: install gcc's sanitizers, or set CXX to a g++"
        )
    return path


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, env=os.environ | {"PATH": _path()}, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise SanitizeError(f"{command[0]} was not found; fix: pip install 'cmake>=3.24'") from None
    if done.returncode:
        raise SanitizeError(
            f"{shlex.join(command[:4])} … failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        )
