"""losses_per_example: one loss for each example, the model's own for one example alone, whatever is beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from dpkernels.interop.trainer import TrainerError, losses_per_example  # noqa: E402
from dpkernels.interop.trainer.losses import check_losses  # noqa: E402
from tests.interop.trainers import Case, case  # noqa: E402

KINDS = ("causal", "masked", "sequence", "several", "regression", "token", "seq2seq", "ctc")


@pytest.mark.parametrize("name", KINDS)
def test_each_loss_is_the_models_own_for_that_example_alone(name: str) -> None:
    of = case(name)
    of.model.eval()
    with torch.no_grad():
        losses = losses_per_example(of.model, of.collate(of.data[:5]))
        alone = torch.stack([of.model(**of.collate([row])).loss for row in of.data[:5]])
    assert losses.shape == (5,)
    torch.testing.assert_close(losses, alone, rtol=1e-4, atol=1e-5)
    assert len(set(losses.tolist())) == 5, "the examples' losses are the same: nothing was compared"


SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
WAVES = {
    **SMALL,
    "conv_dim": (8, 8),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "mask_time_prob": 0.0,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
IDS = torch.arange(21).view(3, 7) % 17 + 3
OTHERS = {
    "T5": ("T5ForConditionalGeneration", "T5Config", T5, {"input_ids": IDS}),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "num_key_value_heads": 2}, {"input_ids": IDS}),
    "ViT": (
        "ViTForImageClassification",
        "ViTConfig",
        {**SMALL, "image_size": 16, "patch_size": 8, "num_labels": 7},
        {"pixel_values": torch.arange(3 * 3 * 256).view(3, 3, 16, 16).sin()},
    ),
    "Wav2Vec2": (
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        WAVES,
        {"input_values": torch.arange(2400).view(3, 800).sin(), "attention_mask": torch.ones(3, 800).long()},
    ),
    "Wav2Vec2 classifier": (
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2Config",
        {**WAVES, "num_labels": 7},
        {"input_values": torch.arange(2400).view(3, 800).sin()},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_have_their_own_loss_too(name: str) -> None:
    model_class, config_class, sizes, inputs = OTHERS[name]
    text = {} if name == "ViT" else {"vocab_size": 21, "pad_token_id": 0}
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**text, **sizes)).eval()
    one_label = "num_labels" in sizes
    batch = {**inputs, "labels": torch.tensor([1, 4, 2]) if one_label else IDS}
    with torch.no_grad():
        losses = losses_per_example(model, batch)
        alone = [model(**{key: value[i : i + 1] for key, value in batch.items()}).loss for i in range(3)]
    torch.testing.assert_close(losses, torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_peft_models_have_the_losses_of_their_base_model() -> None:
    peft = pytest.importorskip("peft")
    of = case("causal")
    batch = of.collate(of.data[:3])
    of.model.eval()
    expected = losses_per_example(of.model, batch)
    adapted = peft.get_peft_model(
        of.model, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    torch.testing.assert_close(losses_per_example(adapted.eval(), batch), expected)


def test_virtual_tokens_stand_before_the_labels() -> None:
    peft = pytest.importorskip("peft")
    of = case("causal")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    adapted = peft.get_peft_model(of.model, config).eval()
    with torch.no_grad():
        ours = losses_per_example(adapted, of.collate(of.data[:1]))
        theirs = adapted(**of.collate(of.data[:1])).loss
    torch.testing.assert_close(ours[0], theirs)


def test_smoothing_is_transformers_own_for_one_example() -> None:
    from transformers.trainer_pt_utils import LabelSmoother

    of = case("token")
    of.model.eval()
    batch = of.collate(of.data[2:3])
    with torch.no_grad():
        ours = losses_per_example(of.model, batch, label_smoothing=0.2)
        theirs = LabelSmoother(epsilon=0.2)(of.model(**batch), batch["labels"])
    torch.testing.assert_close(ours[0], theirs)


@pytest.mark.parametrize("name", ["regression", "several", "ctc"])
def test_smoothing_is_refused_where_it_has_no_meaning(name: str) -> None:
    of = case(name)
    with pytest.raises(TrainerError, match=r"label_smoothing_factor=0\.1 has no meaning"):
        losses_per_example(of.model, of.collate(of.data[:2]), label_smoothing=0.1)


def test_a_model_without_a_known_loss_is_named() -> None:
    with pytest.raises(TrainerError, match=r"model=Linear: no loss .* give compute_loss_per_example"):
        losses_per_example(nn.Linear(2, 2), {"labels": torch.zeros(1)})


def test_a_batch_without_labels_is_named() -> None:
    of = case("causal")
    with pytest.raises(TrainerError, match=r"no labels, but \['input_ids'\]"):
        losses_per_example(of.model, {"input_ids": torch.ones(2, 3, dtype=torch.long)})


def checked(of: Case, **given: Any) -> None:
    def losses_of(model: nn.Module, batch: Any) -> Tensor:
        return losses_per_example(model, batch)

    def batches_of(count: int, first: int) -> Any:
        return given.get("collate", of.collate)(of.data[first : first + count])

    check_losses(of.model, given.get("losses_of", losses_of), batches_of, own=given.get("own", True))


@pytest.mark.parametrize("name", KINDS)
def test_the_check_passes_and_leaves_the_mode(name: str) -> None:
    of = case(name, dropout=0.5)
    of.model.train()
    checked(of)
    assert of.model.training


def test_a_loss_with_a_term_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    of = case("causal")
    forward = type(of.model).forward

    def with_penalty(model: Any, *args: Any, **inputs: Any) -> Any:
        outputs = forward(model, *args, **inputs)
        if outputs.loss is not None:
            outputs.loss = outputs.loss + 0.1
        return outputs

    monkeypatch.setattr(type(of.model), "forward", with_penalty)
    with pytest.raises(TrainerError, match=r"GPT2LMHeadModel: for one example .* another loss"):
        checked(of)


def test_an_example_whose_loss_the_model_cannot_compute_is_passed_over() -> None:
    of = case("causal")
    of.data[0] = {**of.data[0], "labels": torch.full_like(of.data[0]["labels"], -100)}  # the model's is NaN
    checked(of)


def test_a_loss_that_was_compared_with_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    of = case("causal")
    of.data = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in of.data]
    checked(of)
    assert "could not be compared with the model's own loss" in caplog.text
    caplog.clear()
    checked(case("causal"))
    assert not caplog.text


@pytest.mark.parametrize("shape", [(), (1,), (2, 4)])
def test_losses_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    of = case("causal")
    with pytest.raises(TrainerError, match=r"has shape .*, not \[2\]: a data_collator must return one row"):
        checked(of, losses_of=lambda model, batch: torch.zeros(shape), own=False)


def test_a_collator_that_packs_is_refused() -> None:
    of = case("causal")

    def pack(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {name: torch.cat([row[name] for row in rows])[None, :12] for name in rows[0]}

    with pytest.raises(TrainerError, match=r"has shape \[1\], not \[2\].*no packing"):
        checked(of, collate=pack)
