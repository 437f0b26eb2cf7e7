"""Checkpoints of a private Trainer: what they hold, what loads them, and how a run goes on from one."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from dpkernels.interop.trainer import TrainerError, checkpoints  # noqa: E402
from dpkernels.privacy import LedgerError  # noqa: E402
from tests.interop.trainers import Case, Weights, case, privacy, trainer, weights_of  # noqa: E402

SAVED = {"save_strategy": "steps", "save_steps": 1}


def run(
    folder: Path, of: Case, *, resume: Any = None, **given: Any
) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    seen = Weights()
    made = trainer(folder, of, callbacks=[seen, *given.pop("callbacks", [])], **given)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="noise_key|noise_multiplier=0")
        made.train(resume_from_checkpoint=resume)
    return made, seen.after


class Stop(transformers.TrainerCallback):
    """Raises after a step, as a crash would."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.after:
            raise KeyboardInterrupt


def crashed(folder: Path, of: Case, after: int, **given: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(folder, of, callbacks=[Stop(after)], **{**SAVED, **given})


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", ["causal", "sequence", "seq2seq"])
def test_a_checkpoint_loads_in_plain_transformers(name: str, tmp_path: Path) -> None:
    of = case(name)
    _, after = run(tmp_path, of, max_steps=1, **SAVED)
    plain = type(of.model).from_pretrained(tmp_path / "checkpoint-1")
    assert type(plain).__module__.startswith("transformers.")
    loaded = weights_of(plain)
    assert loaded.keys() == after[0].keys()
    assert all(torch.equal(loaded[name], value) for name, value in after[0].items())


def test_a_checkpoint_has_no_generator_state_and_no_key(tmp_path: Path) -> None:
    run(tmp_path, case("sequence"), max_steps=1, private=privacy(noise_key=None), **SAVED)
    files = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    assert "privacy_state.json" in files
    assert not any("rng" in name for name in files)


# With q = 1 and without noise the steps do not depend on the keys, which a resumed run draws anew.
KNOWN = {"per_device_train_batch_size": 12, "private": privacy(noise_multiplier=0.0)}


@pytest.mark.parametrize(
    "given",
    [
        {"max_steps": 4},
        {
            "max_steps": -1,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 12,
            "gradient_accumulation_steps": 1,
        },
    ],
)
def test_a_resumed_run_takes_the_steps_of_an_uninterrupted_one(given: dict[str, Any], tmp_path: Path) -> None:
    """In the second case checkpoint 3 lies within the second epoch of two steps; q = 1/2 there, so steps differ."""
    exact = "num_train_epochs" not in given
    whole, expected = run(tmp_path / "whole", case("sequence"), **{**KNOWN, **given})
    crashed(tmp_path / "parts", case("sequence"), 4, **{**KNOWN, **given})
    resumed, after = run(tmp_path / "parts", case("sequence"), resume=True, **{**KNOWN, **given, **SAVED})
    last = resumed.state.log_history[-1]["step"]
    assert resumed.state.global_step == whole.state.global_step == last == 4
    assert len(after) == 1  # checkpoint 3 is the last: the crash came before the fourth was saved
    assert resumed.state.epoch == whole.state.epoch
    assert resumed.lr_scheduler.state_dict() == whole.lr_scheduler.state_dict()
    if exact:
        for ours, theirs in zip(after, expected[3:], strict=True):
            assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_the_ledger_counts_the_steps_after_the_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    private = privacy(ledger=str(tmp_path / "ledger.jsonl"))
    crashed(tmp_path, case("sequence"), 3, private=private, save_steps=2, max_steps=6)
    resumed, after = run(tmp_path, case("sequence"), resume=True, private=private, max_steps=6)
    assert "1 steps were spent after checkpoint" in caplog.text
    assert resumed.engine.steps == 6
    assert len(after) == 3  # from step 2 on, and one of the four is spent
    assert resumed.state.global_step == 5


@pytest.mark.parametrize("counted", [True, False])
def test_without_a_ledger_the_checkpoint_counts(counted: bool, tmp_path: Path) -> None:
    """By its own file, and by the optimizer's: once."""
    crashed(tmp_path, case("sequence"), 3)
    path = tmp_path / "checkpoint-2" / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    if not counted:
        del state["privacy"]
    torch.save(state, path)
    resumed, _ = run(tmp_path, case("sequence"), resume=True, **SAVED)
    assert resumed.engine.steps == 4
    assert len(resumed.engine.history) == 2


@pytest.mark.parametrize("name", ["privacy_state.json", "optimizer.pt", "scheduler.pt"])
def test_a_checkpoint_that_lacks_a_file_is_refused(name: str, tmp_path: Path) -> None:
    crashed(tmp_path, case("sequence"), 2)
    (tmp_path / "checkpoint-1" / name).unlink()
    with pytest.raises(TrainerError, match=rf"resume_from_checkpoint=.*lacks \['{name}'\]"):
        run(tmp_path, case("sequence"), resume=True)


def other_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"] = weights["classifier.bias"] + 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def fewer_steps(folder: Path) -> None:
    state = json.loads((folder / "privacy_state.json").read_text())
    for spent in state["engine"]["runs"].values():
        spent["steps"] = 0
    del state["sha256"]
    text = json.dumps({**state, "sha256": checkpoints._checksum(state)})
    (folder / "privacy_state.json").write_text(text)


@pytest.mark.parametrize("change", [other_weights, fewer_steps])
def test_a_checkpoint_of_several_runs_is_refused(change: Any, tmp_path: Path) -> None:
    crashed(tmp_path, case("sequence"), 2)
    change(tmp_path / "checkpoint-1")
    with pytest.raises(TrainerError, match="its files are not of one run"):
        run(tmp_path, case("sequence"), resume=True)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"noise_multiplier": 1', '"noise_multiplier": 9'),
        ('"steps": 1', '"steps": 0'),
        ("}", ""),
        ('"sha256"', '"a"'),
    ],
)
def test_damaged_spending_is_refused(old: str, new: str, tmp_path: Path) -> None:
    """Without a ledger the checkpoint alone says what was spent: no changed digit may make ε smaller."""
    state = {"runs": {"a": {"mechanism": {"noise_multiplier": 1.5}, "steps": 1}}}
    checkpoints.save_state(str(tmp_path), torch.nn.Linear(2, 2), state, {})
    assert checkpoints._read_state(str(tmp_path))["engine"] == state
    path = tmp_path / "privacy_state.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(TrainerError, match=r"resume_from_checkpoint=.*privacy_state.json is damaged"):
        checkpoints._read_state(str(tmp_path))


