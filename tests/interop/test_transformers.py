"""Small real models: full fine-tuning and LoRA, against the gradient of each sample alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpkernels.nn import (
    ExpandedRecord,
    LinearRecord,
    Record,
    RowError,
    Tape,
    attach,
    freeze_batch_norm,
    swap,
    uncovered,
)
from dpkernels.nn.layers.embedding import ghost_embedding
from tests.nn.per_sample import check_private

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
from dpkernels.interop.transformers import GhostRelativeKeys  # noqa: E402

Made = tuple[nn.Module, Callable[..., Tensor], tuple[Tensor, ...], list[str]]


def randomised(model: nn.Module) -> nn.Module:
    """Weights large enough that every part of the model matters."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if p.dim() < 2 or "bias_" in name:
            nn.init.normal_(p, mean=float("norm" in name and name.endswith("weight")), std=0.2)
        elif p.requires_grad:
            nn.init.normal_(p, std=(p.numel() / len(p)) ** -0.5)
    for name, b in model.named_buffers():
        if "running_var" in name:
            nn.init.uniform_(b, 0.5, 2)
    return freeze_batch_norm(model).train()


def mean_square(logits: Tensor) -> Tensor:
    return F.log_softmax(logits, -1)[..., 0].flatten(1).sum(1) + logits.square().flatten(1).mean(1)


