"""Results: rows of one schema, one JSON file a device and group under bench/results."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from bench.harness.checker import OK
from bench.harness.quiet import verdict
from bench.harness.timer import Samples
from bench.names import NON_PRIVATE, OPACUS_GHOST, OPACUS_HOOKS

FOLDER = Path(__file__).resolve().parents[1] / "results"
GROUPS = ("ops", "layers", "step", "model", "transducer", "transducer_growth", "opacus")


@dataclass
class Row:
    """One contender of one case.

    Attributes:
        case, title: what was run; title is for people.
        shape: {"B": 8, "T": 150, …}.
        axis: None for the case itself; "T", "batch", "rank", "U" or "V" for a point of a growth curve.
        contender: its name.
        status, reason, error: see `bench.harness.checker.Verdict`.
        median_ms, iqr_ms, rounds: of the timed steps.
        others: cores that other processes took from them (`bench.harness.quiet`).
        ratio: median over the non-private one's (ops: over plain PyTorch's; transducer: over the products').
        over_ghost, over_hooks: how many times faster than Opacus.
        peak_mib: peak memory beyond what was there before the step.
        memory_ratio: peak over the non-private one's.
        largest_batch, limit_mib: the largest physical batch within that much memory.
        rate: utterances a second.
        matrix_share: the model's own FLOPs a second, counted on the non-private step, over the rate of a large matrix
            product measured in this run.
        floor_share: the floor (bench.harness.floor) over the median: 1 is the best that this machine could do.
    """

    case: str
    title: str
    shape: dict[str, int]
    contender: str
    axis: str | None = None
    status: str = OK
    reason: str = ""
    error: float | None = None
    median_ms: float | None = None
    iqr_ms: float | None = None
    rounds: int | None = None
    others: float | None = None
    ratio: float | None = None
    over_ghost: float | None = None
    over_hooks: float | None = None
    peak_mib: float | None = None
    memory_ratio: float | None = None
    largest_batch: int | None = None
    limit_mib: int | None = None
    rate: float | None = None
    matrix_share: float | None = None
    floor_share: float | None = None

    @property
    def place(self) -> tuple[Any, ...]:
        """The key that rows share if they are compared with each other."""
        return self.case, self.axis, tuple(sorted(self.shape.items()))

    @property
    def spread(self) -> float | None:
        """IQR over median; None without times, or with too few to tell."""
        if self.median_ms is None or self.iqr_ms is None or (self.rounds or 0) < 3:
            return None
        return self.iqr_ms / self.median_ms if self.median_ms > 0 else None

    def timed(self, samples: Samples) -> Row:
        """Add the times; returns self."""
        self.median_ms = round(samples.median * 1e3, 4)
        self.iqr_ms = round(samples.iqr * 1e3, 4)
        self.rounds, self.others = len(samples.seconds), samples.others
        return self


@dataclass
class Results:
    """A results file."""

    group: str
    about: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def places(self) -> dict[object, list[Row]]:
        """The rows by place: those that took turns."""
        places: dict[object, list[Row]] = {}
        for row in self.rows:
            places.setdefault(row.place, []).append(row)
        return places

    def disturbed(self) -> dict[object, str]:
        """The places whose figures are worth nothing, with the reason."""
        verdicts = {
            place: verdict(rows, self.about.get("threads", 1)) for place, rows in self.places().items()
        }
        return {place: reason for place, reason in verdicts.items() if reason}

    def save(self, folder: Path = FOLDER) -> Path:
        """Write <folder>/<device slug>/<group>.json."""
        path = folder / self.about["slug"] / f"{self.group}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{k: v for k, v in asdict(row).items() if v not in (None, "")} for row in self.rows]
        # One row a line, so that a new run is a readable diff.
        lines = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in rows)
        about = json.dumps(self.about, indent=2, ensure_ascii=False).replace("\n", "\n ")
        path.write_text(
            f'{{\n "group": "{self.group}",\n "about": {about},\n "rows": [\n  {lines}\n ]\n}}\n',
            encoding="utf-8",
        )
        return path


def load(path: Path) -> Results:
    """Read what `Results.save` wrote; fields that this version does not know are dropped."""
    saved = json.loads(path.read_text(encoding="utf-8"))
    known = {f.name for f in fields(Row)}
    rows = [Row(**{k: v for k, v in row.items() if k in known}) for row in saved["rows"]]
    return Results(saved["group"], saved["about"], rows)


def compare_rows(rows: Iterable[Row], base: str = NON_PRIVATE) -> None:
    """Fill in ratios between rows of one place, in place. A contender without a time gets none."""
    rows = list(rows)
    by_place: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        by_place.setdefault(row.place, {})[row.contender] = row
    for row in rows:
        others = by_place[row.place]
        row.ratio = _quotient(row, others.get(base), "median_ms", 3)
        row.memory_ratio = _quotient(row, others.get(base), "peak_mib", 3)
        row.over_ghost = _quotient(others.get(OPACUS_GHOST), row, "median_ms", 2)
        row.over_hooks = _quotient(others.get(OPACUS_HOOKS), row, "median_ms", 2)


def _quotient(above: Row | None, below: Row | None, name: str, digits: int) -> float | None:
    top, bottom = getattr(above, name, None), getattr(below, name, None)
    return round(top / bottom, digits) if top is not None and bottom else None
