"""The training loop: logical steps, learning rate, checkpoints, the curve on public data, the screen."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Any

import torch

from asr_finetune.config.schema import TrainConfig
from asr_finetune.console import Reporter
from asr_finetune.models.recognizer import to_device
from asr_finetune.training.evaluate import evaluate
from asr_finetune.training.processes import of_all
from asr_finetune.training.start import Run
from dpkernels import checkpoint
from dpkernels.errors import UserError
from dpkernels.privacy import BudgetExhausted, LogicalBatch, back_propagate
from dpkernels.rounding import shown_epsilon

# Composing ε can take a second; refreshing it takes at most this share of the training time.
EPSILON_TIME_SHARE = 0.02


class Interrupted(UserError, RuntimeError):
    """Ctrl-C or SIGTERM: a checkpoint was written, and the same command continues from it."""

    exit_code = 130  # that of a program ended by SIGINT


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of step 0, 1, ...: linear warm-up, then constant, or decreasing to 0 (cosine or linear)."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return config.learning_rate * shape[config.lr_schedule]


def run_steps(run: Run) -> None:
    """Logical steps until `train.steps`, the target ε, or a request to stop.

    Raises:
        Interrupted: Ctrl-C or SIGTERM, after a checkpoint was written.
    """
    config = run.config.train
    total, began = config.steps, time.monotonic()
    before = run.seconds
    requested: str | None = None
    display = _EpsilonDisplay(run)
    if run.step >= total:
        return
    # A signal after the steps interrupts at once, since nothing is lost then.
    with StopRequest(run.reporter) as stop, run.reporter.bar("train", total, start=run.step) as bar:
        for logical_batch in run.loader:
            step_began = time.monotonic()
            rate = learning_rate(config, run.step)
            for group in run.optimizer.param_groups:
                group["lr"] = rate
            losses = _backward(run, logical_batch)
            try:
                run.optimizer.step()
            except BudgetExhausted as reason:
                run.reporter.say(f"stopped after {run.step} of {total} steps: {reason}")
                break
            run.optimizer.zero_grad()
            run.step += 1
            run.seconds = before + time.monotonic() - began
            entry = _history_entry(run, losses, rate, time.monotonic() - step_began)
            entry |= display.refresh(last=run.step == total)
            run.folder.note_history(entry)
            run.log.step(entry)
            bar.update(run.step, display.facts(entry))
            if config.eval_every and (run.step % config.eval_every == 0 or run.step == total):
                _validate(run)
            requested = next((name for name in run.ranks.gathered(stop.requested) if name), None)
            if requested or run.step == total:
                break
            if run.step % config.checkpoint_every == 0:
                save(run)
        run.seconds = before + time.monotonic() - began
        save(run)
        if requested:
            raise Interrupted(
                f"stopped by {requested} after step {run.step} of {total}; the same command "
                f"continues from here (checkpoint in {run.folder.checkpoint})"
            )


def _backward(run: Run, logical_batch: Iterable[Any]) -> torch.Tensor:
    """Run one backward for each micro-batch. Returns the examples' losses, float64. NOT PRIVATE."""

    def losses_of(batch: Any) -> torch.Tensor:
        return run.recognizer.loss_per_example(run.recognizer.model, to_device(batch, run.recognizer.device))

    losses = []
    if isinstance(logical_batch, LogicalBatch):
        losses = back_propagate(run.optimizer, logical_batch, losses_of, say=run.reporter.say)
    else:
        for batch in logical_batch:  # without privacy
            losses.append(losses_of(batch))
            run.optimizer.backward(losses[-1])
            losses[-1] = losses[-1].detach()
    mine = torch.cat([torch.zeros(0, dtype=torch.float64), *(part.double().cpu() for part in losses)])
    return torch.cat(run.ranks.gathered(mine))