def test_a_checkpoint_of_another_ledger_is_refused(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    crashed(tmp_path, case("sequence"), 2, private=privacy(ledger=str(ledger)))
    ledger.unlink()
    with pytest.raises(LedgerError, match="lacks the line after which the checkpoint was written"):
        run(tmp_path, case("sequence"), resume=True, private=privacy(ledger=str(ledger)))


def test_a_model_goes_on_in_the_process_of_a_crash(tmp_path: Path) -> None:
    """The crashed run has released the model and its ledger."""
    of, private = case("sequence"), privacy(ledger=str(tmp_path / "ledger.jsonl"))
    crashed(tmp_path, of, 2, private=private)
    resumed, _ = run(tmp_path, of, resume=True, private=private)
    assert resumed.engine.steps == 4


def test_an_interrupted_run_can_be_evaluated(tmp_path: Path) -> None:
    """Its ledger is closed; the ε of an earlier step would be too small."""
    of = case("sequence")
    given = {"callbacks": [Stop(2)], "eval_dataset": of.data[:4], "logging_steps": 1}
    made = trainer(tmp_path, of, private=privacy(ledger=str(tmp_path / "ledger.jsonl")), **given)
    with pytest.warns(UserWarning, match="noise_key"), pytest.raises(KeyboardInterrupt):
        made.train()
    assert "epsilon" in made.state.log_history[-1]
    assert made.evaluate()["eval_loss"] > 0
    assert "epsilon" not in made.state.log_history[-1]


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    of = case("sequence")
    given = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1}
    made, after = run(tmp_path, of, max_steps=2, eval_dataset=of.data[:4], **SAVED, **given)
    best = made.state.best_global_step
    assert all(torch.equal(value, after[best - 1][name]) for name, value in weights_of(of.model).items())


def test_adapters_go_on(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> Case:
        of = case("causal")
        torch.manual_seed(0)
        of.model = peft.get_peft_model(
            of.model, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        )
        return of

    _, expected = run(tmp_path / "whole", adapted(), max_steps=3, **KNOWN)
    crashed(tmp_path / "parts", adapted(), 2, max_steps=3, **KNOWN)
    _, after = run(tmp_path / "parts", adapted(), resume=True, max_steps=3, **KNOWN)
    for ours, theirs in zip(after, expected[1:], strict=True):
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
