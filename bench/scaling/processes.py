"""Processes that take turns: one alone, and all together on batches of the same size each, or in all.

Within a round every way takes one step, so that each round gives a pair of times of one moment. Results are checked
first: the sums of R processes are compared with those of one.
"""

from __future__ import annotations

import itertools
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bench.cases.models import CASES, trained, working_copy
from bench.compare import compare
from bench.contenders.base import Settings
from bench.contenders.own import Private
from bench.harness.timer import Runner, Samples, interleave
from bench.scaling.traffic import Plan, Watch, plan, socket_bytes, watched
from dpkernels.privacy.ranks.group import STEP

ALONE, WEAK, STRONG = "one process", "weak", "strong"
ALLOWED = 1e-5  # of a clipped sum's norm: float32 forwards of other batch sizes
_MEETINGS = 200

Entry = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A case, the batch of one process, its length, and how many rounds are timed."""

    case: str
    size: int
    frames: int
    rounds: int


class _Waits:
    """The turn of a process that has no part in it."""

    def prepare(self) -> None:
        """Nothing."""

    def step(self) -> None:
        """Nothing."""


def run(rank: int, processes: int, folder: str, jobs: list[Job]) -> None:
    """One process of the measurement; rank 0 writes the rows to `folder`/rows.json."""
    warnings.simplefilter("ignore")  # of the libraries, and of a run without a self-check
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", processes)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=processes, timeout=timedelta(minutes=10)
    )
    alone = dist.new_group([0])
    rows = [row for job in jobs for row in measure(job, rank, processes, alone)]
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def measure(job: Job, rank: int, processes: int, alone: dist.ProcessGroup) -> list[Entry]:
    """The rows of a case: one process, and all of them with the same batch each (weak) and in all (strong)."""
    case = CASES[job.case]
    model = case.model(job.frames)
    sizes = {ALONE: job.size, WEAK: job.size * processes, STRONG: job.size}

    def runner(way: str, settings: Settings) -> Private | None:
        if way == ALONE and rank:
            return None
        batch = case.batch(sizes[way], job.frames)
        group = alone if way == ALONE else dist.group.WORLD
        return Private(
            case, working_copy(model), batch, settings, strategy="bookkeeping", process_group=group
        )

    error = _error(lambda settings: runner(ALONE, settings), lambda settings: runner(STRONG, settings))
    runners = {way: runner(way, Settings()) for way in sizes}
    seconds, busy = _turns(runners, job.rounds)
    own = {way: _inside(one) for way, one in runners.items() if way != ALONE and one is not None}
    if rank:
        return []
    expected = plan(list(trained(model).values()), processes)
    rows = []
    for way, size in sizes.items():
        samples = Samples(tuple(seconds[way]))
        row: Entry = {
            "case": case.name,
            "title": case.title,
            "way": way,
            "processes": 1 if way == ALONE else processes,
            "shape": {"B": size, "T": job.frames} | ({} if case.rank is None else {"r": case.rank}),
            "entries": expected.entries,
            "median_ms": round(samples.median * 1e3, 2),
            "iqr_ms": round(samples.iqr * 1e3, 2),
            "cpu_ms": round(Samples(tuple(busy[way])).median * 1e3, 2),
            "rounds": len(samples.seconds),
        }
        if way != ALONE:
            pairs = compare(seconds[ALONE], seconds[way])
            row |= {"ratio": round(pairs.ratio, 3), "low": round(pairs.low, 3), "high": round(pairs.high, 3)}
            row |= {"error": float(f"{error:.1e}"), **own[way], **_planned(expected)}
        rows.append(row)
    return rows


def _planned(expected: Plan) -> Entry:
    return {
        "pieces": expected.pieces,
        "planned_in": expected.bytes_in(),
        "planned_out": expected.bytes_out(),
        "planned_sent": round(expected.sent()),
    }


def _error(
    alone: Callable[[Settings], Private | None], together: Callable[[Settings], Private | None]
) -> float:
    """How far the clipped sum of all processes is from that of one, relative to its norm; rank 0's result.

    Raises:
        RuntimeError: on rank 0, if it is too far: a wrong result has no time.
    """
    exact = Settings(noise=0.0, lr=0.0, optimizer="sgd")
    sums = []
    for made in (alone(exact), together(exact)):
        if made is not None:
            made.prepare()
            made.step()
            sums.append(torch.cat([part.flatten().double() for part in made.released().values()]))
    if len(sums) < 2:
        return 0.0
    error = float((sums[1] - sums[0]).norm() / sums[0].norm())
    if not error <= ALLOWED:
        raise RuntimeError(f"the sums of several processes are off by {error:.1e} of those of one")
    return error


def _turns(runners: dict[str, Private | None], rounds: int) -> tuple[dict[str, list[float]], ...]:
    """Seconds of every way's steps, by the slowest process, and the CPU seconds of rank 0; on rank 0."""
    busy: dict[str, list[float]] = {way: [] for way in runners}
    order = itertools.cycle(runners)

    def together(step: Callable[[], None]) -> float:
        dist.barrier()
        cpu, start = time.process_time(), time.perf_counter()
        step()
        elapsed = time.perf_counter() - start
        busy[next(order)].append(time.process_time() - cpu)
        return elapsed

    turns: dict[str, Runner] = {way: _Waits() if one is None else one for way, one in runners.items()}
    taken = interleave(turns, rounds=rounds, measure=together)
    mine = {way: samples.seconds for way, samples in taken.items()}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    slowest = {way: [max(times) for times in zip(*(of[way] for of in everyone), strict=True)] for way in mine}
    return slowest, busy


def _inside(runner: Private, steps: int = 3) -> Entry:
    """What a step of all processes sends, and where its time goes on this one (medians); a collective operation."""
    entries: list[Entry] = []
    with watched(runner.optimizer) as watch:
        for _ in range(steps):
            runner.prepare()
            watch.clear()
            dist.barrier()
            before, start = socket_bytes(), time.perf_counter()
            runner.step()
            elapsed, after = time.perf_counter() - start, socket_bytes()
            entries.append(_entry(watch, elapsed, None if before is None else (after or 0) - before))
    middle = sorted(entries, key=lambda entry: float(entry["step_ms"]))[len(entries) // 2]
    return middle | {"meeting_ms": round(1e3 * _meeting(runner), 3)}


def _entry(watch: Watch, elapsed: float, sent: int | None) -> Entry:
    return {
        "step_ms": round(1e3 * elapsed, 2),
        "given_in": watch.given.get("sums", 0),
        "given_out": watch.given.get("results", 0),
        "rounds_of_exchange": watch.calls.get("sums", 0),
        "sent": sent,
        "facts": watch.calls.get("facts", 0),
        **{f"{name}_ms": round(1e3 * watch.seconds.get(name, 0.0), 2) for name in ("facts", "in", "out")},
    }


def _meeting(runner: Private) -> float:
    """Seconds of the two meetings of a step (nobody refuses; the step is counted) where nobody is late."""
    ranks = runner.optimizer._ranks
    dist.barrier()
    start = time.perf_counter()
    for _ in range(_MEETINGS):
        with ranks.meeting(STEP, runner.optimizer._facts):
            pass
        ranks.first(lambda: None)
    return (time.perf_counter() - start) / _MEETINGS