def parakeet() -> Made:
    config = transformers.ParakeetCTCConfig(
        vocab_size=11,
        pad_token_id=10,
        encoder_config={
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "conv_kernel_size": 5,
            "num_mel_bins": 16,
            "subsampling_conv_channels": 4,
            "dropout": 0.0,
            "dropout_positions": 0.0,
            "layerdrop": 0.0,
            "activation_dropout": 0.0,
            "attention_dropout": 0.0,
        },
    )
    model = transformers.ParakeetForCTC(config)

    def loss(model: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        return mean_square(model(input_features=x, attention_mask=mask).logits)

    mask = torch.arange(56) < torch.tensor([[56], [40], [33]])
    x = torch.randn(3, 56, 16) * mask[..., None]
    return model, loss, (x, mask.long()), ["q_proj", "v_proj", "linear1"]


def wav2vec2_bert() -> Made:
    config = transformers.Wav2Vec2BertConfig(
        vocab_size=11,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        feature_projection_input_dim=8,
        conv_depthwise_kernel_size=5,
        left_max_position_embeddings=4,
        right_max_position_embeddings=2,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        feat_proj_dropout=0.0,
        activation_dropout=0.0,
        conformer_conv_dropout=0.0,
        final_dropout=0.0,
        layerdrop=0.0,
        apply_spec_augment=False,
    )
    model = transformers.Wav2Vec2BertForCTC(config)

    def loss(model: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        return mean_square(model(input_features=x, attention_mask=mask).logits * mask[..., None])

    mask = torch.arange(12) < torch.tensor([[12], [9], [7]])
    return model, loss, (torch.randn(3, 12, 8), mask.long()), ["linear_q", "linear_v"]


def whisper() -> Made:
    config = transformers.WhisperConfig(
        vocab_size=40,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_source_positions=10,
        max_target_positions=12,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        dropout=0.0,
    )
    model = transformers.WhisperForConditionalGeneration(config)

    def loss(model: nn.Module, x: Tensor, ids: Tensor) -> Tensor:
        logits = model(input_features=x, decoder_input_ids=ids[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").sum(1)

    return model, loss, (torch.randn(3, 8, 20), torch.randint(0, 40, (3, 7))), ["q_proj", "fc1"]


def gpt2() -> Made:
    config = transformers.GPT2Config(
        vocab_size=30,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    )
    model = transformers.GPT2LMHeadModel(config)

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        return mean_square(model(input_ids=ids, use_cache=False).logits)

    return model, loss, (torch.randint(0, 30, (3, 7)),), ["c_attn"]


def bert() -> Made:
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.BertForMaskedLM(config)

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        return mean_square(model(input_ids=ids).logits)

    return model, loss, (torch.randint(0, 30, (3, 7)),), ["query", "value"]


def llama() -> Made:
    config = transformers.LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        return mean_square(model(input_ids=ids, use_cache=False).logits)

    return model, loss, (torch.randint(0, 30, (3, 7)),), ["q_proj", "gate_proj"]


def in_float64(make: Callable[[], Made]) -> tuple[nn.Module, Callable[..., Tensor], tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model, loss, batch, _ = make()
    return randomised(model).double(), loss, tuple(t.double() if t.is_floating_point() else t for t in batch)


MODELS = [parakeet, wav2vec2_bert, whisper, gpt2, bert, llama]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("make", MODELS)
def test_full_fine_tuning(make: Callable[[], Made]) -> None:
    """In float64, so that a fault in any one parameter shows, however small its gradient is."""
    model, loss, batch = in_float64(make)
    assert uncovered(swap(copy.deepcopy(model))) == []
    private = check_private(model, loss, batch)
    seen = {p for r in private.records for p in r.parameters}
    assert len(seen) == sum(len(r.parameters) for r in private.records)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("make", MODELS)
def test_lora(make: Callable[[], Made]) -> None:
    torch.manual_seed(0)
    model, loss, batch, targets = make()
    model = peft.get_peft_model(
        randomised(model), peft.LoraConfig(target_modules=targets, r=2, fan_in_fan_out=make is gpt2)
    )
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.2)
    check_private(model, loss, batch, tolerance=1e-4)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("make", MODELS)
def test_state_dict_and_forward_survive_the_swap(make: Callable[[], Made]) -> None:
    torch.manual_seed(0)
    model, loss, batch, _ = make()
    model = randomised(model)
    ghost = swap(copy.deepcopy(model))
    assert list(ghost.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        want = loss(model, *batch)
        assert torch.equal(loss(ghost, *batch), want)
    attach(ghost)
    torch.testing.assert_close(loss(ghost, *batch), want)


def test_gradient_checkpointing_of_a_whole_model() -> None:
    torch.manual_seed(0)
    model, loss, batch, _ = wav2vec2_bert()
    model = randomised(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    check_private(model, loss, batch, tolerance=1e-4)


@pytest.mark.parametrize(
    ("make", "layer"),
    [(parakeet, "bias_u"), (parakeet, "depthwise_conv"), (wav2vec2_bert, "distance_embedding")],
)
def test_a_dropped_record_would_be_caught(
    make: Callable[[], Made], layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    add: Any = Tape.add
    monkeypatch.setattr(Tape, "add", lambda self, r: None if layer in r.layer else add(self, r))
    with pytest.raises(AssertionError, match=r"weighted sum|norm too small"):
        check_private(*in_float64(make))


@pytest.mark.parametrize(
    ("make", "layer"),
    [(parakeet, "bias_u"), (parakeet, "bias_v"), (wav2vec2_bert, "distance_embedding")],
)
def test_a_rule_that_loses_whose_gradient_is_whose_would_be_caught(
    make: Callable[[], Made], layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault that a parameter without a batch in it invites: the right sum, split evenly over the batch."""
    add: Any = Tape.add

    def evenly(tape: Tape, record: Record) -> None:
        if layer not in record.layer:
            return add(tape, record)
        (own,) = record.materialised() if isinstance(record, LinearRecord) else (record,)
        mean = own.g.mean(0, keepdim=True).expand_as(own.g)
        return add(tape, ExpandedRecord(own.layer, own.parameters[0], mean))

    monkeypatch.setattr(Tape, "add", evenly)
    with pytest.raises((AssertionError, RowError), match=rf"{layer}"):
        check_private(*in_float64(make))


def _as_embedding(layer: GhostRelativeKeys, ids: torch.Tensor) -> Any:
    assert layer._ghost_active(layer.weight)
    return ghost_embedding(layer, ids, layer.weight)


def test_relative_keys_by_the_rule_of_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their ids [L, R] are shared: looked up once per example they give the same, also where L is the batch's size; the
    rule of their own takes R/n times less.
    """
    monkeypatch.setattr(
        GhostRelativeKeys,
        "forward",
        _as_embedding,
    )
    model, loss, batch = in_float64(wav2vec2_bert)
    check_private(model, loss, batch)
    check_private(model, loss, tuple(torch.cat([t] * 4)[:12] for t in batch))


def test_relative_keys_refuse_other_uses() -> None:
    model, _, _, _ = wav2vec2_bert()
    layer = swap(model).wav2vec2_bert.encoder.layers[0].self_attn.distance_embedding
    ids = torch.zeros(4, 4, dtype=torch.long)
    assert layer(ids).shape == (4, 4, 8)
    attach(model)
    keys = layer(ids)
    with pytest.raises(NotImplementedError, match=r"distance_embedding': add"):
        torch.add(torch.ones(4, 4, 8), keys)
