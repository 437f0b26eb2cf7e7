"""PrivateTrainer: the engine's own loop, step by step, and everything of Trainer's around it."""

from __future__ import annotations

import copy
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from dpkernels.interop.trainer import PrivacyArguments, PrivateTrainer, TrainerError  # noqa: E402
from dpkernels.privacy import AdaptiveClipping, SelfCheckError, read_ledger  # noqa: E402
from tests.interop.trainers import (  # noqa: E402
    Case,
    Weights,
    case,
    engine_loop,
    privacy,
    trainer,
    weights_of,
)


def run(folder: Path, of: Case, **given: Any) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """A trainer that has trained, and the parameters after each step."""
    seen = Weights()
    made = trainer(folder, of, callbacks=[seen, *given.pop("callbacks", [])], **given)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="noise_key|noise_multiplier=0")
        made.train()
    return made, seen.after


def assert_same(ours: list[dict[str, torch.Tensor]], theirs: list[dict[str, torch.Tensor]]) -> None:
    assert len(ours) == len(theirs)
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for name in b:
            assert torch.equal(a[name], b[name]), f"{name} after step {step + 1}"


@pytest.mark.parametrize("name", ["causal", "sequence", "seq2seq"])
def test_it_takes_the_steps_of_the_engines_own_loop(name: str, tmp_path: Path) -> None:
    of = case(name)
    expected = engine_loop(of)
    _, after = run(tmp_path, of)
    assert_same(after, expected)
    assert not torch.equal(*(torch.cat([p.flatten() for p in w.values()]) for w in (after[0], after[-1])))


CLIPPINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"clipping": "automatic"}, {"clipping": "automatic"}),
    ({"clipping": "adaptive"}, {"clipping": "adaptive"}),
    (
        {"clipping": "adaptive", "target_unclipped_quantile": 0.25, "strategy": "per_layer"},
        {"clipping": AdaptiveClipping(target_unclipped_quantile=0.25), "strategy": "per_layer"},
    ),
]


@pytest.mark.parametrize(("given", "expected"), CLIPPINGS, ids=["automatic", "adaptive", "per_layer"])
def test_a_clipping_is_that_of_the_engines_own_loop(
    given: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    of = case("sequence")
    theirs = engine_loop(of, steps=2, **expected)
    made, ours = run(tmp_path, of, private=privacy(**given, accountant="rdp"), max_steps=2, logging_steps=1)
    assert_same(ours, theirs)
    adapts = given["clipping"] == "adaptive"
    norms = [entry["clip_norm"] for entry in made.state.log_history[:2] if "clip_norm" in entry]
    assert len(norms) == 2 * adapts
    if adapts:
        assert norms[1] == made.engine.clip_norm != norms[0]


@pytest.mark.parametrize(
    "given",
    [
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    ],
)
def test_the_logical_batch_is_the_same_in_other_micro_batches(given: dict[str, int], tmp_path: Path) -> None:
    made, after = run(tmp_path, case("sequence"), **given)
    assert made.engine.sampling.expected_batch_size == 8
    for ours, theirs in zip(after, engine_loop(case("sequence")), strict=True):
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4)


def test_a_schedule_and_an_optimizer_of_the_users_are_taken(tmp_path: Path) -> None:
    of = case("sequence")
    optimizer = torch.optim.SGD(of.model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    given = {"optimizers": (optimizer, schedule), "logging_steps": 1}
    made, _ = run(tmp_path, of, private=privacy(noise_multiplier=0.0), **given)
    assert made.optimizer.original_optimizer is optimizer
    assert [entry["learning_rate"] for entry in made.state.log_history[:4]] == [0.5, 0.25, 0.125, 0.0625]


def test_empty_logical_batches_are_steps(tmp_path: Path) -> None:
    of = case("sequence")
    made, after = run(
        tmp_path,
        of,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        max_steps=8,
        logging_steps=1,
    )
    losses = [entry["loss_NOT_PRIVATE"] for entry in made.state.log_history[:8]]
    assert 0.0 in losses, "no logical batch was empty: choose another key"
    assert made.engine.steps == made.state.global_step == len(after) == 8


def test_epochs_are_rounds_of_logical_batches(tmp_path: Path) -> None:
    made, after = run(tmp_path, case("sequence"), max_steps=-1, num_train_epochs=2)
    assert len(after) == made.state.max_steps == made.engine.steps == 6  # 2 × round(24/8)
    assert made.state.epoch == 2


def test_epsilon_is_in_every_log_and_no_norm_or_count_of_the_data(tmp_path: Path) -> None:
    given = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 2, "per_device_train_batch_size": 12}
    made, _ = run(tmp_path, case("sequence"), private=privacy(accountant="rdp"), **given)  # q = 1: quick
    logged = made.state.log_history
    assert [entry["step"] for entry in logged] == [2, 3, 4, 4]
    assert all(entry["delta"] == 1e-3 for entry in logged)
    spent = [entry["epsilon"] for entry in logged]
    exact = made.engine.get_epsilon(1e-3)
    assert spent == sorted(spent)
    assert exact <= spent[-1] <= exact + 1e-3
    keys = {key for entry in logged for key in entry}
    assert not keys & {"loss", "train_loss", "grad_norm", "num_input_tokens_seen"}
    assert {"loss_NOT_PRIVATE", "train_loss_NOT_PRIVATE"} <= keys
    saved = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert saved["log_history"][-1]["epsilon"] == spent[1]
    assert saved["total_flos"] == 0


