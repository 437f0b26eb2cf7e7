"""Seeds that transformers sets: none that is known reaches a forward of a private run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from tests.interop.trainers import arguments, case, privacy, trainer  # noqa: E402
from tests.privacy.private_run import private_run  # noqa: E402

SECRET = {"private": privacy(noise_key=None), "max_steps": 2}


class Seeds(transformers.TrainerCallback):
    """Notes torch's seed when a logical batch begins."""

    def __init__(self) -> None:
        self.noted: list[int] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.noted.append(torch.initial_seed())


def test_every_logical_batch_has_a_secret_seed_of_its_own(tmp_path: Path) -> None:
    noted = []
    for _ in range(2):
        seeds = Seeds()
        trainer(tmp_path, case("sequence", dropout=0.1), callbacks=[seeds], seed=42, **SECRET).train()
        noted += seeds.noted
    assert len(set(noted)) == 4
    assert 42 not in noted


class SetsSeed(transformers.TrainerCallback):
    def on_step_begin(self, *_: Any, **__: Any) -> None:
        transformers.set_seed(42)


def test_a_callback_that_seeds_within_a_batch_is_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, case("sequence", dropout=0.1), callbacks=[SetsSeed()], **SECRET)
    with pytest.raises(RuntimeError, match="within a logical batch: the draws of this forward are known"):
        made.train()
    assert made.engine.steps == 0


def test_a_plain_trainer_after_make_private_is_noticed(tmp_path: Path) -> None:
    """Its constructor seeds torch with 42: the engine's own loop, by hand."""
    run = private_run()
    transformers.Trainer(case("sequence").model, arguments(tmp_path))
    assert torch.initial_seed() == 42
    with pytest.warns(UserWarning, match="construction of a Trainer: construct it before make_private"):
        next(iter(run.loader))
    assert torch.initial_seed() != 42


def test_a_checkpoint_tells_no_generators_state(tmp_path: Path) -> None:
    """From a state of Mersenne Twister its earlier outputs follow: the masks of the steps before."""
    trainer(tmp_path, case("sequence"), save_strategy="steps", save_steps=1, **SECRET).train()
    for folder in (tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"):
        assert not [path.name for path in folder.iterdir() if "rng" in path.name]
