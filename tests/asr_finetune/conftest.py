from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.asr_finetune import small_models, tones


class Checkpoints(dict[str, Path]):
    """A small checkpoint of a family, made when it is first asked for: not every machine can make each of them."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root

    def __missing__(self, name: str) -> Path:
        folder = self._root / name
        with tones.one_thread():
            if name == "multilingual":
                small_models.whisper(folder, multilingual=True)
            else:
                small_models.FAMILIES[name](folder)
        self[name] = folder
        return folder


@pytest.fixture(scope="session")
def _small_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def folders(_small_checkpoints: Checkpoints) -> Iterator[Checkpoints]:
    """A small checkpoint of every family, not to be written to."""
    with tones.one_thread():
        yield _small_checkpoints
