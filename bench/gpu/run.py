"""The jobs of a machine with a GPU: build, every test that needs a GPU, the benchmarks, in parts of ten minutes.

    WHEELS=build/wheels OUT=/tmp/out python -m bench.gpu.run                  all parts, one after the other
    WHEELS=build/wheels OUT=/tmp/out python -m bench.gpu.run wheels build ops  some of them, in this order
    python -m bench.gpu.run --dry-run                                  the command of each part, here

The machine needs Python 3.12 with torch 2.11+cu130, triton 3.6, transformers, peft, pytest, setuptools, cmake and
ninja, and nvcc; no package registry: what is missing comes from the folder WHEELS, which `make wheels` fills where
there is one. Results go to $OUT as they would to bench/results.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WHEEL_LIST = "bench/gpu_wheels.txt"
_NOTHING_COLLECTED = 5  # pytest's exit status


@dataclass(frozen=True)
class Part:
    """One part: its command, its limit in minutes, and exit statuses besides 0 that are no failure."""

    name: str
    command: tuple[str, ...]
    minutes: int
    also_fine: tuple[int, ...] = ()


def parts(wheels: str, out: str, python: str = sys.executable) -> list[Part]:
    """All parts, in the order in which they depend on each other."""
    pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps")
    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    torchrun = (python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
    jobs = [
        Part("wheels", (*pip, "--no-index", "--find-links", wheels, "-r", WHEEL_LIST), 3),
        Part("build", (*pip, "--no-build-isolation", "."), 8),
        # Tests and benchmarks run in the checkout, whose package shadows the installed one: it needs the library too.
        Part("build-inplace", (python, "setup.py", "--quiet", "build_ext", "--inplace"), 8),
        Part("diagnose", (python, "-m", "dpkernels"), 1),
        Part("tensor-cores", (python, "-m", "bench.gpu.tensor_cores"), 2),
        Part("gpu-tests", (*pytest, "-m", "gpu", "tests"), 9, (_NOTHING_COLLECTED,)),
        Part("op-tests", (*pytest, "-m", "not gpu", "tests/ops", "tests/nn"), 9),
        *(
            Part(
                tool,
                (
                    "compute-sanitizer",
                    "--tool",
                    tool,
                    "--error-exitcode=1",
                    python,
                    "-m",
                    "bench.gpu.sanitize",
                ),
                5,
            )
            for tool in ("memcheck", "racecheck")
        ),
        Part("tune", (python, "-m", "bench.gpu.tune", f"--output={out}"), 4),
        Part("peaks", (python, "-m", "bench.asr.peaks", "--device", "cuda", f"--output={out}/peaks.json"), 3),
        Part("optim", (python, "-m", "bench.gpu.optim"), 3),
        Part("transducer", (python, "-m", "bench.gpu.transducer"), 5),
        # Several processes with one GPU: NCCL in a group of one; two that share the GPU.
        Part("ranks", (*torchrun, "1", "-m", "bench.gpu.ranks"), 3),
        Part("ranks-shared", (*torchrun, "2", "-m", "bench.gpu.ranks"), 3),
        Part("recipes", (python, "-m", "bench.asr.recipes", "--batch", "256"), 9),
        Part("largest", (python, "-m", "bench.asr.largest", f"--output={out}/largest.json"), 5),
        Part("normals", (python, "-m", "bench.gpu.normals", "--device", "cuda", "--draws", "1e10"), 3),
    ]
    for group in ("ops", "layers", "step", "model"):
        command = (*pytest, "--benchmark", "--benchmark-device", "cuda", "--benchmark-groups", group)
        jobs.append(Part(group, (*command, f"--benchmark-output={out}"), 9))
    return jobs


def refusal() -> str | None:
    """Return why this machine cannot run the parts, with the fix; None if it can."""
    try:
        import torch
    except ImportError:
        return f"{sys.executable} has no torch; fix: use the Python that holds torch 2.11+cu130"
    if not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} sees no CUDA device; fix: run this on a machine with a GPU and a CUDA build "
            "of torch, or print what it would run with --dry-run"
        )
    return None


def run(part: Part) -> bool:
    """Run one part within its limit, and return whether it succeeded."""
    print(f"== {part.name}: {shlex.join(part.command)}", flush=True)
    start = time.monotonic()
    try:
        status = subprocess.run(part.command, cwd=ROOT, timeout=60 * part.minutes, check=False).returncode
    except subprocess.TimeoutExpired:
        print(f"== {part.name}: stopped after its {part.minutes} minutes", flush=True)
        return False
    good = status == 0 or status in part.also_fine
    note = "" if status in (0, 1) else f" (exit status {status})"
    print(
        f"== {part.name}: {'done' if good else 'FAILED'}{note} in {time.monotonic() - start:.0f} s",
        flush=True,
    )
    return good


def main(arguments: Sequence[str] | None = None) -> int:
    wheels, out = os.environ.get("WHEELS", "build/wheels"), os.environ.get("OUT", "bench/results")
    known = parts(wheels, out)
    names = [part.name for part in known]
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(names)}; default: all")
    parser.add_argument("--dry-run", action="store_true", help="print the command of each part, run nothing")
    options = parser.parse_args(arguments)
    unknown = set(options.parts) - set(names)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; the parts are {', '.join(names)}")
    chosen = [part for part in known if not options.parts or part.name in options.parts]
    if options.dry_run:
        for part in chosen:
            print(f"{part.name} (at most {part.minutes} min): {shlex.join(part.command)}")
        return 0
    reason = refusal()
    if reason:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    if any(part.name == "wheels" for part in chosen) and not Path(wheels).is_dir():
        print(
            f"error: WHEELS={wheels} is no folder; fix: `make wheels` where pip has an index",
            file=sys.stderr,
        )
        return 2
    results = {part.name: run(part) for part in chosen}
    failed = [name for name, good in results.items() if not good]
    print(
        f"== {len(results) - len(failed)} of {len(results)} parts done"
        + (f"; failed: {failed}" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
