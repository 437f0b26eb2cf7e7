"""Console output of a run: lines, progress bars, and each warning once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# The shortest time between two progress lines in a log.
SECONDS_BETWEEN_LINES = 10.0


class Bar:
    """The progress of one task: a rich bar on a terminal, occasional lines in a log."""

    def __init__(self, progress: Progress, name: str, total: int, start: int) -> None:
        self._progress, self._start = progress, start
        task = progress.add_task(name, total=total, completed=start, facts="")
        self._task = progress.tasks[task]
        self._last_line = time.monotonic()

    def update(self, done: int, facts: str = "") -> None:
        """Show that `done` units are done, with `facts` beside them."""
        self._progress.update(self._task.id, completed=done, facts=facts)
        total, now = int(self._task.total or 0), time.monotonic()
        if not self._progress.disable or (done < total and now - self._last_line < SECONDS_BETWEEN_LINES):
            return
        self._last_line = now
        remaining = (self._task.elapsed or 0) / max(done - self._start, 1) * (total - done)
        rest = f", about {duration(remaining)} left" if done < total else ""
        line = f"{self._task.description} {done}/{total}  {facts}{rest}"
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)


class Reporter:
    """Prints lines and bars.

    Args:
        enabled: False prints nothing.
        console: the console to print to; None is standard output.
    """

    def __init__(self, enabled: bool = True, console: Console | None = None) -> None:
        self.console = console if console is not None and enabled else Console(quiet=not enabled)

    def say(self, text: str, *, style: str | None = None) -> None:
        """Print a line or paragraph of plain text."""
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def working(self, text: str) -> Iterator[None]:
        """Show that something whose steps cannot be counted is being done, by a spinner (terminal) or a line (log)."""
        if not self.console.is_terminal or self.console.quiet:
            self.say(f"{text} ...")
            yield
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            progress.add_task(text, total=None)
            yield

    @contextmanager
    def bar(self, name: str, total: int, *, start: int = 0) -> Iterator[Bar]:
        """Show a bar (terminal) or lines (log) for `total` units, `start` of them done earlier."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}", markup=False),
        )
        shown = self.console.is_terminal and not self.console.quiet
        with Progress(*columns, console=self.console, disable=not shown) as progress:
            yield Bar(progress, name, total, start)


def duration(seconds: float) -> str:
    """Seconds as text: 95 is `1 min 35 s`."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


_shown_warnings: set[str] = set()


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning; the same message is printed once in a run, whatever its origin."""
    if str(message) in _shown_warnings:
        return
    _shown_warnings.add(str(message))
    tell(f"warning: {message}", "yellow")


def tell(text: str, style: str) -> None:
    """Print a line on standard error."""
    Console(stderr=True, soft_wrap=True).print(text, style=style, markup=False, highlight=False)