def test_the_loss_of_the_training_batches_may_be_left_out(tmp_path: Path) -> None:
    made, _ = run(
        tmp_path, case("sequence"), max_steps=1, logging_steps=1, private=privacy(log_training_loss=False)
    )
    assert not any("loss" in key for entry in made.state.log_history for key in entry)


def test_the_logged_loss_is_the_sum_over_the_expected_batch(tmp_path: Path) -> None:
    """With q = 1 a logical batch is the whole training set."""
    of = case("sequence")
    losses = torch.stack([copy.deepcopy(of.model)(**of.collate([row])).loss for row in of.data])
    made, _ = run(tmp_path, of, per_device_train_batch_size=12, max_steps=1, logging_steps=1)
    assert made.state.log_history[0]["loss_NOT_PRIVATE"] == pytest.approx(losses.mean().item(), rel=1e-4)


def test_sigma_follows_from_epsilon(tmp_path: Path) -> None:
    private = privacy(target_epsilon=8.0, noise_multiplier=None, accountant="rdp")
    # q = 1, where the calibration is quick
    made, _ = run(tmp_path, case("sequence"), per_device_train_batch_size=12, max_steps=1, private=private)
    assert 7.5 < made.state.log_history[-1]["epsilon"] <= 8.0
    assert made.engine.target_epsilon == 8.0


def test_the_self_check_runs_before_the_first_step_and_stops_the_run(tmp_path: Path) -> None:
    def mixing(model: Any, inputs: Any) -> torch.Tensor:
        losses = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits.square().sum(1)
        return losses - losses.mean()

    of = case("sequence")
    made = trainer(tmp_path, of, private=privacy(self_check=True), compute_loss_per_example=mixing)
    with pytest.warns(UserWarning, match="noise_key"), pytest.raises(SelfCheckError):
        made.train()
    assert made.engine.steps == 0
    run(tmp_path, of, max_steps=1)  # the model is free for another run


def test_training_stops_at_its_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """σ is given, and ε is a limit that four steps do not keep."""
    private = privacy(target_epsilon=8.0, accountant="rdp")
    made, after = run(
        tmp_path, case("sequence"), per_device_train_batch_size=12, private=private
    )  # q = 1: quick
    assert 0 < len(after) < 4
    assert made.engine.steps == made.state.global_step == len(after)
    assert made.state.log_history[-1]["epsilon"] <= 8.0
    assert "training stops: the next step would exceed target_epsilon=8.0" in caplog.text


def test_evaluation_and_prediction_are_trainers_own(tmp_path: Path) -> None:
    of = case("sequence")
    made, _ = run(
        tmp_path,
        of,
        eval_strategy="steps",
        eval_steps=2,
        eval_dataset=of.data[:6],
        label_smoothing_factor=0.1,
    )
    evaluated = [entry for entry in made.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluated] == [2, 4]
    assert made.predict(of.data[:6]).predictions.shape == (6, 3)
    assert of.model.training is False  # as after Trainer's own


def test_generation_in_an_evaluation(tmp_path: Path) -> None:
    of = case("seq2seq")
    of.model.generation_config.max_length = 5
    made, _ = run(
        tmp_path,
        of,
        max_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset=of.data[:2],
        predict_with_generate=True,
    )
    assert any("eval_loss" in entry for entry in made.state.log_history)


def test_bf16_is_an_autocast_in_training_and_evaluation(tmp_path: Path) -> None:
    of = case("sequence")
    dtypes = []
    of.model.classifier.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    made, after = run(tmp_path, of, bf16=True, private=privacy(self_check=True), eval_dataset=of.data[:4])
    dtypes.clear()
    made.evaluate()
    assert set(dtypes) == {torch.bfloat16}
    assert all(value.dtype == torch.float32 for value in after[-1].values())
    assert any(
        not torch.equal(after[-1][name], value) for name, value in engine_loop(case("sequence"))[-1].items()
    )


@pytest.mark.parametrize("strategy", ["two_pass", "bookkeeping"])
def test_gradient_checkpointing(strategy: str, tmp_path: Path) -> None:
    of = case("causal")
    expected = engine_loop(of, strategy=strategy)
    _, after = run(tmp_path, of, gradient_checkpointing=True, private=privacy(strategy=strategy))
    for ours, theirs in zip(after, expected, strict=True):
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_adapters_of_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    of = case("causal")
    of.model = peft.get_peft_model(
        of.model,
        peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False),
    )
    expected = engine_loop(of)
    made, after = run(tmp_path, of)
    assert_same(after, expected)
    made.save_model(str(tmp_path / "adapter"))
    plain = peft.PeftModel.from_pretrained(case("causal").model, tmp_path / "adapter")
    saved = {name: value for name, value in weights_of(plain).items() if "lora" in name}
    assert saved
    assert all(torch.equal(value, after[-1][name]) for name, value in saved.items())


