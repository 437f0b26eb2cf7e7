"""Training on from an earlier run's adapter or model: on the same recordings the budget goes on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from asr_finetune.config.schema import Config, ConfigError, ModelConfig
from asr_finetune.models.loading import load_recognizer
from asr_finetune.planning.dry_run import check_run
from asr_finetune.report.report import write_report
from asr_finetune.report.verify import verify
from asr_finetune.training import loop
from asr_finetune.training.export import export
from asr_finetune.training.run import train
from dpkernels.privacy import epsilon, read_ledger
from dpkernels.rounding import shown_epsilon
from tests.asr_finetune import tones
from tests.asr_finetune.report.test_report import visible
from tests.asr_finetune.training.test_train import Crash, at_step, crash

SIGMA, RATE, DELTA, EARLIER = 3.0, 0.5, 1e-3, 4


def following(runs: Path, **changes: Any) -> Config:
    """Two more steps from the finished run's adapter."""
    values = {"method__kind": "lora", "method__rank": 2, "train__steps": 2}
    values |= {"model__name": str(runs / "finished" / "adapter")}
    return Config.from_dict(tones.settings(runs, **{**values, **changes}))


def test_the_adapter_is_trained_on_and_its_budget_continued(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = following(runs)
    earlier = load_recognizer(ModelConfig(config.model.name, device="cpu")).model.state_dict()
    begun: dict[str, torch.Tensor] = {}
    original = loop.run_steps

    def noted(run: Any) -> None:
        begun.update(
            {name: value.detach().clone() for name, value in run.recognizer.model.state_dict().items()}
        )
        original(run)

    monkeypatch.setattr("asr_finetune.training.run.run_steps", noted)
    spent = epsilon(SIGMA, RATE, EARLIER + 2, DELTA)
    (check,) = [check for check in check_run(config, progress=False) if check.what == "privacy"]
    assert f"would spend ε = {shown_epsilon(spent)} " in check.found
    assert "σ = 3.000 (its ledger): 6 steps" in check.found

    result = train(config)
    said = " ".join(capsys.readouterr().out.split())
    assert "run finished, on the same recordings: its 4 steps are part of this run's ε" in said
    factors = [name for name in earlier if "lora_" in name]
    assert factors
    assert all(torch.equal(begun[name], earlier[name]) for name in factors)
    trained = load_recognizer(ModelConfig(str(runs / "run" / "adapter"), device="cpu")).model.state_dict()
    assert all(not torch.equal(trained[name], earlier[name]) for name in factors)
    assert result.steps == 2
    assert read_ledger(runs / "run" / "ledger.jsonl").steps == EARLIER + 2
    assert result.epsilon == pytest.approx(spent, rel=1e-9)
    assert read_ledger(runs / "finished" / "ledger.jsonl").steps == EARLIER
    text = visible(write_report(runs / "run", runs / "run" / "report.html").read_text())
    assert "Starting model run finished, on the same recordings" in text
    assert all(finding.agrees for finding in verify(runs / "run"))
    base = json.loads((runs / "run" / "adapter" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ]
    assert Path(base).name == "model"


def test_the_target_is_for_both_together(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = epsilon(SIGMA, RATE, EARLIER + 1, DELTA)
    result = train(following(runs, privacy__epsilon=target))
    assert "stopped after 1 of 2 steps" in capsys.readouterr().out
    assert result.steps == 1
    assert result.epsilon == pytest.approx(target, rel=1e-9)


def test_without_the_key_equal_numbers_are_taken_for_the_same_recordings(runs: Path) -> None:
    shutil.rmtree(runs / "finished" / "not_private")
    train(following(runs), progress=False)
    assert read_ledger(runs / "run" / "ledger.jsonl").steps == EARLIER + 2


def test_other_recordings_have_their_own_epsilon(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tones.write_manifest(runs, 16, seed=9, name="others")
    config = following(runs, data__train=str(runs / "others.jsonl"), privacy__noise_multiplier=5.0)
    result = train(config)
    assert "private, on other recordings: its own ε" in " ".join(capsys.readouterr().out.split())
    assert read_ledger(runs / "run" / "ledger.jsonl").steps == result.steps == 2
    assert result.epsilon == pytest.approx(epsilon(5.0, RATE, 2, DELTA), rel=1e-9)


@pytest.mark.thinned(4)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"privacy__noise_multiplier": 5.0}, r"privacy\.noise_multiplier is 5\.0, but 3\.0 in the steps"),
        ({"train__batch_size": 4}, r"train\.batch_size: the sampling rate is 0\.25, but 0\.5"),
        ({"privacy__max_batch_size": 12}, r"privacy\.max_batch_size is 12, but None"),
        ({"privacy__unit": "speaker", "privacy__max_examples_per_speaker": 2}, "protected another unit"),
        ({"method__rank": 4}, r"method\.rank=4, the adapter has 2"),
        ({"method__kind": "full"}, r"method\.kind=full, the adapter is lora"),
        ({"method__targets": ["q_proj"]}, "the adapter has its own"),
    ],
)
def test_what_does_not_go_together_is_refused(runs: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(following(runs, **changes), progress=False)
    ledger = runs / "run" / "ledger.jsonl"
    assert not ledger.exists() or read_ledger(ledger).steps == EARLIER


def test_nothing_private_starts_from_the_same_recordings_without_privacy(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = tones.settings(
        runs, privacy__enabled=False, method__kind="head", train__steps=1, output=str(runs / "plain")
    )
    train(Config.from_dict(plain), progress=False)
    head = {
        "method__kind": "head",
        "model__name": str(runs / "plain" / "model"),
        "privacy__noise_multiplier": 4.0,
    }
    with pytest.raises(ConfigError, match="nothing that starts from it can be private"):
        train(following(runs, **head), progress=False)
    tones.write_manifest(runs, 16, seed=9, name="others")
    train(following(runs, **head, train__steps=1, data__train=str(runs / "others.jsonl")))
    assert "run plain, without privacy: no ε protects" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_a_ledger_without_steps_does_not_hide_the_earlier_ones(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that failed leaves a ledger with no step; a copy that a crash cut short would count too few."""
    base = following(runs, model__name=str(runs / "model"))
    with monkeypatch.context() as patch:
        patch.setattr("asr_finetune.training.run.run_steps", crash)
        with pytest.raises(Crash):
            train(base, progress=False)
    ledger = runs / "run" / "ledger.jsonl"
    assert read_ledger(ledger).steps == 0
    with monkeypatch.context() as patch:
        replace = os.replace
        patch.setattr(os, "replace", lambda *paths: crash() if Path(paths[1]) == ledger else replace(*paths))
        with pytest.raises(Crash):
            train(following(runs), progress=False)
    assert read_ledger(ledger).steps == 0
    train(following(runs), progress=False)
    assert read_ledger(ledger).steps == EARLIER + 2


@pytest.mark.slow
def test_a_killed_continuation_counts_everything(runs: Path) -> None:
    config = following(runs, train__steps=3, train__checkpoint_every=1)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 2, crash)
        with pytest.raises(Crash):
            train(config, progress=False)
    export(config.output)  # from the checkpoint of the first step
    stopped = json.loads((runs / "run" / "stopped.json").read_text())
    assert stopped["origin"].startswith("run finished, on the same recordings: its 4 steps")
    assert stopped["privacy"]["steps"] == EARLIER + 2
    result = train(config, progress=False)
    assert read_ledger(runs / "run" / "ledger.jsonl").steps == EARLIER + 2 + 2
    assert result.epsilon == pytest.approx(epsilon(SIGMA, RATE, EARLIER + 4, DELTA), rel=1e-9)


def test_dp_rp_trains_one_factor_on(runs: Path) -> None:
    config = following(runs, method__kind="dp_rp")
    train(config, progress=False)
    first, second = (
        load_recognizer(ModelConfig(str(runs / name / "adapter"), device="cpu")).model.state_dict()
        for name in ("finished", "run")
    )
    kept = {name: torch.equal(first[name], second[name]) for name in first if "lora_" in name}
    assert all(same == ("lora_A" in name) for name, same in kept.items())
