"""Weights of a stopped run, merged adapters, and the card beside them."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from asr_finetune import cli
from asr_finetune.config.schema import Config, ConfigError, ModelConfig
from asr_finetune.models.loading import load_recognizer, load_with_adapter
from asr_finetune.report.report import ReportError, write_report
from asr_finetune.report.verify import verify
from asr_finetune.training.card import CARD, write_card
from asr_finetune.training.export import export, merge
from asr_finetune.training.run import Interrupted, train
from asr_finetune.training.run_folder import RunFolderError, saved_model
from dpkernels import checkpoint
from dpkernels.privacy import epsilon, read_ledger
from dpkernels.rounding import shown_epsilon
from tests.asr_finetune import small_models, tones
from tests.asr_finetune.models.test_methods import prepared, private_step
from tests.asr_finetune.report.report_run import record as record_by_hand
from tests.asr_finetune.report.test_report import visible
from tests.asr_finetune.training.test_train import Crash, at_step, crash


def invoke(*arguments: object) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, [str(item) for item in arguments])


def trained(folder: Path, adapter: Path) -> dict[str, torch.Tensor]:
    recognizer = load_with_adapter(ModelConfig(str(folder / "model"), device="cpu"), adapter)
    return {name: value.detach() for name, value in recognizer.model.named_parameters() if "lora_" in name}


def test_a_stopped_run_is_exported_reported_and_verified(runs: Path) -> None:
    run = runs / "stopped"
    with pytest.raises(RunFolderError, match="asr-finetune export"):
        saved_model(run)
    result = invoke("export", run)
    assert result.exit_code == 0, result.output
    assert saved_model(run) == run / "adapter"
    saved = checkpoint.load(run / "checkpoint")
    assert saved is not None
    assert saved.step == 3
    exported = trained(runs, run / "adapter")
    assert exported.keys() == {name for name in saved.parameters if "lora_" in name}
    assert all(torch.equal(value, saved.parameters[name]) for name, value in exported.items())

    record = json.loads((run / "stopped.json").read_text())
    spent = epsilon(3.0, 8 / 16, read_ledger(run / "ledger.jsonl").steps, 1e-3)
    assert record["privacy"]["epsilon"] == pytest.approx(spent, rel=1e-9)
    assert (record["steps"], record["evaluation"]["after"]) == (3, None)
    finished = json.loads((runs / "finished" / "run.json").read_text())
    assert record.keys() == finished.keys() | {"stopped"}
    assert record["privacy"].keys() == finished["privacy"].keys()
    assert record["model"] == finished["model"]
    assert record["data"]["units"] == finished["data"]["units"] == 16
    assert all(finding.agrees for finding in verify(run))
    text = visible(write_report(run, run / "report.html").read_text())
    assert "Training was stopped. This report is on the model after 3 steps" in text
    assert f"({shown_epsilon(spent)}, 0.001)-differential privacy" in (run / "adapter" / CARD).read_text()
    assert "that of step 3 of 4" in (run / "adapter" / CARD).read_text()
    assert all(finding.agrees for finding in verify(run))
    assert {"ε in report.html", "ε in adapter/README.md"} <= {finding.what for finding in verify(run)}


@pytest.mark.slow
def test_an_exported_run_can_be_continued(runs: Path) -> None:
    run = runs / "stopped"
    export(run)
    values = yaml.safe_load((run / "config.yaml").read_text())
    config = Config.from_dict({**values, "output": str(run)})
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 4, crash)
        with pytest.raises(Crash):
            train(config, progress=False)
    assert not (run / "stopped.json").exists()  # it did not know step 4
    with pytest.raises(ReportError, match="asr-finetune export"):
        write_report(run, run / "report.html")
    export(run)
    assert json.loads((run / "stopped.json").read_text())["privacy"]["steps"] == 4
    train(config, progress=False)
    write_report(run, run / "report.html")
    assert all(finding.agrees for finding in verify(run))
    assert not (run / "stopped.json").exists()


def test_a_record_of_fewer_steps_than_the_ledger_is_refused(runs: Path) -> None:
    run = runs / "stopped"
    export(run)
    record = json.loads((run / "stopped.json").read_text())
    record["privacy"]["steps"] -= 1
    (run / "stopped.json").write_text(json.dumps(record))
    with pytest.raises(ReportError, match="export the run again"):
        write_report(run, run / "report.html")


def test_a_finished_run_is_exported_elsewhere(runs: Path) -> None:
    run, out = runs / "finished", runs / "elsewhere"
    assert export(run, out) == out
    first, second = trained(runs, run / "adapter"), trained(runs, out)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (out / CARD).read_text() == (run / "adapter" / CARD).read_text()
    assert not (run / "stopped.json").exists()


def test_what_cannot_be_exported(runs: Path) -> None:
    with pytest.raises(RunFolderError, match=r"no config\.yaml"):
        export(runs)
    shutil.rmtree(runs / "stopped" / "checkpoint")
    with pytest.raises(RunFolderError, match="no checkpoint yet"):
        export(runs / "stopped")


def test_a_run_without_privacy_is_exported_as_such(runs: Path) -> None:
    values = tones.settings(runs, privacy__enabled=False, method__kind="head", train__steps=3)
    config = Config.from_dict(values)
    with pytest.MonkeyPatch.context() as patch:
        tones.interrupt_after(patch, 2)
        with pytest.raises(Interrupted):
            train(config, progress=False)
    assert export(config.output) == Path(config.output) / "model"
    card = (Path(config.output) / "model" / CARD).read_text()
    assert "This model is NOT PRIVATE" in card
    assert "differential privacy**" not in card
    assert "not-private" in card
    assert load_recognizer(ModelConfig(str(Path(config.output) / "model"), device="cpu")).name


def test_the_card_says_what_was_spent_and_measured(runs: Path) -> None:
    run = runs / "finished"
    record = json.loads((run / "run.json").read_text())
    card = ModelCard.load(run / "adapter" / CARD)
    text = card.text
    for part in (
        f"({shown_epsilon(record['privacy']['epsilon'])}, 0.001)-differential privacy",
        "| Noise multiplier, σ | 3.000 |",
        "| Clipping norm, C | 1 |",
        "| Sampling | poisson, probability 0.5 |",
        "| Training data | 16 recordings |",
        "| Accountant | PLD, dp-accounting",
        "| clean | before |",
        "| other | after |",
        "| 4 of 5 |",
        "peft.PeftModel.from_pretrained",
        "To be filled in",
        "dpkernels 0.1.0",
    ):
        assert part in text, part
    for rate in (100 * value for value in record["evaluation"]["after"]["clean"]["wer_ci"]):
        assert f"{rate:.1f} %" in text
    assert card.data.library_name == "peft"
    assert {result.dataset_name for result in card.data.eval_results} == {"clean", "other"}
    assert card.data.license is None
    assert str(runs.parent) not in (run / "adapter" / CARD).read_text()  # no folder of this machine
    secrets = [
        json.loads(line)["loss"] for line in (run / "not_private" / "history.jsonl").read_text().splitlines()
    ]
    assert secrets
    assert not any(f"{loss:.2f}" in text for loss in secrets)


@pytest.mark.parametrize("pieces", [True, False])
def test_a_cards_unit_is_a_piece_where_recordings_were_cut(tmp_path: Path, pieces: bool) -> None:
    values = record_by_hand()
    values["model"] |= {"vocabulary": 30, "new_head": False}
    values["data"]["pieces"] = pieces
    text = write_card(tmp_path, values, "run").read_text()
    assert ("The guarantee is for a piece of a recording, not for a recording or a person." in text) is pieces
    assert ("| Unit of privacy | one piece; " in text) is pieces
    assert ("The guarantee is for a recording, not for a person." in text) is not pieces


@pytest.mark.parametrize(
    "changes",
    [
        {"unit": "speaker", "max_examples_per_speaker": 3},
        {"max_batch_size": 200, "sampling": "truncated_poisson"},
    ],
)
def test_a_card_of_any_mechanism(tmp_path: Path, changes: dict[str, Any]) -> None:
    values = record_by_hand(**changes)
    values["model"] |= {"vocabulary": 30, "new_head": False}
    text = write_card(tmp_path, values, "run").read_text()
    expected = (
        "at most 3 utterances of each"
        if "unit" in changes
        else "truncated poisson, probability 0.05, at most 200 in"
    )
    assert expected in text
    with pytest.raises(ValueError, match="nan"):  # never a card without its ε
        write_card(tmp_path, {**values, "privacy": {**values["privacy"], "epsilon": float("nan")}}, "run")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["parakeet", "whisper"])
def test_a_merged_model_writes_what_the_adapter_writes(folders: Any, tmp_path: Path, family: str) -> None:
    recognizer = prepared(folders[family], "lora")
    private_step(recognizer)
    with torch.no_grad():
        for name, parameter in recognizer.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    recognizer.save(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", str(folders[family]))
    adapted = load_with_adapter(ModelConfig(str(folders[family]), device="cpu"), tmp_path / "adapter")
    merged = load_recognizer(ModelConfig(str(tmp_path / "merged"), device="cpu"))
    base = small_models.load(folders[family])
    assert merged.model is merged.base
    batch, _ = small_models.batch_and_singles(base)
    with torch.no_grad():
        first, second, unchanged = (small_models.logits(model, batch) for model in (adapted, merged, base))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
    assert (first - unchanged).abs().max() > 10 * (first - second).abs().max()


def test_merging_keeps_the_card_with_its_own_way_to_load(runs: Path) -> None:
    result = invoke("merge", runs / "finished", "--output", runs / "merged")
    assert result.exit_code == 0, result.output
    card = ModelCard.load(runs / "merged" / CARD)
    assert card.data.library_name == "transformers"
    assert "peft.PeftModel" not in card.text
    statement = re.search(r"\([\d.]+, 0\.001\)-differential privacy", card.text)
    assert statement is not None
    assert statement[0] in (runs / "finished" / "adapter" / CARD).read_text()
    with pytest.raises(ConfigError, match="not empty"):
        merge(runs / "finished", runs / "merged")
    with pytest.raises(ConfigError, match="nothing to merge"):
        merge(runs / "merged", runs / "again")


def test_a_new_head_is_merged_with_its_classes(folders: Any, tmp_path: Path) -> None:
    recognizer = prepared(folders["wav2vec2-bert"], "lora", new_head=True, vocabulary="characters")
    recognizer.save(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", str(folders["wav2vec2-bert"]))
    merged = load_recognizer(ModelConfig(str(tmp_path / "merged"), device="cpu"))
    assert (merged.classes, merged.new_head) == (recognizer.classes, False)
    batch, _ = small_models.batch_and_singles(merged)
    with torch.no_grad():
        torch.testing.assert_close(
            small_models.logits(merged, batch), small_models.logits(recognizer, batch), rtol=1e-4, atol=1e-4
        )


def test_the_card_says_where_adaptive_clipping_began_and_ended(tmp_path: Path) -> None:
    write_card(tmp_path, record_by_hand(clipping="adaptive", clip_norm=0.25), "run")
    said = "| Clipping norm, C | 1 at the start and 0.25 at the end, adaptive clipping |"
    assert said in (tmp_path / CARD).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["bookkeeping", "per_layer"])
def test_adaptive_clipping_is_trained_stopped_resumed_and_verified(
    strategy: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"privacy__clipping": "adaptive", "privacy__strategy": strategy}
    values = tones.settings(runs, **changes, output=str(tmp_path / "run"))
    config, folder = Config.from_dict(values), tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 3, crash)
        with pytest.raises(Crash):
            train(config, progress=False)
    saved = checkpoint.load(folder / "checkpoint")
    assert saved is not None
    assert saved.privacy is not None
    norms = [entry["clip_norm"] for entry in train(config, progress=False).history]
    kept = saved.privacy["clip_norm"]
    assert norms[1] == pytest.approx(kept if strategy != "per_layer" else math.hypot(*kept.values()))
    assert len(set(norms)) == len(norms) == 3  # of four steps that ε allows, the crash lost one
    record = json.loads((folder / "run.json").read_text())
    assert record["privacy"]["clip_norm"] == norms[-1]
    write_report(folder, folder / "report.html")
    assert all(finding.agrees for finding in verify(folder))
    said = "squared norms, one for each trained parameter; each follows the median" in visible(
        (folder / "report.html").read_text()
    )
    assert said == (strategy == "per_layer")


def test_automatic_clipping_reaches_ledger_record_and_card(runs: Path) -> None:
    # σ is given: to find that of another number of steps takes seconds
    privacy = {"noise_multiplier": 1.0, "delta": 1e-3, "clipping": "automatic"}
    values = tones.settings(runs, privacy=privacy, train__steps=2, output=str(runs / "automatic"))
    config = Config.from_dict(values)
    train(config, progress=False)
    folder = Path(config.output)
    assert '"clipping": "automatic"' in (folder / "ledger.jsonl").read_text()
    assert json.loads((folder / "run.json").read_text())["privacy"]["clipping"] == "automatic"
    assert "| Clipping norm, C | 1, automatic clipping |" in next(folder.glob(f"*/{CARD}")).read_text()
