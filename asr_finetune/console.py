"""What a run says: lines and progress bars, expected errors instead of a traceback, and each warning once."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# In a log, a line more often than this only hides the others.
SECONDS_BETWEEN_LINES = 10.0


class Bar:
    """One thing under way, `total` units long."""

    def update(self, done: int, facts: str = "") -> None:
        """Say that `done` units are done; `facts` is shown beside them."""
        raise NotImplementedError


class _Silent(Bar):
    def update(self, done: int, facts: str = "") -> None:
        return


class _Rich(Bar):
    def __init__(self, progress: Progress, name: str, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task(name, total=total, facts="")

    def update(self, done: int, facts: str = "") -> None:
        self._progress.update(self._task, completed=done, facts=facts)


class _Lines(Bar):
    def __init__(self, console: Console, name: str, total: int, start: int) -> None:
        self._console, self._name, self._total, self._start = console, name, total, start
        self._began = time.monotonic()
        self._last = self._began

    def update(self, done: int, facts: str = "") -> None:
        now = time.monotonic()
        if done < self._total and now - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = now
        left = (now - self._began) / max(done - self._start, 1) * (self._total - done)
        rest = f", about {duration(left)} left" if done < self._total else ""
        self._console.print(
            f"{self._name} {done}/{self._total}  {facts}{rest}", markup=False, highlight=False, soft_wrap=True
        )


class Reporter:
    """Prints lines and bars.

    Args:
        enabled: False prints nothing at all.
        console: where to; standard output when None.
    """

    def __init__(self, enabled: bool = True, console: Console | None = None) -> None:
        self.enabled = enabled
        self.console = console or Console()

    def say(self, text: str, *, style: str | None = None) -> None:
        """One line (or paragraph), plain text."""
        if self.enabled:
            self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def bar(self, name: str, total: int, *, start: int = 0) -> Iterator[Bar]:
        """A bar (terminal) or lines (log) for `total` units, of which `start` were done earlier."""
        if not self.enabled:
            yield _Silent()
        elif self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[facts]}", markup=False),
            )
            with Progress(*columns, console=self.console) as progress:
                bar = _Rich(progress, name, total)
                bar.update(start)
                yield bar
        else:
            yield _Lines(self.console, name, total, start)


def duration(seconds: float) -> str:
    """`95` as `1 min 35 s`."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


# Errors that are messages to the user whatever their base class, by the module that defines them.
_EXPECTED = {
    "asr_finetune.training.loop": ("Interrupted",),
    "asr_finetune.demo.synth": ("SynthesisError",),
    "dpkernels.privacy": ("BudgetExhausted", "SelfCheckError"),
}
_said: set[str] = set()


def expected(error: BaseException) -> bool:
    """Whether an error is a message of ours to the user, rather than a fault to be traced.

    ValueError and FileNotFoundError count where this package or dpkernels raised them; the same classes
    raised inside another library are faults.
    """
    for module, names in _EXPECTED.items():
        loaded = sys.modules.get(module)  # not loaded: the error cannot be one of its classes
        if loaded is not None and isinstance(error, tuple(getattr(loaded, name) for name in names)):
            return True
    if not isinstance(error, ValueError | FileNotFoundError):
        return False
    return _raising_module(error.__traceback__).split(".")[0] in ("asr_finetune", "dpkernels")


def _raising_module(trace: TracebackType | None) -> str:
    name = ""
    while trace is not None:
        name = str(trace.tb_frame.f_globals.get("__name__", ""))
        trace = trace.tb_next
    return name


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning, the same one once in a run wherever it arises."""
    if str(message) in _said:
        return
    _said.add(str(message))
    tell(f"warning: {message}", "yellow")


def tell(text: str, style: str) -> None:
    """A line on standard error."""
    Console(stderr=True, soft_wrap=True).print(text, style=style, markup=False, highlight=False)
