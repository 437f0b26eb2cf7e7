"""One run of the benchmarks: its options, its verdicts, its rows, and how they reach pytest-benchmark's report.

pytest-benchmark has no public way to hand over samples that were taken elsewhere: its fixture times one function,
once a test, and here several contenders take turns inside a test. So each contender becomes a
`pytest_benchmark.stats.Metadata`, the type that the fixture itself appends to the session's list, filled through
its public `update`; the terminal table, --benchmark-json, --benchmark-save and --benchmark-compare then work as
ever. The one private name is the session's place on pytest's config (`_benchmarksession`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from pytest_benchmark.stats import Metadata

from bench.cases.models import Case, working_copy
from bench.contenders import CannotRun, Contender, Factory, Settings, compiled_pairs, fastdp, registry
from bench.harness import machine, memory
from bench.harness.checker import OK, Verdict, check
from bench.harness.floor import Ceilings, measure
from bench.harness.memory import Job, Server
from bench.harness.results import Results, Row, compare_rows
from bench.harness.timer import Samples, interleave, stopwatch
from bench.names import NON_PRIVATE


@dataclass
class Entry:
    """The fields of a fixture that `Metadata` reads: one contender's name and place in the report."""

    name: str
    fullname: str
    group: str
    params: dict[str, Any]
    extra_info: dict[str, Any]
    param: str | None = None
    cprofile_stats: Any = None
    has_error: bool = False


def counted_flops(contender: Contender) -> float:
    """FLOPs of the matrix products, convolutions and attention of one step: what the model itself needs."""
    from torch.utils.flop_counter import FlopCounterMode

    contender.prepare()
    with FlopCounterMode(display=False) as counter:
        contender.step()
    return float(counter.get_total_flops())


