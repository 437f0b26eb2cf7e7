"""What a run says on the screen: rich bars on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

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
