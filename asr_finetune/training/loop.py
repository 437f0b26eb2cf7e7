"""The training loop: logical steps, learning rate, checkpoints, the curve on public data, the screen."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any

import torch

from asr_finetune.config.schema import Config, TrainConfig
from asr_finetune.data.corpus import Corpus, Problem
from asr_finetune.models.recognizer import Recognizer, to_device
from asr_finetune.progress import Reporter
from asr_finetune.training import checkpoint
from asr_finetune.training.dataset import SpeechDataset
from asr_finetune.training.evaluate import evaluate
from asr_finetune.training.run_folder import RunFolder
from dpkernels import PrivacyEngine
from dpkernels.privacy import BudgetExhausted, LogicalBatch, back_propagate

# Composing ε can take a second: it is refreshed at most this share of the time.
EPSILON_TIME_SHARE = 0.02


class Interrupted(RuntimeError):
    """Ctrl-C or SIGTERM: a checkpoint was written, and the same command continues from it."""


@dataclass
class Run:
    """What the loop works on."""

    config: Config
    folder: RunFolder
    reporter: Reporter
    recognizer: Recognizer
    optimizer: Any
    loader: Iterable[Any]
    engine: PrivacyEngine | None
    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)
    valid: tuple[Corpus, SpeechDataset] | None = None
    lost: list[Problem] = field(default_factory=list)  # found while training, by this process
    told_of_impossible: bool = False


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of step 0, 1, ...: linear warm-up; then constant, or a cosine or a line down to 0."""
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
    display = _EpsilonDisplay(run)
    if run.step >= total:
        return
    # What comes after the steps is interrupted at once: nothing is lost then.
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
            bar.update(run.step, display.facts(entry))
            if config.eval_every and (run.step % config.eval_every == 0 or run.step == total):
                _validate(run)
            if stop.requested or run.step == total:
                break
            if run.step % config.checkpoint_every == 0:
                save(run)
        run.seconds = before + time.monotonic() - began
        save(run)
        if stop.requested:
            raise Interrupted(
                f"stopped by {stop.requested} after step {run.step} of {total}; the same command "
                f"continues from here (checkpoint in {run.folder.checkpoint})"
            )


def _backward(run: Run, logical_batch: Iterable[Any]) -> torch.Tensor:
    """One backward a micro-batch. Returns the examples' losses, float64. NOT PRIVATE."""

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
    return torch.cat([torch.zeros(0, dtype=torch.float64), *(part.double().cpu() for part in losses)])


def _history_entry(run: Run, losses: torch.Tensor, rate: float, seconds: float) -> dict[str, Any]:
    finite = losses[losses.isfinite()]
    impossible = len(losses) - len(finite)
    if impossible and not run.told_of_impossible:
        run.told_of_impossible = True
        run.reporter.say(
            f"step {run.step}: {impossible} of {len(losses)} losses are not finite (NOT PRIVATE): targets that the "
            "output layer cannot give, or a model that gives no numbers; their number is in every step's history"
        )
    entry = {
        "step": run.step,
        "private": False,  # no epsilon covers this line
        "loss": float(finite.mean()) if len(finite) else None,
        "examples": len(losses),
        "non_finite_losses": impossible,
        "learning_rate": rate,
        "seconds": seconds,
    }
    stats = run.optimizer.last_step if run.engine else None
    if stats is not None:
        entry |= {"clip_rate": stats.clip_rate, "mean_norm": stats.mean_norm, "non_finite": stats.non_finite}
    return entry


class _EpsilonDisplay:
    """ε as the screen shows it: composed anew when that is cheap, and always with the step that it is of."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._epsilon: float | None = None
        self._step = 0
        self._next = 0.0
        self._examples = 0
        self._began = run.seconds

    def refresh(self, *, last: bool) -> dict[str, Any]:
        """ε and the step it was spent by, at most `EPSILON_TIME_SHARE` of the time; nothing without ε."""
        run = self._run
        if last or run.seconds >= self._next:
            began = time.monotonic()
            self._epsilon, self._step = epsilon_spent(run), run.step
            self._next = run.seconds + (time.monotonic() - began) / EPSILON_TIME_SHARE
        return {} if self._epsilon is None else {"epsilon": self._epsilon, "epsilon_step": self._step}

    def facts(self, entry: dict[str, Any]) -> str:
        """What is shown beside the bar."""
        self._examples += entry["examples"]
        speed = f"{self._examples / max(self._run.seconds - self._began, 1e-9):.1f} utt/s"
        loss = "–" if entry["loss"] is None else f"{entry['loss']:.3f}"
        if self._run.engine is None:
            return f"NOT PRIVATE  loss {loss}  {speed}"
        spent = "∞" if self._epsilon is None else f"{self._epsilon:.2f}"
        when = "" if self._step == self._run.step or self._epsilon is None else f" (step {self._step})"
        return f"ε {spent}{when}  [not private: loss {loss}, clipped {entry['clip_rate']:.0%}]  {speed}"


def _validate(run: Run) -> None:
    """A point of the curve, on public data."""
    assert run.valid is not None
    corpus, dataset = run.valid
    result = evaluate(run.recognizer, corpus, run.config.evaluate, dataset=dataset)
    low, high = result.wer_ci or (None, None)
    point = {
        "step": run.step,
        "epsilon": epsilon_spent(run),
        "wer": result.wer,
        "wer_lo": low,
        "wer_hi": high,
    }
    run.curve.append(point)
    run.reporter.say(f"step {run.step}, public validation data: {result}")


def epsilon_spent(run: Run) -> float | None:
    """ε spent; None without privacy, or without noise (∞, which JSON has not)."""
    if run.engine is None or run.engine.noise_multiplier == 0:
        return None
    return run.engine.get_epsilon(run.config.privacy.delta)


def save(run: Run) -> None:
    """Write a checkpoint of the run as it is."""
    checkpoint.save(
        run.folder.checkpoint,
        checkpoint.Checkpoint(
            step=run.step,
            parameters=dict(checkpoint.kept_parameters(run.recognizer.model)),
            optimizer=run.optimizer.state_dict(),
            privacy=run.engine.state_dict() if run.engine else None,
            random=checkpoint.random_state() if run.engine is None else None,
            seconds=run.seconds,
            curve=run.curve,
        ),
    )


class StopRequest:
    """Ctrl-C and SIGTERM ask for a stop after the step under way; a second one stops at once."""

    def __init__(self, reporter: Reporter) -> None:
        self.requested: str | None = None
        self._reporter = reporter
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere signals cannot be handled
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
        self._reporter.say("stopping after this step; again to stop now")
