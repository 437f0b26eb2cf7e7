"""Runs cases one after the other, remembers how far it came, and says how to repeat one that fails."""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.draw import Draw

Kind = tuple[str, Callable[[Draw], None], int]
STOPPED, RUNNING = "stopped", "running"
_NOTES = 3000  # characters


@dataclass(frozen=True)
class Failure:
    """A case that failed: its number and kind, what it drew, and what is wrong."""

    case: int
    kind: str
    notes: str
    reason: str

    def __str__(self) -> str:
        return f"case {self.case} ({self.kind}): {self.reason}\n  drawn: {self.notes}"


@dataclass
class Fuzzer:
    """Cases of some kinds from one seed.

    Attributes:
        kinds: (name, check, share) of each kind.
        seed: of all cases.
        counts: of the cases that ran, by kind.
        failures: those that failed.
    """

    kinds: Sequence[Kind]
    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)

    def run(self, case: int) -> Failure | None:
        """One case; None if nothing is wrong."""
        draw = Draw(self.seed, case)
        shares = [share for _, _, share in self.kinds]
        place = int(draw.rng.choice(len(shares), p=[share / sum(shares) for share in shares]))
        name, check, _ = self.kinds[place]
        self.counts[name] += 1
        try:
            check(draw)
        except Exception as error:  # noqa: BLE001 - whatever a kernel or a reader raises is a finding
            frame = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
            failure = Failure(case, name, str(draw.notes)[:_NOTES], reason[:_NOTES])
            self.failures.append(failure)
            return failure
        return None


class Journal:
    """The file that says which case runs: after a crash of the process it names the case that crashed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> tuple[int, bool]:
        """(the first case to run, whether the one before it ended the process)."""
        if not self.path.is_file():
            return 0, False
        number, state = self.path.read_text(encoding="utf-8").split()
        return int(number) + (state == RUNNING), state == RUNNING

    @contextlib.contextmanager
    def written(self) -> Iterator[Callable[[int], None]]:
        """Within it the given function notes the number of the case that is about to run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        number = 0
        with self.path.open("w", encoding="utf-8") as file:

            def note(case: int, state: str = RUNNING) -> None:
                nonlocal number
                number = case
                file.seek(0)
                file.write(f"{case:<12} {state}")
                file.flush()

            try:
                yield note
            finally:  # not where the process ended within a case
                note(number, STOPPED)
