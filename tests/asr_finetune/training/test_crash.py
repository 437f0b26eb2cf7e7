"""A few of the kills of `python -m tests.crash`, which anyone can run with a hundred."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import crash


@pytest.mark.slow  # an interpreter starts, and imports transformers
def test_kills_and_full_disks_at_random_instants(tmp_path: Path) -> None:
    crashes = crash.Crashes(tmp_path)
    for end in (crashes.kill_once, crashes.fill_once) * 3:
        end(4.0)
    crashes.finish()


@pytest.mark.parametrize(("applied", "saved"), [(1, 0), (0, 5)])
def test_an_uncounted_step_and_a_lost_one_are_seen(tmp_path: Path, applied: int, saved: int) -> None:
    crashes = crash.Crashes(tmp_path)
    crashes.check()
    crashes._applied.write_bytes(b"." * applied)
    crashes._saved = saved
    with pytest.raises(crash.Crashed, match="steps were applied" if applied else "is lost"):
        crashes.check()
