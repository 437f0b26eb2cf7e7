"""The budget: which steps were spent, on disk before they are applied, and whether the next one may be."""

import math
import os
import warnings
from typing import Any

from dpkernels.privacy.accounting.accountant import Mechanism, check_delta, composed_epsilon
from dpkernels.privacy.accounting.ledger import Ledger, LedgerError
from dpkernels.privacy.sampling.plan import Sampling

# How many steps ahead ε is tried against the target at once: one composition then serves many steps.
_LOOK_AHEAD = 64


class BudgetExhausted(RuntimeError):
    """The next step would exceed target_epsilon. Nothing was spent by the step that raised it."""


class Budget:
    """Steps spent by this run and by those before it, and the target they must stay within.

    Every run has a random name, so that a ledger and a checkpoint that both know of it count it once: whichever
    knows of more steps is believed.

    Args:
        sampling: the run's public constants.
        mechanism: what each of its steps is.
        accountant: "pld" or "rdp".
        target_epsilon: ε > 0 never to be passed, or None.
        target_delta: its δ in (0, 1); not None where there is a target.
        planned_steps: total steps, where known: the first thing that is tried against the target.
        ledger: path of the ledger, or None to count in memory.
        settings: what the ledger's run line says besides.

    Raises:
        LedgerError: the ledger is damaged, locked, or another data set's.
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
    ) -> None:
        self.sampling = sampling
        self.mechanism = mechanism
        self.accountant = accountant
        self.target_epsilon = target_epsilon
        self.target_delta = target_delta
        self._planned_steps = planned_steps
        self._pid = os.getpid()
        self._run = os.urandom(8).hex()
        self._runs: dict[str, tuple[Mechanism, int]] = {}
        self._safe_steps = 0
        self._look_ahead = _LOOK_AHEAD
        self._reported: set[tuple[int, float, str]] = set()
        self._ledger: Ledger | None = None
        if ledger is not None:
            constants = {
                "run": self._run,
                "unit": sampling.unit,
                "dataset_size": sampling.units,
                "adjacency": f"add or remove one {sampling.unit}",
                "sampling": mechanism.sampling,
                "mechanism": mechanism.to_dict(),
                "accountant": accountant,
                "target_epsilon": target_epsilon,
                "target_delta": target_delta,
                "planned_steps": planned_steps,
            }
            self._ledger = Ledger(ledger, constants | settings)
            try:
                for run in self._ledger.previous_runs:
                    self._runs[run.id] = (run.mechanism, run.steps)
            except BaseException:
                self._ledger.close()
                raise
        self._runs[self._run] = (mechanism, 0 if self._ledger is None else self._ledger.run.steps)

    @property
    def steps(self) -> int:
        """Steps spent so far, those of earlier runs included."""
        return sum(steps for _, steps in self._runs.values())

    @property
    def history(self) -> list[tuple[Mechanism, int]]:
        """Every run's mechanism and how many steps it spent."""
        return list(self._runs.values())

    def epsilon(self, delta: float, accountant: str | None = None) -> float:
        """ε spent so far at δ; noted in the ledger, once for each number of steps. Warns where δ >= 1/N."""
        check_delta(delta, self.sampling.units)
        name = self.accountant if accountant is None else accountant
        value = composed_epsilon(self.history, delta, accountant=name)
        if self._ledger is not None and (self.steps, delta, name) not in self._reported:
            self._ledger.note_epsilon(value, delta, name, self.steps)
            self._reported.add((self.steps, delta, name))
        return value

    def spend(self) -> None:
        """Count one step, on disk where there is a ledger.

        Raises:
            BudgetExhausted: the step would pass the target; nothing is spent.
            LedgerError: the step could not be written to the ledger: it is closed, say.
            RuntimeError: in a forked process.
        """
        if os.getpid() != self._pid:
            raise RuntimeError(
                "this process was forked from the one that made the model private: the two would each count "
                "half of the steps. Train in one of them, and call make_private there."
            )
        taken = self._runs[self._run][1]
        if self.target_epsilon is not None and not self._fits(taken + 1):
            raise BudgetExhausted(
                f"the next step would exceed target_epsilon={self.target_epsilon} at "
                f"delta={self.target_delta} after {self.steps} steps (earlier runs included). The model is "
                "as private as it was; stop here."
            )
        if self._ledger is not None:
            self._ledger.spend_step()
        self._runs[self._run] = (self.mechanism, taken + 1)

    def state_dict(self) -> dict[str, Any]:
        """What was spent, for a checkpoint: plain values, no keys."""
        runs = {
            run: {"mechanism": step.to_dict(), "steps": count} for run, (step, count) in self._runs.items()
        }
        return {
            "unit": self.sampling.unit,
            "dataset_size": self.sampling.units,
            "runs": runs,
            "ledger_sha256": None if self._ledger is None else self._ledger.last_hash,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Add what a checkpoint says was spent. Steps counted already stay counted.

        Raises:
            LedgerError: the ledger lacks the line that the checkpoint was written after.
            ValueError: the checkpoint is of another data set or unit.
        """
        for key, mine in (("unit", self.sampling.unit), ("dataset_size", self.sampling.units)):
            if state[key] != mine:
                raise ValueError(
                    f"load_state_dict: the checkpoint has {key}={state[key]!r}, this run {mine!r}; it is "
                    "another run's"
                )
        digest = state["ledger_sha256"]
        if digest is not None and self._ledger is None:
            warnings.warn(
                "load_state_dict: the checkpoint's run kept a ledger and this one has none: steps applied "
                "after the checkpoint was written are not counted. Give PrivacyEngine the same ledger.",
                stacklevel=3,
            )
        elif digest is not None and self._ledger is not None and not self._ledger.holds(digest):
            raise LedgerError(
                f"ledger {self._ledger.path} lacks the line that the checkpoint was written after: lines "
                "were cut off its end, or it is another run's. Resume with the ledger that belongs to the "
                "checkpoint."
            )
        for run, saved in state["runs"].items():
            mechanism = Mechanism(**saved["mechanism"])
            counted, saved_steps = self._runs.get(run, (mechanism, 0))[1], int(saved["steps"])
            if saved_steps <= counted:
                continue
            if self._ledger is not None:  # or the next run, which may have the ledger only, would forget them
                self._ledger.carry(run, mechanism, saved_steps - counted)
            self._runs[run] = (mechanism, saved_steps)
        self._safe_steps = 0
        self._look_ahead = _LOOK_AHEAD

    def close(self) -> None:
        """Close the ledger and give up its lock."""
        if self._ledger is not None:
            self._ledger.close()

    def _fits(self, steps: int) -> bool:
        """Whether this run may have `steps` steps within the target; asks for many at once and remembers."""
        if steps <= self._safe_steps:
            return True
        if self._safe_steps == 0 and self._planned_steps is not None:
            spent_before = self.steps - self._runs[self._run][1]
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
        assert self.target_delta is not None  # where there is a target there is a δ
        others = [spent for run, spent in self._runs.items() if run != self._run]
        return composed_epsilon(
            [*others, (self.mechanism, steps)], self.target_delta, accountant=self.accountant
        )
