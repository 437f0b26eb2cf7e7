"""Models for tests of PEFT's methods, and the methods that have a rule."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402

VOCABULARY, LENGTH, VIRTUAL = 9, 5, 4


class Net(nn.Module):
    """Two sides of 6 and 8, so that some batch is as large as each; ids [B,5]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 6, padding_idx=3)
        self.places = nn.Embedding(LENGTH, 6)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6, bias=False)
        self.norm, self.conv = nn.LayerNorm(6), nn.Conv1d(6, 6, 3, padding=1)
        self.image, self.head = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids) + self.places(torch.arange(LENGTH))
        h = self.norm(self.second(torch.tanh(self.first(h))))
        h = self.conv(h.transpose(1, 2)).transpose(1, 2)
        return self.head(self.image(h.unsqueeze(1)).sum(1))


def squares(model: nn.Module, ids: Tensor) -> Tensor:
    return (model(ids) ** 2).flatten(1).sum(1)


def adapted(config: Any, model: nn.Module | None = None) -> Any:
    """The model with the method, its parameters moved away from where they start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Net() if model is None else model, config)
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p) * 0.2)
    return model.eval()


def ids_of(batch: int, most: int = VOCABULARY) -> Tensor:
    return torch.randint(0, most, (batch, LENGTH))


METHODS: dict[str, Callable[[], Any]] = {
    "LoRA on embeddings": lambda: peft.LoraConfig(target_modules=["embed", "places"], r=2),
    "LoRA on convolutions": lambda: peft.LoraConfig(target_modules=["conv", "image"], r=2),
    "rsLoRA": lambda: peft.LoraConfig(target_modules=["first", "embed"], r=2, use_rslora=True),
    "LoRA with biases": lambda: peft.LoraConfig(target_modules=["first"], r=2, lora_bias=True, bias="all"),
    "LoRA, modules_to_save": lambda: peft.LoraConfig(
        target_modules=["first"], r=2, modules_to_save=["embed", "norm"]
    ),
    "LoRA, trainable tokens": lambda: peft.LoraConfig(
        target_modules=["first"], r=2, trainable_token_indices={"embed": [1, 2]}
    ),
    "DoRA": lambda: peft.LoraConfig(target_modules=["first", "second"], r=2, use_dora=True),
    "DoRA on convolutions": lambda: peft.LoraConfig(target_modules=["conv", "image"], r=2, use_dora=True),
    "IA3": lambda: peft.IA3Config(target_modules=["first", "second"], feedforward_modules=["second"]),
    "IA3 on convolutions": lambda: peft.IA3Config(target_modules=["image"], feedforward_modules=[]),
    "IA3 on convolutions' inputs": lambda: peft.IA3Config(
        target_modules=["image"], feedforward_modules=["image"]
    ),
    "VeRA": lambda: peft.VeraConfig(target_modules=["first"], r=4),
    "RoAd": lambda: peft.RoadConfig(target_modules=["first", "second"], group_size=2),
    "RoAd 4": lambda: peft.RoadConfig(target_modules=["first"], variant="road_4", group_size=2),
    "OFT": lambda: peft.OFTConfig(target_modules=["first", "second"], oft_block_size=2),
    "LN tuning": lambda: peft.LNTuningConfig(target_modules=["norm"]),
    "trainable tokens": lambda: peft.TrainableTokensConfig(target_modules=["embed"], token_indices=[1, 3, 4]),
    "trainable tokens of positions": lambda: peft.TrainableTokensConfig(
        target_modules=["places"], token_indices=[0, 2]
    ),
}


if hasattr(peft, "BeftConfig"):
    METHODS["BEFT"] = lambda: peft.BeftConfig(target_modules=["first"])


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **tokens, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return (torch.tanh(logits) ** 2).flatten(1).sum(1)


def prompts(kind: str, **options: Any) -> Any:
    return getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, **options)
