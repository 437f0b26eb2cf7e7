"""Peak memory of a step: resident memory of a fresh process on a CPU, torch's own count on a GPU.

A CPU's figure is the peak of the resident set during two steps (the second has AdamW's state beside the
activations) minus what was resident before the first: model and batch are not in it, gradients, optimizer state
and whatever the contender keeps are. Every measurement is a process of its own, forked from a server that has
imported everything and computed nothing, so that no contender inherits another's heap.

    echo '{"case": "tiny-lora", "contender": "non-private", "size": 2, "frames": 32}' | python -m bench.harness.memory
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import nn

from bench.cases.models import CASES
from bench.contenders import CannotRun, Settings, registry
from bench.harness.machine import ROOT
from bench.harness.resident import resident_peak


@dataclass(frozen=True)
class Job:
    """One measurement: a contender's step on `size` utterances of `frames` encoder frames; LoRA of `rank`."""

    case: str
    contender: str
    size: int
    frames: int
    rank: int | None = None
    threads: int = 1


class Server:
    """The process that measurements are forked from; close it by leaving the `with`."""

    def __enter__(self) -> Server:
        command = [sys.executable, "-W", "ignore", "-m", "bench.harness.memory"]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def peak(self, job: Job) -> float | None:
        """Return the peak MiB of a job on the CPU; None if the contender cannot run or its process died.

        Raises:
            RuntimeError: the server itself died.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(asdict(job)) + "\n")
        line = stdout.readline()
        if not line:
            raise RuntimeError("python -m bench.harness.memory died; its standard error has the reason")
        peak: float | None = json.loads(line)["mib"]
        return peak


def largest_batch(peak: Callable[[int], float | None], limit: float, *, most: int = 256) -> int:
    """The largest batch whose `peak` is within `limit`: by doubling, then halving steps to a quarter of it.

    0 where not even one example fits; at most `most`.
    """

    def fits(size: int) -> bool:
        mib = peak(size)
        return mib is not None and mib <= limit

    if not fits(1):
        return 0
    good = 1
    while good < most and fits(2 * good):
        good *= 2
    step = good // 2
    start = good
    while good < most and step >= max(1, start // 4):
        if fits(good + step):
            good += step
        step //= 2
    return good


def cuda_peak(step: Callable[[], None]) -> float:
    """Peak MiB that torch's allocator handed out during `step` beyond what it had before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _touch() -> None:
    """Load the libraries of a first step (BLAS, convolutions, the thread pool), so that no peak includes them."""
    model = nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.Linear(64, 64))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 8, 64)).sum().backward()
    optimizer.step()


def _measure(job: Job) -> float | None:
    torch.set_num_threads(job.threads)
    case = CASES[job.case] if job.rank is None else CASES[job.case].at_rank(job.rank)
    _touch()
    try:
        contender = registry()[job.contender](
            case, case.model(job.frames), case.batch(job.size, job.frames), Settings()
        )

        def two_steps() -> None:
            for _ in range(2):
                contender.prepare()
                contender.step()

        return resident_peak(two_steps)
    except CannotRun:
        return None


def _in_a_fork(job: Job) -> float | None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        code = 1
        try:
            os.write(writer, json.dumps(_measure(job)).encode())
            code = 0
        finally:
            os._exit(code)  # no destructors, and never the parent's loop
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        answer = stream.read()
    os.waitpid(child, 0)
    value: float | None = json.loads(answer) if answer else None
    return value


if __name__ == "__main__":
    registry()  # imports every library, and computes nothing
    for request in sys.stdin:
        print(json.dumps({"mib": _in_a_fork(Job(**json.loads(request)))}), flush=True)
