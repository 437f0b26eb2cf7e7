from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.asr import small_models, tones


@pytest.fixture(scope="session")
def _small_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    with tones.one_thread():
        for name, write in small_models.FAMILIES.items():
            write(root / name)
        small_models.whisper(root / "multilingual", multilingual=True)
    return {name: root / name for name in (*small_models.FAMILIES, "multilingual")}


@pytest.fixture(scope="module")
def folders(_small_checkpoints: dict[str, Path]) -> Iterator[dict[str, Path]]:
    """A small checkpoint of every family, not to be written to."""
    with tones.one_thread():
        yield _small_checkpoints
