"""What a run shows of itself: what is being done, and how far it is."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from asr_finetune import console
from asr_finetune.console import Reporter, duration


def reporter(*, terminal: bool) -> tuple[Reporter, io.StringIO]:
    file = io.StringIO()
    return Reporter(True, Console(file=file, force_terminal=terminal, width=100)), file


def test_a_log_says_what_is_being_done_before_it_is_done() -> None:
    """In a self-check, which takes half a minute, nothing else is said."""
    shows, file = reporter(terminal=False)
    with shows.working("self-check"):
        assert file.getvalue() == "self-check ...\n"
    assert file.getvalue() == "self-check ...\n"


def test_a_terminal_shows_it_with_a_clock_and_takes_it_away() -> None:
    shows, file = reporter(terminal=True)
    with shows.working("self-check"):
        pass
    assert "self-check" in file.getvalue()
    assert "0:00:00" in file.getvalue()
    assert file.getvalue().endswith("\x1b[2K")  # the line is cleared


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_a_log_has_a_line_every_ten_seconds_and_at_the_end(clock: list[float]) -> None:
    shows, file = reporter(terminal=False)
    with shows.bar("train", 6) as bar:
        for done in range(1, 7):
            clock[0] += 4.0
            bar.update(done, f"step {done}")
    lines = file.getvalue().splitlines()
    assert [line.partition("  ")[0] for line in lines] == ["train 3/6", "train 6/6"]
    assert "about" in lines[0]
    assert "left" not in lines[1]


def test_nothing_is_shown_where_nothing_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    quiet = Reporter(enabled=False)
    quiet.say("text")
    with quiet.working("work"), quiet.bar("train", 1) as bar:
        bar.update(1)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (95, "1 min 35 s"), (7261, "2 h 1 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
