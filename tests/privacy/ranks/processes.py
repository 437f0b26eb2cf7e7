"""Processes of one group, which stay for a session and do what a test asks of them."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PROCESSES = 4
WAIT = 60.0


class JobFailed(AssertionError):
    """A job raised, where the test did not expect it."""


class Processes:
    """Processes with a gloo group each of the first 1, 2, ... of them.

    Args:
        folder: where they meet.
        count: how many.
        wait: seconds within which a job ends, or the test fails.
    """

    def __init__(self, folder: Path, count: int = PROCESSES, *, wait: float = WAIT) -> None:
        self._wait = wait
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "dpkernels.privacy", "tests.privacy.private_run"])
        self._pipes: list[Connection] = []
        self.processes = []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, count, str(folder / "store"), theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def run(self, job: Callable[..., Any], size: int, /, *arguments: Any, **keywords: Any) -> list[Any]:
        """job(rank, group, *arguments, **keywords) on the first `size` processes; its results, or what it raised."""
        for pipe in self._pipes[:size]:
            pipe.send((job.__module__, job.__qualname__, size, arguments, keywords))
        results = []
        for rank, pipe in enumerate(self._pipes[:size]):
            if not pipe.poll(self._wait):
                raise JobFailed(f"rank {rank} hangs in {job.__qualname__}")
            try:
                results.append(pipe.recv())
            except EOFError:
                results.append(None)  # it was killed
        return results

    def results(self, job: Callable[..., Any], size: int, /, *arguments: Any, **keywords: Any) -> list[Any]:
        """As `run`; no rank may raise."""
        results = self.run(job, size, *arguments, **keywords)
        for rank, result in enumerate(results):
            if isinstance(result, Failure):
                raise JobFailed(f"rank {rank} raised {result}")
        return results

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            process.join(5)
            process.kill()


class Failure:
    """What a job raised: its type's name, its message, the traceback."""

    def __init__(self, error: BaseException) -> None:
        self.kind = type(error).__name__
        self.message = str(error)
        self.trace = "".join(traceback.format_exception(error))

    def __repr__(self) -> str:
        return f"{self.kind}: {self.message}\n{self.trace}"


def _serve(rank: int, count: int, store: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, count),
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=WAIT / 2),
    )
    groups = {size: dist.new_group(list(range(size))) for size in range(1, count + 1)}
    while True:
        try:
            module, name, size, arguments, keywords = pipe.recv()
        except EOFError:
            return
        try:
            job = getattr(importlib.import_module(module), name)
            torch.manual_seed(rank)  # ranks are seeded apart, as they are where nobody seeds them
            result = job(rank, groups[size], *arguments, **keywords)
        except Exception as error:  # noqa: BLE001  the test decides
            result = Failure(error)
        pipe.send(result)
