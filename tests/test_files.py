"""Files that cannot be written: the message has the reason and the fix, and what was there is kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dpkernels.errors import UserError
from dpkernels.files import WriteError, remove_leftovers, write_atomically, writing
from tests.failing_disk import largest_file, make_unwritable


@pytest.mark.parametrize(("full", "fix"), [(True, "make room"), (False, "make it writable")])
def test_a_file_that_cannot_be_written_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool, fix: str
) -> None:
    path = tmp_path / "a.txt"
    write_atomically(path, lambda file: file.write(b"old"))
    make_unwritable(monkeypatch, "a.txt", full=full)
    with pytest.raises(WriteError, match=rf"a\.txt cannot be written \(.*\): {fix}") as caught:
        write_atomically(path, lambda file: file.write(b"new"))
    assert isinstance(caught.value, UserError)
    assert isinstance(caught.value, OSError)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_ends_within_a_file(tmp_path: Path) -> None:
    """torch's own writer meets the end of the disk."""
    values = torch.zeros(200_000)
    with largest_file(100_000), pytest.raises(WriteError, match=r"File too large.*make room"):
        write_atomically(tmp_path / "a.pt", lambda file: torch.save(values, file))
    assert not list(tmp_path.iterdir())


def test_a_folder_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"file/a\.txt cannot be written \(Not a directory\)"):
        write_atomically(tmp_path / "file" / "a.txt", lambda file: file.write(b""))


def test_errors_with_a_message_and_other_faults_are_left_as_they_are(tmp_path: Path) -> None:
    faults: list[Any] = [WriteError("the inner message"), ValueError("no fault of the disk")]
    for fault in faults:
        with pytest.raises(type(fault)) as caught, writing(tmp_path):
            raise fault
        assert caught.value is fault


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    for name in (".a.txt.123", ".a.txt.45", ".b.txt.123", "a.txt"):
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path / "a.txt")
    assert sorted(os.listdir(tmp_path)) == [".b.txt.123", "a.txt"]
