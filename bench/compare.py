"""Two commits on one machine, in pairs: `python -m bench.compare REV1 REV2 [--cases parakeet-lora,parakeet-full]`.

Each commit's package is checked out into a worktree of its own and built there. Fresh processes then alternate
(1 2, 2 1, 1 2, …), all running *this* checkout's benchmark code, and every pair gives one ratio of times. A
difference is called real where both hold: the bootstrap interval of the median ratio excludes 1, and the sign test
over the pairs is below the same level. `working` as a revision means the working tree as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.harness.machine import ROOT

WORKING = "working"
LEVEL = 0.05
_LIBRARY = Path("dpkernels") / "lib"


@dataclass(frozen=True)
class Comparison:
    """ratio: median of REV2's time over REV1's in a pair; low, high: its 95 % interval; p: of the sign test."""

    ratio: float
    low: float
    high: float
    p: float
    pairs: int

    @property
    def real(self) -> bool:
        """Whether the difference exceeds the noise."""
        return self.p < LEVEL and not self.low <= 1.0 <= self.high

    def __str__(self) -> str:
        if not self.real:
            verdict = "no difference beyond the noise"
        elif self.ratio < 1:
            verdict = f"FASTER by {1 - self.ratio:.1%}"
        else:
            verdict = f"SLOWER by {self.ratio - 1:.1%}"
        return f"{self.ratio:.3f} [{self.low:.3f}, {self.high:.3f}], p = {self.p:.3f}, {self.pairs} pairs: {verdict}"


def compare(
    first: Sequence[float], second: Sequence[float], *, draws: int = 4000, seed: int = 0
) -> Comparison:
    """Paired comparison of two equally long series of times.

    The interval is the percentile bootstrap of the median log ratio over pairs; p is the exact two-sided sign
    test's. Six pairs are the least that can reach p < 0.05.

    Raises:
        ValueError: no pairs, lengths that differ, or a time that is not positive.
    """
    if not first or len(first) != len(second):
        raise ValueError(
            f"first, second: expected as many times in each; given {len(first)} and {len(second)}; pass pairs"
        )
    if min(*first, *second) <= 0:
        raise ValueError("times must be positive")
    logs = [math.log(b / a) for a, b in zip(first, second, strict=True)]
    generator = random.Random(seed)
    medians = sorted(statistics.median(generator.choices(logs, k=len(logs))) for _ in range(draws))
    low, high = medians[int(0.025 * draws)], medians[min(draws - 1, int(0.975 * draws))]
    return Comparison(
        math.exp(statistics.median(logs)), math.exp(low), math.exp(high), sign_test(logs), len(logs)
    )


def sign_test(differences: Sequence[float]) -> float:
    """Return the two-sided p of as many or more equal signs under a fair coin; zeros are skipped."""
    signs = [value > 0 for value in differences if value]
    most = max(sum(signs), len(signs) - sum(signs))
    tail = sum(math.comb(len(signs), k) for k in range(most, len(signs) + 1)) / 2 ** len(signs)
    return min(1.0, 2 * tail)


def alternate(pairs: int, take: Callable[[int], float]) -> tuple[list[float], list[float]]:
    """Return times of 0 and 1, taken in the order 0 1, 1 0, 0 1, …, so that drift within a pair favours neither."""
    times: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            times[which].append(take(which))
    return times


@contextlib.contextmanager
def checkout(revision: str, folder: Path) -> Iterator[Path]:
    """Context with a folder that holds `revision`'s package, with its native library built."""
    if revision == WORKING:
        yield ROOT
        return
    subprocess.run(
        ["git", "worktree", "add", "--detach", "--quiet", str(folder), revision], cwd=ROOT, check=True
    )
    try:
        _build(folder)
        yield folder
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(folder)], cwd=ROOT, check=True)


def _build(folder: Path) -> None:
    """Build in the worktree, or copy this checkout's library if the native sources are the same."""
    sources = ["csrc", "CMakeLists.txt", "setup.py"]
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
    )
    same = subprocess.run(
        ["git", "diff", "--quiet", head.stdout.strip(), "--", *sources], cwd=ROOT, check=False
    )
    if same.returncode == 0 and (ROOT / _LIBRARY).is_dir():
        shutil.copytree(ROOT / _LIBRARY, folder / _LIBRARY, dirs_exist_ok=True)
        return
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=folder,
        env={**os.environ, "PATH": path},
        check=True,
        stdout=subprocess.DEVNULL,
    )


def _probe(harness: Path, package: Path, arguments: Sequence[str]) -> float:
    path = os.pathsep.join([str(harness), str(package)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "bench.probe", *arguments],
        cwd=harness,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"bench.probe failed with {package}:\n{done.stderr.strip()[-1500:]}")
    return float(json.loads(done.stdout.strip().splitlines()[-1])["seconds"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.splitlines()[0])
    parser.add_argument("first", metavar="REV1", help=f"a commit, or {WORKING!r}")
    parser.add_argument("second", metavar="REV2", help=f"a commit, or {WORKING!r}")
    parser.add_argument("--cases", default="parakeet-lora,parakeet-full", help="default: %(default)s")
    parser.add_argument("--contender", default="dpkernels bookkeeping", help="default: %(default)s")
    parser.add_argument("--against", metavar="CONTENDER", help="REV2's contender, if it is another")
    parser.add_argument("--pairs", type=int, default=8, help="at least 6 for a verdict; default: %(default)s")
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--frames", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=5, help="steps a process; its median counts")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--processor-time", action="store_true", help="of all threads, in place of the wall clock"
    )
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        temporary = Path(name)
        harness = temporary / "harness"
        shutil.copytree(
            ROOT / "bench", harness / "bench", ignore=shutil.ignore_patterns("results", "__pycache__")
        )
        packages = [
            stack.enter_context(checkout(revision, temporary / f"rev{number}"))
            for number, revision in enumerate((options.first, options.second), 1)
        ]
        contenders = (options.contender, options.against or options.contender)
        unit = "processor time" if options.processor_time else "time"
        print(
            f"{unit} of {contenders[1]} at {options.second} over {contenders[0]} at {options.first}, median and 95 % "
            "interval:"
        )
        for case in options.cases.split(","):
            given: list[str] = []
            for field in ("size", "frames", "rounds", "threads", "device"):
                given += [f"--{field}", str(getattr(options, field))]
            if options.processor_time:
                given.append("--processor-time")
            first, second = alternate(
                options.pairs,
                lambda which, case=case, given=given: _probe(  # type: ignore[misc]
                    harness, packages[which], [case, contenders[which], *given]
                ),
            )
            print(f"  {case}: {compare(first, second)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
