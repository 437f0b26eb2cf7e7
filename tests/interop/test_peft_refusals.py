"""What of PEFT is refused by name, with the reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dpkernels
from dpkernels.nn import EXPANSION_LIMIT, attach, swap, uncovered
from tests.interop.peft_models import (
    METHODS,
    adapted,
    gpt2,
    ids_of,
    prompts,
)

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "AdaLoRA": (lambda: peft.AdaLoraConfig(target_modules=["first"], total_step=9), "SVDLinear.*gradients"),
    "LoHa": (lambda: peft.LoHaConfig(target_modules=["first"], r=2), "loha.*whole weight matrix"),
    "LoKr": (lambda: peft.LoKrConfig(target_modules=["first"], r=2), "lokr.*whole weight matrix"),
    "HRA": (lambda: peft.HRAConfig(target_modules=["first"], r=2), "hra.*whole weight matrix"),
    "Poly": (lambda: peft.PolyConfig(target_modules=["first"], r=2, n_skills=2, n_tasks=2), "poly.*router"),
    "FourierFT": (
        lambda: peft.FourierFTConfig(target_modules=["first"], n_frequency=5),
        "fourierft.*no rule is written",
    ),
    "DoRA on an embedding": (
        lambda: peft.LoraConfig(target_modules=["embed"], r=2, use_dora=True),
        "DoraEmbeddingVariant",
    ),
    "DoRA with the base's bias": (
        lambda: peft.LoraConfig(target_modules=["first"], r=2, use_dora=True, bias="lora_only"),
        'DoRA reads the base layer.*bias="none"',
    ),
}


@pytest.mark.parametrize("method", REFUSED)
def test_what_has_no_rule_is_refused_with_the_reason(method: str) -> None:
    config, says = REFUSED[method]
    model = swap(adapted(config()))
    with pytest.raises(ValueError, match=rf"{says}"):
        attach(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {u.name for u in uncovered(model)} == trained
    model.requires_grad_(False)
    assert not uncovered(model)


def test_prompts_of_several_tasks_and_cpt_are_refused() -> None:
    config = prompts("MultitaskPromptTuningConfig", num_tasks=2)
    assert "for each example" in str(dpkernels.coverage(adapted(config, gpt2())))
    config = peft.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2]
    )
    assert "CPTEmbedding (cpt) has no norm rule" in str(dpkernels.coverage(adapted(config, gpt2())))


def test_adaption_prompts_are_refused() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_layers=1, adapter_len=3)
    model = adapted(config, LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)))
    assert "AdaptedAttention (adaption_prompt) has no norm rule: it reads" in str(dpkernels.coverage(model))


def test_vectors_that_would_take_too_much_memory_are_refused() -> None:
    wide = nn.Sequential(nn.Linear(1, EXPANSION_LIMIT + 1), nn.Linear(4, EXPANSION_LIMIT))
    table = dpkernels.coverage(
        adapted(peft.IA3Config(target_modules=["0", "1"], feedforward_modules=[]), wide)
    )
    assert [row.refusal is None for row in table.rows] == [False, True]
    assert "65,537 elements exceed the limit of 65,536" in str(table)


def test_a_forward_without_a_tensor_is_refused_by_name() -> None:
    model = swap(adapted(METHODS["IA3"]()))
    attach(model)
    with pytest.raises(
        RuntimeError, match=r"'base_model\.model\.first\.ia3_l': the model's forward got no tensor"
    ):
        model.base_model.model.first(torch.randn(3, 6))


def test_options_of_an_embedding_under_lora_are_refused() -> None:
    for option in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}):
        base = nn.Sequential(nn.Embedding(5, 4, **option))  # type: ignore[arg-type]
        for config in (
            peft.LoraConfig(target_modules=["0"], r=2),
            peft.TrainableTokensConfig(target_modules=["0"], token_indices=[1]),
        ):
            model = swap(adapted(config, copy.deepcopy(base)))
            assert all(next(iter(option)) in u.reason for u in uncovered(model))
            assert len(uncovered(model)) == sum(p.requires_grad for p in model.parameters())


def test_tokens_of_a_tied_output_layer_are_refused() -> None:
    config = peft.LoraConfig(target_modules=["c_attn"], trainable_token_indices=[1, 2], task_type="CAUSAL_LM")
    refused = dpkernels.coverage(adapted(config, gpt2())).refused
    assert len(refused) == 1
    assert "untie the output layer" in str(refused[0])


def test_mixed_batches_of_adapters_are_refused() -> None:
    model = swap(adapted(METHODS["LoRA on embeddings"]()))
    attach(model)
    with pytest.raises(NotImplementedError, match="adapter_names"):
        model.base_model.model.embed(ids_of(2), adapter_names=["default", "default"])
