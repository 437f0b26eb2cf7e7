from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from asr_finetune.config.schema import Config
from asr_finetune.training.run import Interrupted, train
from tests.asr_finetune import families, small_models, tones


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
                {**small_models.FAMILIES, **families.FAMILIES}[name](folder)
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


@pytest.fixture(scope="session")
def _made_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs with LoRA: `finished`, and `stopped` after step 3 of 4 by Ctrl-C. The test set `other` misses a file."""
    folder = tmp_path_factory.mktemp("runs")
    tones.write_manifest(folder, 16)
    tests = {
        name: str(tones.write_manifest(folder, size, seed=size, name=name))
        for name, size in (("clean", 4), ("other", 5))
    }
    (folder / "other" / "2.wav").unlink()
    values = {"data__test": tests, "method__kind": "lora", "method__rank": 2}
    values |= {"privacy__noise_multiplier": 3.0}  # else the noise is calibrated, which takes seconds
    with tones.one_thread():
        tones.write_model(folder / "model")
        for name in ("finished", "stopped"):
            config = Config.from_dict(tones.settings(folder, **values, output=str(folder / name)))
            with pytest.MonkeyPatch.context() as patch:
                if name == "stopped":
                    tones.interrupt_after(patch, 3)
                with contextlib.suppress(Interrupted):
                    train(config, progress=False)
    assert [path.parent.name for path in folder.glob("*/run.json")] == ["finished"]
    return folder


@pytest.fixture
def runs(_made_runs: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of `_made_runs`, which a test may change."""
    for path in _made_runs.iterdir():
        if path.name in ("finished", "stopped"):
            shutil.copytree(path, tmp_path / path.name)
        else:
            (tmp_path / path.name).symlink_to(path)
    with tones.one_thread():
        yield tmp_path
