"""The coins on disk: what was written is read, by their owner alone, and never replaced."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from dpkernels.auditing import AuditError, draw_coins, read_coins, write_coins


def test_they_are_read_as_they_were_written_and_by_their_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        coins = draw_coins(70)
        write_coins(tmp_path / "coins.json", coins)
    finally:
        os.umask(before)
    assert (read_coins(tmp_path / "coins.json") == coins).all()
    assert read_coins(tmp_path / "coins.json").dtype == np.bool_
    assert (tmp_path / "coins.json").stat().st_mode & 0o777 == 0o600


def test_coins_are_not_replaced(tmp_path: Path) -> None:
    write_coins(tmp_path / "coins.json", [True, False])
    with pytest.raises(AuditError, match="exists"):
        write_coins(tmp_path / "coins.json", [True, True])
    assert read_coins(tmp_path / "coins.json").tolist() == [True, False]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"coins": "01x"}', '{"coins": 3}'])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "coins.json").write_text(text)
    with pytest.raises(AuditError, match="does not hold the coins"):
        read_coins(tmp_path / "coins.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="no such file"):
        read_coins(tmp_path / "coins.json")
