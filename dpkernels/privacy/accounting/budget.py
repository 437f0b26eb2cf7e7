"""The privacy budget: the steps spent, each on disk before it is applied, and the check of the next one."""

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpkernels.errors import UserError
from dpkernels.privacy.accounting.accountant import Mechanism, check_delta, composed_epsilon
from dpkernels.privacy.accounting.earlier_runs import Runs, SpentRuns, lacking
from dpkernels.privacy.accounting.ledger import Ledger, LedgerContents, LedgerError, read_ledger
from dpkernels.privacy.ranks.group import SET_UP, Ranks
from dpkernels.privacy.sampling.plan import Sampling

# ε is compared with the target this many steps ahead: one composition then serves many steps.
_LOOK_AHEAD = 64


class BudgetExhausted(UserError, RuntimeError):
    """The next step would exceed target_epsilon. Nothing was spent by the step that raised it."""


class Budget:
    """The steps spent by this run and by earlier ones, and the target that limits them.

    Every run has a random name, so that a run in both a ledger and a checkpoint counts once, with the larger number of
    steps.

    Args:
        sampling: the run's public constants.
        mechanism: the mechanism of each of its steps.
        accountant: "pld" or "rdp".
        target_epsilon: ε > 0 that is never exceeded, or None.
        target_delta: its δ in (0, 1); not None if there is a target.
        planned_steps: total steps, if known; the first number that is compared with the target.
        ledger: path of the ledger, or None to count in memory.
        settings: further entries of the ledger's run line.
        ranks: the processes of the run. Rank 0 alone checks the target and writes the ledger; the others count with it.
        earlier: runs of this process on the same parameters (`earlier_runs`), which count, too.

    Attributes:
        spent: what this run and those before it have spent, kept up to date.

    Raises:
        LedgerError: the ledger is damaged, locked, belongs to another data set, or lacks steps of earlier runs.
    """

    def __init__(
        self,
        sampling: Sampling,
        mechanism: Mechanism,
        accountant: str,
        *,
        target_epsilon: float | None,
        target_delta: float | None,
        planned_steps: int | None,
        ledger: str | os.PathLike[str] | None,
        settings: dict[str, Any],
        ranks: Ranks | None = None,
        earlier: Mapping[str, tuple[Mechanism, int]] | None = None,
    ) -> None:
        self.sampling = sampling
        self.mechanism = mechanism
        self.accountant = accountant
        self.target_epsilon = target_epsilon
        self.target_delta = target_delta
        self._planned_steps = planned_steps
        self._pid = os.getpid()
        self._ranks = Ranks() if ranks is None else ranks
        self._run = os.urandom(8).hex()
        self._runs: Runs = {}
        self._earlier: Runs = dict(earlier or {})
        self._unplanned: set[str] = set()  # runs whose steps are none of `steps`, the planned total
        self.spent = SpentRuns(sampling.unit, self._runs)
        self._safe_steps = 0
        self._look_ahead = _LOOK_AHEAD
        self._reported: set[tuple[int, float, str]] = set()
        self._missed_ledgers: set[str] = set()  # of checkpoints, by their last line: warned of once
        self._ledger: Ledger | None = None
        self._ledger_hash: str | None = None
        with self._ranks.meeting(SET_UP):
            seen = _contents(ledger)
        others = self._ranks.gathered(seen if seen is None else seen.last_hash)

        def open_ledger() -> None:
            _check_longest(ledger, seen, others)
            _check_has_earlier(ledger, seen, self._earlier)
            self._open(ledger, settings)

        self._counted(open_ledger)

    def _open(self, ledger: str | os.PathLike[str] | None, settings: dict[str, Any]) -> None:
        """Open the ledger, if there is one, and count what it holds."""
        if ledger is not None:
            constants = {
                "run": self._run,
                "unit": self.sampling.unit,
                "dataset_size": self.sampling.units,
                "adjacency": f"add or remove one {self.sampling.unit}",
                "sampling": self.mechanism.sampling,
                "mechanism": self.mechanism.to_dict(),
                "accountant": self.accountant,
                "target_epsilon": self.target_epsilon,
                "target_delta": self.target_delta,
                "planned_steps": self._planned_steps,
            }
            self._ledger = Ledger(ledger, constants | settings)
            try:
                for run in self._ledger.previous_runs:
                    self._runs[run.id] = (run.mechanism, run.steps)
            except BaseException:
                self._ledger.close()
                raise
        else:
            self._runs.update(self._earlier)
            self._unplanned = set(self._earlier)
        self._runs[self._run] = (self.mechanism, 0 if self._ledger is None else self._ledger.run.steps)

    def _counted(self, count: Callable[[], None]) -> None:
        """Call `count` on rank 0, and take over what rank 0 then counts. Every rank raises what it raised."""

        def counted() -> tuple[str, Runs, set[str], str | None]:
            count()
            last = None if self._ledger is None else self._ledger.last_hash
            return self._run, self._runs, self._unplanned, last

        self._run, self._runs, self._unplanned, self._ledger_hash = self._ranks.first(counted)
        self.spent.runs = self._runs

    @property
    def steps(self) -> int:
        """Steps spent so far, including earlier runs."""
        return sum(steps for _, steps in self._runs.values())

    @property
    def planned_steps_taken(self) -> int:
        """Those of `steps` that count towards the planned total: not those of `earlier` runs that no ledger holds."""
        return sum(steps for run, (_, steps) in self._runs.items() if run not in self._unplanned)

    @property
    def unplanned_steps(self) -> int:
        """The other ones of `steps`."""
        return self.steps - self.planned_steps_taken

    @property
    def history(self) -> list[tuple[Mechanism, int]]:
        """The mechanism and the number of spent steps of every run."""
        return list(self._runs.values())

    def epsilon(self, delta: float, accountant: str | None = None) -> float:
        """ε spent so far at δ. Written to the ledger, once for each number of steps. Warns if δ > 0.1/N."""
        check_delta(delta, self.sampling.units)
        name = self.accountant if accountant is None else accountant
        value = composed_epsilon(self.history, delta, accountant=name)
        if self._ledger is not None and (self.steps, delta, name) not in self._reported:
            self._ledger.note_epsilon(value, delta, name, self.steps)
            self._reported.add((self.steps, delta, name))
        return value

    def spend(self) -> None:
        """Count one step, on disk if there is a ledger, and on all ranks.

        Raises:
            BudgetExhausted: the step would exceed the target; nothing is spent.
            LedgerError: the step could not be written to the ledger, for example because it is closed.
            RuntimeError: in a forked process.
        """
        if os.getpid() != self._pid:
            raise RuntimeError(
                "this process was forked from the one that called make_private: each of the two would count only "
                "its own steps. Train in one of them, and call make_private there."
            )
        self._counted(self._spend)

    def _spend(self) -> None:
        taken = self._runs[self._run][1]
        if self.target_epsilon is not None and not self._fits(taken + 1):
            raise BudgetExhausted(
                f"the next step would exceed target_epsilon={self.target_epsilon} at "
                f"delta={self.target_delta} after {self.steps} steps (earlier runs included). Nothing was spent or "
                "changed; stop training here."
            )
        if self._ledger is not None:
            self._ledger.spend_step()
        self._runs[self._run] = (self.mechanism, taken + 1)

    def state_dict(self) -> dict[str, Any]:
        """The spent steps as plain values, without keys, for a checkpoint."""
        runs = {
            run: {"mechanism": step.to_dict(), "steps": count} for run, (step, count) in self._runs.items()
        }
        return {
            "unit": self.sampling.unit,
            "dataset_size": self.sampling.units,
            "runs": runs,
            "unplanned": sorted(self._unplanned),
            "ledger_sha256": self._ledger_hash if self._ledger is None else self._ledger.last_hash,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Add the steps that a checkpoint has spent, on all ranks. Steps already counted stay counted.

        Raises:
            LedgerError: the ledger lacks the line after which the checkpoint was written.
            ValueError: the checkpoint is of another data set or unit.
        """
        self._counted(lambda: self._load(state))

    def _load(self, state: dict[str, Any]) -> None:
        for key, expected in (("unit", self.sampling.unit), ("dataset_size", self.sampling.units)):
            if state[key] != expected:
                raise ValueError(
                    f"load_state_dict: the checkpoint has {key}={state[key]!r}, this run has {expected!r}; load the "
                    "checkpoint of this run (for the state of an optimizer that other data have trained, leave its "
                    "entry 'privacy' out, and state the ε of both runs)"
                )
        digest = state["ledger_sha256"]
        if digest is not None and self._ledger is None and digest not in self._missed_ledgers:
            self._missed_ledgers.add(digest)
            warnings.warn(
                "load_state_dict: the checkpoint's run kept a ledger and this run has none: steps applied "
                "after the checkpoint was written are not counted. Give PrivacyEngine the same ledger.",
                stacklevel=3,
            )
        elif digest is not None and self._ledger is not None and not self._ledger.holds(digest):
            raise LedgerError(
                f"ledger {self._ledger.path} lacks the line after which the checkpoint was written: its last lines "
                "were removed, or it belongs to another run. Resume with the ledger that belongs to the "
                "checkpoint."
            )
        self._unplanned = self._unplanned - set(state["runs"]) | set(state.get("unplanned", ()))
        for run, saved in state["runs"].items():
            mechanism = Mechanism(**saved["mechanism"])
            counted, saved_steps = self._runs.get(run, (mechanism, 0))[1], int(saved["steps"])
            if saved_steps <= counted:
                continue
            if self._ledger is not None:  # the next run may have only the ledger, and must count these steps
                self._ledger.carry(run, mechanism, saved_steps - counted)
            self._runs[run] = (mechanism, saved_steps)
        self._safe_steps = 0
        self._look_ahead = _LOOK_AHEAD

    def close(self) -> None:
        """Close the ledger and release its lock."""
        if self._ledger is not None:
            self._ledger.close()

    def _fits(self, steps: int) -> bool:
        """Whether `steps` steps of this run fit the target; looks ahead and caches the result."""
        if steps <= self._safe_steps:
            return True
        if self._safe_steps == 0 and self._planned_steps is not None:
            spent_before = self.planned_steps_taken - self._runs[self._run][1]
            self._look_ahead = max(self._look_ahead, self._planned_steps - spent_before - steps + 1)
        while self._look_ahead:
            count = steps + self._look_ahead - 1
            if self._epsilon_after(count) <= (
                math.inf if self.target_epsilon is None else self.target_epsilon
            ):
                self._safe_steps = count
                self._look_ahead = min(self._look_ahead, _LOOK_AHEAD)
                return True
            self._look_ahead //= 2
        self._look_ahead = 1
        return False

    def _epsilon_after(self, steps: int) -> float:
        assert self.target_delta is not None  # a target always has a δ
        others = [spent for run, spent in self._runs.items() if run != self._run]
        return composed_epsilon(
            [*others, (self.mechanism, steps)], self.target_delta, accountant=self.accountant
        )


def _contents(ledger: str | os.PathLike[str] | None) -> LedgerContents | None:
    """What this machine's ledger holds: nothing if it does not exist, None if none is given."""
    if ledger is None:
        return None
    return read_ledger(ledger) if os.path.exists(ledger) else LedgerContents()


def _check_longest(
    ledger: str | os.PathLike[str] | None, seen: LedgerContents | None, others: Sequence[str | None]
) -> None:
    """Raise LedgerError if another rank sees lines that rank 0's ledger lacks: those of earlier runs would not count.

    torchrun may start rank 0 on another machine than before.
    """
    held = {None} if seen is None else {None, LedgerContents.last_hash, *seen.hashes}
    for rank, last in enumerate(others):
        if last not in held:
            raise LedgerError(
                f"ledger={str(ledger)!r}: rank {rank} was given a ledger, or sees one with lines, that rank 0 lacks. "
                "Rank 0 writes it, and the steps in those lines would not count: give every rank the same path, on "
                "storage that all machines share"
            )


def _check_has_earlier(
    ledger: str | os.PathLike[str] | None,
    seen: LedgerContents | None,
    earlier: Mapping[str, tuple[Mechanism, int]],
) -> None:
    """Raise LedgerError if a ledger lacks steps that earlier runs of this process took on the same parameters."""
    if seen is None:
        return
    missing = lacking(earlier, {run.id: run.steps for run in seen.runs})
    if missing:
        raise LedgerError(
            f"ledger={str(ledger)!r} lacks {missing} steps that trained the module earlier in this process, without a "
            "ledger or with another one: an ε of this ledger would not count them, and the weights depend on them. "
            "Give both runs the same ledger, or build the model anew"
        )
