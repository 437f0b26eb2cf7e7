"""TensorBoard's logs: what no ε covers stays in not_private, unless the configuration says otherwise."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from asr_finetune.config.schema import Config, ConfigError, LogConfig
from asr_finetune.training.run import train
from asr_finetune.training.run_folder import RunFolder
from asr_finetune.training.run_log import RunLog
from tests.asr_finetune import tones

ENTRY = {
    "step": 3,
    "private": False,
    "loss": 4.5,
    "examples": 7,
    "non_finite_losses": 0,
    "learning_rate": 0.25,
    "seconds": 1.5,
    "clip_rate": 0.5,
    "epsilon": 0.75,
    "epsilon_step": 2,
    "a_new_statistic": 9.0,
}
POINT = {"step": 3, "epsilon": 0.75, "wer": 0.5, "wer_lo": 0.25, "wer_hi": None}


def logged(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """tag -> (step, value) of every scalar in a folder."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not folder.is_dir():
        return {}
    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(item.step, item.value) for item in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


@pytest.mark.parametrize("shared", [False, True])
def test_each_value_goes_to_its_folder(tmp_path: Path, shared: bool) -> None:
    log = RunLog(LogConfig(tensorboard=True, not_private=shared), RunFolder(tmp_path), 0)
    log.step(ENTRY)
    log.validation(POINT)
    log.close()
    public, secret = logged(tmp_path / "tensorboard"), logged(tmp_path / "not_private" / "tensorboard")
    safe = {
        "epsilon": [(2, 0.75)],
        "learning_rate": [(3, 0.25)],
        "validation/wer": [(3, 0.5)],
        "validation/wer_lo": [(3, 0.25)],
    }
    statistics = ("loss", "examples", "non_finite_losses", "seconds", "clip_rate", "a_new_statistic")
    other = {f"NOT PRIVATE/{name}": [(3, float(ENTRY[name]))] for name in statistics}
    assert secret == other
    assert public == (safe | other if shared else safe)


def test_nothing_is_written_unless_asked(tmp_path: Path) -> None:
    log = RunLog(LogConfig(not_private=True), RunFolder(tmp_path), 0)
    log.step(ENTRY)
    log.validation(POINT)
    log.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("later", [1e9, 3e9], ids=["back", "forward"])
def test_a_clock_that_was_set_replaces_the_steps_that_are_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: float
) -> None:
    """A run continues after step 2, twice; its clock was set back (or forward) in between."""
    for part, (clock, step) in enumerate([(2e9, 0), (later, 2), (later, 2)]):
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        log = RunLog(LogConfig(tensorboard=True), RunFolder(tmp_path), step)
        for number in range(step + 1, 5):
            log.step({**ENTRY, "step": number, "epsilon_step": number, "epsilon": float(part)})
        log.close()
    monkeypatch.undo()
    assert logged(tmp_path / "tensorboard")["epsilon"] == [(1, 0.0), (2, 0.0), (3, 2.0), (4, 2.0)]


@pytest.mark.slow
def test_a_run_and_its_continuation(runs: Path) -> None:
    values: dict[str, Any] = tones.settings(
        runs,
        method__kind="head",
        privacy__noise_multiplier=4.0,
        privacy__epsilon=None,
        data__valid=str(runs / "clean.jsonl"),
        train__eval_every=2,
    )
    config = Config.from_dict({**values, "log": {"tensorboard": True}})
    with pytest.MonkeyPatch.context() as patch:
        from asr_finetune.training.run import Interrupted

        tones.interrupt_after(patch, 2)
        with pytest.raises(Interrupted):
            train(config, progress=False)
    train(config, progress=False)
    public, secret = (logged(Path(config.output) / place / "tensorboard") for place in ("", "not_private"))
    assert set(public) == {
        "epsilon",
        "learning_rate",
        "validation/wer",
        "validation/wer_lo",
        "validation/wer_hi",
    }
    assert [step for step, _ in public["learning_rate"]] == [1, 2, 3, 4]
    assert [step for step, _ in public["validation/wer"]] == [2, 4]
    spent = json.loads((Path(config.output) / "run.json").read_text())["privacy"]["epsilon"]
    assert public["epsilon"][-1] == (4, pytest.approx(spent, rel=1e-6))
    assert len(secret["NOT PRIVATE/loss"]) == 4


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    values = {"model": {"name": "m"}, "data": {"train": "d"}, "output": "o", "log": {"tensorboard": True}}
    config = Config.from_dict({**values, "privacy": {"epsilon": 3, "delta": 1e-5}})
    with pytest.raises(ConfigError, match=r"pip install 'dpkernels\[log\]'"):
        config.check_trainable()
