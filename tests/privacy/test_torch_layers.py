"""torch's attention and Transformer layers through the engine: every strategy, both layouts, and the checks."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpkernels.privacy import SelfCheckError
from dpkernels.privacy.self_check.probing import innermost
from tests.privacy.private_run import Run, losses_of, private_run
from tests.privacy.strategy_models import BOUND, check_sum, excess

WIDTH = 6  # private_run's features; its sequences are [B,4,6]


class Translating(nn.Module):
    """An nn.Transformer, and an attention used for self- and cross-attention, in either layout."""

    def __init__(self, batch_first: bool, dropout: float = 0.0, checkpointed: bool = False) -> None:
        super().__init__()
        options: dict[str, Any] = {"dropout": dropout, "batch_first": batch_first}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, that it makes no nested tensors of [T,B,d]
            self.body = nn.Transformer(WIDTH, 2, 1, 1, 8, **options)
        self.attention = nn.MultiheadAttention(WIDTH, 3, **options)
        self.last = nn.Linear(WIDTH, 3)
        self.batch_first, self.checkpointed = batch_first, checkpointed
        for p in self.parameters():
            nn.init.normal_(p, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        target = x[:, :3].flip(1)
        if not self.batch_first:
            x, target = x.transpose(0, 1), target.transpose(0, 1)
        h = (
            checkpoint(self.body, x, target, use_reentrant=False)
            if self.checkpointed
            else self.body(x, target)
        )
        h = torch.tanh(h + self.attention(h, h, h)[0])
        h = h + self.attention(h, x, x, need_weights=False)[0]
        return self.last(h.mean(1 if self.batch_first else 0))


def run_of(strategy: str = "bookkeeping", **options: Any) -> Run:
    torch.manual_seed(4)
    return private_run(sigma=0, clip=BOUND, model=Translating(**options), strategy=strategy)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("options", [{"batch_first": False}, {"batch_first": True, "checkpointed": True}])
@pytest.mark.parametrize("strategy", ["bookkeeping", "mixed", "two_pass", "per_layer"])
def test_the_sum_is_that_of_one_by_one_clipped_gradients(strategy: str, options: dict[str, Any]) -> None:
    run = run_of(strategy, **options)
    check_sum(run, strategy)
    assert 0.5 < excess(run, (0, 1)) <= 1.0


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_self_check_goes_through_attention_in_training_mode(batch_first: bool) -> None:
    """Its dropout is switched off by position, too: torch gives `is_causal` after `dropout_p` without its name."""
    run = run_of(batch_first=batch_first, dropout=0.3)
    run.model.train()
    assert run.engine.self_check(losses_of, run.data[:4]).modes == {"eval", "train"}


def test_the_checks_look_within_transformers_and_at_attentions_first_output() -> None:
    run = run_of(batch_first=True)
    names = {name for name, _ in innermost(run.model)}
    assert {"body.encoder.layers.0.self_attn", "body.decoder.layers.0.norm2", "attention"} <= names
    assert not any("out_proj" in name or name.endswith("layers.0") for name in names)

    class Mixing(nn.Module):
        """In attention's place; its first output is a sum with the batch's mean."""

        def forward(self, x: Tensor, *_: Tensor, **options: Any) -> tuple[Tensor, None]:
            return x + x.mean(0, keepdim=True), None

    torch.manual_seed(4)
    model = Translating(batch_first=True)
    model.attention = Mixing()
    run = private_run(sigma=0, clip=BOUND, model=model)
    with pytest.raises(SelfCheckError, match=r"depends on its batch: 'attention'\."):
        run.engine.self_check(losses_of, run.data[:4])


def test_the_tolerance_is_that_of_what_attention_computes_in() -> None:
    """Under autocast a Transformer's own outputs are float32, from its norms, and its attention's bfloat16."""
    run = run_of(batch_first=True)

    def losses(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return losses_of(model, batch)

    assert run.engine.self_check(losses, run.data[:4]).tolerance > 1e-2