@dataclass
class Bench:
    """Options and results of a run.

    Attributes:
        device, dtype: where and in what the models run.
        quick: sizes that only show that everything works.
        rounds, seconds: at most so many rounds a case, and no new one after so many seconds of steps.
        model: whether the 608.8 M model runs.
    """

    config: pytest.Config
    device: str
    dtype: torch.dtype
    quick: bool
    rounds: int
    seconds: float
    model: bool
    results: dict[str, Results] = field(default_factory=dict)
    _verdicts: dict[tuple[str, int | None], dict[str, Verdict]] = field(default_factory=dict)
    _ceilings: Ceilings | None = None
    _server: Server | None = None
    _open: ExitStack = field(default_factory=ExitStack)

    @property
    def ceilings(self) -> Ceilings:
        """This machine's ceilings, measured once a run."""
        if self._ceilings is None:
            self._ceilings = measure(self.device, self.dtype, quick=self.quick)
        return self._ceilings

    def verdicts(self, case: Case, dtype: torch.dtype | None = None) -> dict[str, Verdict]:
        """Every contender's verdict on a small slice of the case: 3 utterances of 32 frames."""
        key = (case.name, case.rank)
        if key not in self._verdicts:
            self._verdicts[key] = self._checked(registry(), case, dtype)
        return self._verdicts[key]

    def _checked(
        self, known: Mapping[str, Factory], case: Case, dtype: torch.dtype | None = None
    ) -> dict[str, Verdict]:
        model = case.model(32, dtype or self.dtype, self.device)
        return check(known, case, model, case.batch(3, 32, dtype or self.dtype, self.device))

    def adopt(self, case: Case, verdicts: dict[str, Verdict]) -> None:
        """Use the verdicts of a smaller model with the same layers."""
        self._verdicts[case.name, case.rank] = verdicts

    def run(
        self,
        group: str,
        case: Case,
        size: int,
        frames: int,
        *,
        axis: str | None = None,
        settings: Settings | None = None,
        rounds: int | None = None,
        seconds: float | None = None,
        with_memory: bool = False,
        with_rates: bool = False,
        contenders: Sequence[str] = (),
        compiled: bool = False,
    ) -> list[Row]:
        """Check, time in turns and record contenders (all by default) on `size` utterances of `frames` frames.

        with_rates: also utterances a second, and the share of the matrix rate that the model's own FLOPs come to.
        compiled: `contenders.compiled_pairs` take the place of the others.
        """
        shape = {"B": size, "T": frames} | ({} if case.rank is None else {"r": case.rank})
        known = compiled_pairs() if compiled else registry()
        verdicts = self._checked(known, case) if compiled else self.verdicts(case)
        if contenders:
            verdicts = {name: verdicts[name] for name in contenders}
        rows = {
            name: Row(case.name, case.title, shape, name, axis, v.status, v.reason, v.error)
            for name, v in verdicts.items()
        }
        for row in rows.values():
            if row.error is not None:
                row.error = float(f"{row.error:.1e}")
        model = case.model(frames, self.dtype, self.device)
        batch = case.batch(size, frames, self.dtype, self.device)
        runners: dict[str, Contender] = {}
        for name, factory in known.items():
            if name not in verdicts or verdicts[name].status != OK:
                continue
            try:
                runners[name] = factory(case, working_copy(model), batch, settings or Settings())
                runners[name].prepare()
            except CannotRun as failure:
                rows[name].status, rows[name].reason = "cannot run", str(failure)
                runners.pop(name, None)
        taken = interleave(
            runners,
            rounds=rounds or self.rounds,
            seconds=self.seconds if seconds is None else seconds,
            least=2 if self.quick else 3,
            measure=stopwatch(self.device),
        )
        for name, samples in taken.items():
            rows[name].timed(samples)
        if with_memory:
            self._add_memory(rows, runners, case, size, frames)
        if with_rates and NON_PRIVATE in runners:
            flops = counted_flops(runners[NON_PRIVATE])
            for name, samples in taken.items():
                rows[name].rate = round(size / samples.median, 1)
                rows[name].matrix_share = round(flops / samples.median / self.ceilings.flops, 4)
        results = list(rows.values())
        compare_rows(results)
        self.record(group, results, taken)
        return results

    def _add_memory(
        self, rows: Mapping[str, Row], runners: Mapping[str, Contender], case: Case, size: int, frames: int
    ) -> None:
        if self.device.startswith("cuda"):
            for name, runner in runners.items():
                runner.prepare()
                rows[name].peak_mib = round(memory.cuda_peak(runner.step), 1)
            return
        for name in runners:
            rows[name].peak_mib = self.peak(case, name, size, frames)

    def peak(self, case: Case, contender: str, size: int, frames: int) -> float | None:
        """Peak MiB of a step on the CPU, in a fresh process with this run's threads."""
        if self._server is None:
            self._server = self._open.enter_context(Server())
        return self._server.peak(Job(case.name, contender, size, frames, case.rank, torch.get_num_threads()))

    def close(self) -> None:
        """End the process that measures memory."""
        self._open.close()

    def record(self, group: str, rows: Iterable[Row], taken: Mapping[str, Samples]) -> None:
        """Store rows, and pass those with samples (by contender) to pytest-benchmark."""
        if group not in self.results:
            about = machine.about(self.device)
            if fastdp.folder() is not None:
                about["versions"][fastdp.PACKAGE] = fastdp.version()
            self.results[group] = Results(group, about)
        for row in rows:
            self.results[group].rows.append(row)
            if row.contender in taken:
                self._report(group, row, taken[row.contender])

    def _report(self, group: str, row: Row, samples: Samples) -> None:
        session = self.config._benchmarksession  # type: ignore[attr-defined]
        place = " ".join(f"{name}={value}" for name, value in row.shape.items())
        info = {
            name: getattr(row, name) for name in ("ratio", "over_ghost", "over_hooks", "peak_mib", "error")
        }
        entry = Entry(
            name=row.contender,
            fullname=f"bench/{group}::{row.case}[{place}]::{row.contender}",
            group=f"{group}: {row.title}, {place}",
            params=dict(row.shape),
            extra_info={name: value for name, value in info.items() if value is not None},
        )
        stats = Metadata(entry, iterations=1, options={"rounds": len(samples.seconds), "interleaved": True})
        for duration in samples.seconds:
            stats.update(duration)
        session.benchmarks.append(stats)