def _history_entry(run: Run, losses: torch.Tensor, rate: float, seconds: float) -> dict[str, Any]:
    finite = losses[losses.isfinite()]
    impossible = len(losses) - len(finite)
    if impossible and not run.warned_of_impossible:
        run.warned_of_impossible = True
        run.reporter.say(
            f"step {run.step}: {impossible} of {len(losses)} losses are not finite (NOT PRIVATE): the output layer "
            "cannot produce these targets, or the model returns NaN; the history has their number for every step"
        )
    entry = {
        "step": run.step,
        "private": False,  # ε does not cover this line
        "loss": float(finite.mean()) if len(finite) else None,
        "examples": len(losses),
        "non_finite_losses": impossible,
        "learning_rate": rate,
        "seconds": seconds,
    }
    stats = of_all(run.ranks.gathered(run.optimizer.last_step)) if run.engine else None
    if stats is not None:
        entry |= {"clip_rate": stats.clip_rate, "mean_norm": stats.mean_norm, "non_finite": stats.non_finite}
    adapts = run.config.privacy.clipping == "adaptive"
    if adapts and run.engine is not None and run.engine.noise_multiplier:
        entry["clip_norm"] = run.engine.clip_norm  # of the next step; ε covers it
    return entry


class _EpsilonDisplay:
    """ε on the screen: recomputed when that is cheap, and shown with its step."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._epsilon: float | None = None
        self._step = 0
        self._next = 0.0
        self._examples = 0
        self._began = run.seconds

    def refresh(self, *, last: bool) -> dict[str, Any]:
        """ε and its step, recomputed in at most `EPSILON_TIME_SHARE` of the time; {} if there is no ε."""
        run = self._run
        if run.ranks.is_first and (last or run.seconds >= self._next):
            began = time.monotonic()
            self._epsilon, self._step = epsilon_spent(run), run.step
            self._next = run.seconds + (time.monotonic() - began) / EPSILON_TIME_SHARE
        return {} if self._epsilon is None else {"epsilon": self._epsilon, "epsilon_step": self._step}

    def facts(self, entry: dict[str, Any]) -> str:
        """The facts beside the bar."""
        self._examples += entry["examples"]
        speed = f"{self._examples / max(self._run.seconds - self._began, 1e-9):.1f} utt/s"
        loss = "–" if entry["loss"] is None else f"{entry['loss']:.3f}"
        if self._run.engine is None:
            return f"NOT PRIVATE  loss {loss}  {speed}"
        spent = "∞" if self._epsilon is None else shown_epsilon(self._epsilon, 2)
        when = "" if self._step == self._run.step or self._epsilon is None else f" (step {self._step})"
        return f"ε {spent}{when}  [not private: loss {loss}, clipped {entry['clip_rate']:.0%}]  {speed}"


def _validate(run: Run) -> None:
    """Add a point to the curve, measured on public data."""
    assert run.valid is not None
    result = evaluate(
        run.recognizer, run.valid.corpus, run.config.evaluate, dataset=run.valid, ranks=run.ranks
    )
    low, high = result.wer_ci or (None, None)
    point = {
        "step": run.step,
        "epsilon": epsilon_spent(run),
        "wer": result.wer,
        "wer_lo": low,
        "wer_hi": high,
    }
    run.curve.append(point)
    run.log.validation(point)
    run.reporter.say(f"step {run.step}, public validation data: {result}")


def epsilon_spent(run: Run) -> float | None:
    """ε spent; None without privacy, and without noise (JSON has no ∞)."""
    if run.engine is None or run.engine.noise_multiplier == 0:
        return None
    return run.engine.get_epsilon(run.config.privacy.delta)


def save(run: Run) -> None:
    """Write a checkpoint of the run's present state."""
    state = checkpoint.Checkpoint(
        step=run.step,
        parameters=dict(checkpoint.kept_parameters(run.recognizer.model)),
        optimizer=run.optimizer.state_dict(),
        privacy=run.engine.state_dict() if run.engine else None,
        random=checkpoint.random_state() if run.engine is None else None,
        seconds=run.seconds,
        curve=run.curve,
    )
    run.ranks.first(lambda: checkpoint.save(run.folder.checkpoint, state))
    run.saved = run.step


class StopRequest:
    """Ctrl-C or SIGTERM requests a stop after the current step; a second one stops at once."""

    def __init__(self, reporter: Reporter) -> None:
        self.requested: str | None = None
        self._reporter = reporter
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # only this thread can handle signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
        self._reporter.say("stopping after this step; repeat the signal to stop now")
