"""What a private Trainer refuses: each by name, with the fix, and before anything is spent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from dpkernels.errors import UserError  # noqa: E402
from dpkernels.interop.trainer import PrivacyArguments, PrivateTrainer, TrainerError  # noqa: E402
from dpkernels.interop.trainer.arguments import REFUSALS, check_accelerator, check_arguments  # noqa: E402
from dpkernels.privacy import AdaptiveClipping  # noqa: E402
from tests.interop.trainers import arguments, case, privacy, trainer  # noqa: E402

# Values that TrainingArguments itself accepts here, and the fix that the message names.
GIVEN = {
    "max_grad_norm": (0.3, r"PrivacyArguments\(max_grad_norm=\.\.\.\)"),
    "train_sampling_strategy": ("group_by_length", r"lengths=\[\.\.\.\]"),
    "dataloader_drop_last": (True, "leave it out"),
    "auto_find_batch_size": (True, "halved and repeated"),
    "neftune_noise_alpha": (5.0, "leave it out"),
    "include_num_input_tokens_seen": ("all", "leave it out"),
    "gradient_checkpointing_kwargs": ({"use_reentrant": True}, r"'use_reentrant': False"),
    "torch_compile": (True, "leave it out"),
    "use_liger_kernel": (True, "leave it out"),
    "optim": ("adalomo", "use adamw_torch"),
}
# Set afterwards: TrainingArguments asks for packages or hardware that are not here, or has no such field (TRL's).
SET = {
    "fp16": (True, "use bf16"),
    "deepspeed": ("zero3.json", "torchrun"),
    "fsdp": ("full_shard", "torchrun"),
    "parallelism_config": (object(), "torchrun"),
    "_n_gpu": (2, "torchrun"),
    "packing": (True, "leave it out"),
    "padding_free": (True, "leave it out"),
}


def test_every_refusal_has_a_case() -> None:
    assert {refusal.name for refusal in REFUSALS} == {*GIVEN, *SET, "n_gpu"} - {"_n_gpu"}


@pytest.mark.parametrize("name", GIVEN)
def test_an_argument_is_refused_by_name(name: str, tmp_path: Path) -> None:
    value, fix = GIVEN[name]
    with pytest.raises(TrainerError, match=rf"TrainingArguments\({name}={value}\) is refused: .*{fix}"):
        check_arguments(arguments(tmp_path, **{name: value}))


@pytest.mark.parametrize("name", SET)
def test_an_argument_that_needs_other_machines_is_refused_by_name(name: str, tmp_path: Path) -> None:
    value, fix = SET[name]
    args = arguments(tmp_path)
    assert args.n_gpu <= 1  # the first look at it sets it up
    setattr(args, name, value)
    with pytest.raises(TrainerError, match=rf"{name.strip('_')}=.* is refused: [\s\S]*{fix}"):
        check_arguments(args)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"clipping": "ghost"}, r"clipping='ghost' is refused: .*'flat', 'automatic' or 'adaptive'"),
        (
            {"clipping": "automatic", "strategy": "per_layer"},
            r"clipping='automatic' with strategy='per_layer' is refused",
        ),
        ({"clipbound_learning_rate": 0.1}, r"clipbound_learning_rate=0.1 with clipping='flat': .*'adaptive'"),
        (
            {"clipping": "adaptive", "target_unclipped_quantile": 1.0},
            r"target_unclipped_quantile=1.0 must lie between 0 and 1",
        ),
        ({"clipping_unit": "speaker"}, r"clipping_unit='speaker' with unit='example'"),
        (
            {"clipping_unit": "speaker", "unit": "speaker", "self_check": False},
            r"clipping_unit='speaker' with self_check=False",
        ),
    ],
)
def test_a_clipping_that_cannot_be_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainerError, match=f"PrivacyArguments: .*{message}"):
        PrivacyArguments(target_epsilon=8, target_delta=1e-3, max_grad_norm=1.0, **given)


def test_a_command_line_gives_the_clipping() -> None:
    line = (
        "--target_delta 1e-3 --max_grad_norm 1 --target_epsilon 8 --clipping adaptive --unclipped_num_std 5"
    )
    (parsed,) = transformers.HfArgumentParser(PrivacyArguments).parse_args_into_dataclasses(line.split())
    assert parsed.of_run()["clipping"] == AdaptiveClipping(unclipped_num_std=5)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_defaults_are_accepted(value: float, tmp_path: Path) -> None:
    check_arguments(arguments(tmp_path, max_grad_norm=value))
    check_arguments(transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True))


@pytest.mark.parametrize(
    "kind", ["lomo", "adalomo", "schedule_free_adamw", "galore_adamw_layerwise", "apollo_adamw_layerwise"]
)
def test_optimizers_that_act_before_the_step_are_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match=rf"optim={kind}"):
        check_arguments(arguments(tmp_path, optim=kind))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kind", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop"])
def test_optimizers_that_act_in_the_step_train(kind: str, tmp_path: Path) -> None:
    of = case("sequence")
    made = trainer(tmp_path, of, optim=kind, max_steps=1)
    before = of.model.classifier.weight.clone()
    with pytest.warns(UserWarning, match="noise_key"):
        made.train()
    assert not torch.equal(before, of.model.classifier.weight)


def test_a_refusal_comes_with_the_trainer_and_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"max_grad_norm=0\.5"):
        trainer(tmp_path, case("sequence"), max_grad_norm=0.5)


@pytest.mark.parametrize(
    ("attribute", "name"),
    [("is_deepspeed_enabled", "deepspeed"), ("is_fsdp_enabled", "fsdp"), ("fp16", "fp16")],
)
def test_accelerates_own_configuration_is_looked_at(
    attribute: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(tmp_path, case("sequence"))
    check_accelerator(made)
    if attribute == "fp16":
        monkeypatch.setattr(type(made.accelerator), "mixed_precision", "fp16")
    else:
        monkeypatch.setattr(made, attribute, True)
    with pytest.raises(TrainerError, match=rf"{name} \(of accelerate's configuration\) is refused"):
        check_accelerator(made)


def refused_in_training(folder: Path, match: str, **given: Any) -> None:
    made = trainer(folder, case("sequence"), **given)
    with pytest.raises(TrainerError, match=match):
        made.train()
    assert made.engine is None, "something was set up already"


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        yield from case("sequence").data


def test_a_stream_is_refused(tmp_path: Path) -> None:
    refused_in_training(tmp_path, "train_dataset=Stream cannot be Poisson-sampled", train_dataset=Stream())


def test_a_missing_training_set_is_named(tmp_path: Path) -> None:
    refused_in_training(tmp_path, "train_dataset is missing", train_dataset=None)


def test_a_batch_beyond_the_training_set_is_refused(tmp_path: Path) -> None:
    match = (
        r"per_device_train_batch_size × gradient_accumulation_steps × processes = 50 exceeds the 24 examples"
    )
    refused_in_training(tmp_path, match, per_device_train_batch_size=25)


class Packs:
    padding_free = True

    def __call__(self, rows: Any) -> Any:
        raise AssertionError("nothing is read")


@pytest.mark.parametrize("collator", [transformers.DataCollatorWithFlattening(), Packs()])
def test_collators_that_pack_are_refused_by_name(collator: Any, tmp_path: Path) -> None:
    name = type(collator).__name__
    refused_in_training(tmp_path, rf"data_collator={name} is refused: it packs", data_collator=collator)


class Masks:
    seed = 42

    def __call__(self, rows: Any) -> Any:
        raise AssertionError("nothing is read")


def test_a_collator_with_a_known_seed_is_refused(tmp_path: Path) -> None:
    refused_in_training(tmp_path, r"data_collator=Masks\(seed=42\) is refused", data_collator=Masks())


@pytest.mark.filterwarnings("ignore:noise_key")
def test_a_collator_that_packs_unnoticed_is_refused_before_the_first_step(tmp_path: Path) -> None:
    of = case("sequence")

    def pack(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = of.collate(rows)
        return {name: value[:1] for name, value in batch.items()}

    made = trainer(tmp_path, of, data_collator=pack)
    with pytest.raises(TrainerError, match=r"shape \[1\], not \[2\]: a data_collator must return one row"):
        made.train()
    assert made.engine.steps == 0


def test_a_loss_over_the_batch_is_refused(tmp_path: Path) -> None:
    class Weighted(PrivateTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("not called")

    of = case("sequence")
    with pytest.raises(TrainerError, match=r"Weighted\.compute_loss is refused.*compute_loss_per_example"):
        trainer(tmp_path, of, kind=Weighted)
    trainer(tmp_path, of, kind=Weighted, compute_loss_per_example=lambda model, inputs: None)
    with pytest.raises(TrainerError, match="compute_loss_func is refused"):
        PrivateTrainer(of.model, arguments(tmp_path), privacy=privacy(), compute_loss_func=lambda *_: None)


def test_a_search_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="hyperparameter_search is refused: every trial spends"):
        trainer(tmp_path, case("sequence")).hyperparameter_search()


def test_arguments_without_noise_are_refused() -> None:
    with pytest.raises(TrainerError, match="target_epsilon and noise_multiplier are both missing"):
        PrivacyArguments(target_delta=1e-5, max_grad_norm=1.0)


@pytest.mark.filterwarnings("ignore:noise_key")
def test_a_model_without_a_known_loss_is_refused_before_the_first_step(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 3)

        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"logits": self.table(input_ids).mean(1)}

    of = case("sequence")
    of.model = Own()
    with pytest.raises(TrainerError, match=r"model=Own: no loss for each example is known"):
        trainer(tmp_path, of).train()


def test_a_compiled_model_is_refused_by_name(tmp_path: Path) -> None:
    of = case("sequence")
    of.model = torch.compile(of.model)  # type: ignore[assignment]
    with pytest.raises(
        TrainerError,
        match=r"model=torch\.compile\(BertForSequenceClassification\) is refused.*model\._orig_mod",
    ):
        trainer(tmp_path, of)
