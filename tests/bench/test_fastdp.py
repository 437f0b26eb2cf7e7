"""fastDP is a contender where a folder is named, and says why it cannot run. The repository holds nothing of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench.cases.models import CASES
from bench.contenders import fastdp, registry, with_fastdp
from bench.harness.checker import CANNOT, check
from bench.names import FASTDP, NON_PRIVATE


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(fastdp.VARIABLE, str(tmp_path))
    fastdp.package.cache_clear()
    yield tmp_path
    fastdp.package.cache_clear()
    sys.modules.pop(fastdp.PACKAGE, None)


def reason() -> str:
    case = CASES["linear-layer"]
    place = (torch.float32, "cpu")
    (verdict,) = check(
        {FASTDP: registry()[FASTDP]}, case, case.model(4, *place), case.batch(2, 4, *place)
    ).values()
    assert verdict.status == CANNOT
    return verdict.reason


def write(folder: Path, text: str) -> None:
    (folder / fastdp.PACKAGE).mkdir()
    (folder / fastdp.PACKAGE / "__init__.py").write_text(text)


def test_it_is_no_contender_unless_its_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(fastdp.VARIABLE, raising=False)
    assert FASTDP not in registry()
    assert with_fastdp([NON_PRIVATE]) == (NON_PRIVATE,)
    assert fastdp.version() is None


def test_a_folder_without_it_is_named(named: Path) -> None:
    assert with_fastdp([NON_PRIVATE]) == (NON_PRIVATE, FASTDP)
    assert "has no package fastDP" in reason()


def test_a_library_that_it_lacks_is_named(named: Path) -> None:
    write(named, "import a_library_that_nobody_has")
    assert "cannot be imported: No module named 'a_library_that_nobody_has'" in reason()
    assert str(named) not in sys.path


def test_its_version_is_told_and_its_words_are_kept_from_the_tables(
    named: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(named, "__version__ = '9.1'\nprint('a greeting')\n")
    assert fastdp.version() == "9.1"
    assert "PrivacyEngine" in reason()
    assert capsys.readouterr().out == ""