def test_lengths_and_speakers_reach_the_engine(tmp_path: Path) -> None:
    of = case("causal")
    made, _ = run(
        tmp_path,
        of,
        lengths=[len(row["labels"]) for row in of.data],
        speakers=[index % 6 for index in range(len(of.data))],
        private=privacy(
            unit="speaker",
            max_examples_per_speaker=2,
            ledger=str(tmp_path / "ledger.jsonl"),
            self_check=True,  # without it no step is taken
        ),
    )
    assert (made.engine.sampling.unit, made.engine.sampling.units) == ("speaker", 6)
    assert made._expected_batch_size() == 8
    made.engine.close()
    assert sum(run.steps for run in read_ledger(tmp_path / "ledger.jsonl").runs) == 4


def test_a_trainer_trains_once(tmp_path: Path) -> None:
    made, _ = run(tmp_path, case("sequence"), max_steps=1)
    with pytest.raises(RuntimeError, match=r"train was called before.*Make another trainer"):
        made.train()


def test_a_model_from_model_init(tmp_path: Path) -> None:
    of = case("sequence")
    expected = engine_loop(of)
    _, after = run(tmp_path, of, model_init=lambda: copy.deepcopy(of.model))
    assert_same(after, expected)


def test_arguments_are_read_from_a_command_line() -> None:
    parser = transformers.HfArgumentParser(PrivacyArguments)
    (read,) = parser.parse_args_into_dataclasses(
        ["--target_epsilon", "8", "--target_delta", "1e-5", "--max_grad_norm", "0.5", "--ledger", "a.jsonl"]
    )
    assert read == PrivacyArguments(target_epsilon=8, target_delta=1e-5, max_grad_norm=0.5, ledger="a.jsonl")


def test_without_noise_epsilon_is_infinite(tmp_path: Path) -> None:
    made, _ = run(tmp_path, case("sequence"), max_steps=1, private=privacy(noise_multiplier=0.0))
    assert math.isinf(made.state.log_history[-1]["epsilon"])


def test_a_subclass_has_its_own_loss(tmp_path: Path) -> None:
    class Halved(PrivateTrainer):
        def compute_loss_per_example(self, model: Any, inputs: Any) -> torch.Tensor:
            return super().compute_loss_per_example(model, inputs) / 2

    of = case("sequence")
    halved, _ = run(tmp_path, copy.deepcopy(of), kind=Halved, max_steps=1)
    whole, _ = run(tmp_path, of, max_steps=1)
    ratio = (
        halved.state.log_history[-1]["train_loss_NOT_PRIVATE"]
        / whole.state.log_history[-1]["train_loss_NOT_PRIVATE"]
    )
    assert ratio == pytest.approx(0.5)


def test_the_accelerators_backward_is_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, case("sequence"))
    with pytest.raises(TrainerError, match=r"accelerator\.backward\(loss\) is refused"):
        made.accelerator.backward(torch.zeros((), requires_grad=True))


def test_the_accelerator_wraps_neither_model_nor_optimizer(tmp_path: Path) -> None:
    """Its own prepare would replace the model's forward for bf16, and the optimizer by one that may skip steps."""
    of = case("sequence")
    made = trainer(tmp_path, of, bf16=True)
    optimizer = made.create_optimizer()
    assert made.accelerator.prepare(of.model, optimizer) == (of.model, optimizer)
    assert "forward" not in vars(of.model)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_columns_that_the_model_does_not_take_are_left_out(workers: int, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    of = case("sequence")
    expected = engine_loop(of)
    rows = [{**row, "input_ids": row["input_ids"].tolist(), "text": "secret"} for row in of.data]
    rows = [{**row, "attention_mask": row["attention_mask"].tolist()} for row in rows]
    _, after = run(
        tmp_path, of, train_dataset=datasets.Dataset.from_list(rows), dataloader_num_workers=workers
    )
    assert_same(after, expected)


def test_trainers_of_one_model_in_turn_state_one_epsilon(tmp_path: Path) -> None:
    of = case("sequence")
    given = {"per_device_train_batch_size": 12, "private": privacy(accountant="rdp")}  # q = 1: quick
    whole, _ = run(tmp_path, case("sequence"), max_steps=3, **given)
    run(tmp_path, of, max_steps=2, **given)
    with pytest.warns(UserWarning, match="trained by 2 private steps of earlier runs"):
        second, after = run(tmp_path, of, max_steps=1, **given)
    assert len(after) == 1
    assert second.state.log_history[-1]["epsilon"] == whole.state.log_history[-1]["epsilon"]
