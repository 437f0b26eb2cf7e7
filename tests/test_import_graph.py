"""`python -m tests.import_graph`: rooms, arrows and circles of a package."""

import subprocess
import sys

import pytest

from tests.import_graph import arrows, main

SOURCES = {
    "p.a.x": "from p.b import y\nfrom p.a import z",
    "p.a.z": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.b.y import Y",
    "p.b.y": "import p.c",
    "p.c": "",
}


def test_arrows_go_between_rooms_and_count_modules() -> None:
    assert arrows("p", SOURCES) == {("a", "b"): 2, ("b", "c"): 1}


def test_the_command_draws_this_repository(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["import_graph", "dpkernels.nn"])
    main()
    printed = capsys.readouterr().out
    assert "dpkernels.nn: 7 rooms" in printed
    assert "no circle" in printed
    monkeypatch.setattr(sys, "argv", ["import_graph", "dpkernels.nn", "--mermaid"])
    main()
    assert "    convert --> layers" in capsys.readouterr().out.splitlines()


def test_an_unknown_revision_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["import_graph", "--revision", "no-such-revision"])
    with pytest.raises(subprocess.CalledProcessError):
        main()
