"""A frozen base in parts, by fully_shard: the steps of whole replicas, 1/R of the memory, and guards that still see."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpkernels.privacy import shard_frozen
from dpkernels.privacy.ranks.sharded import is_sharded, local_part
from tests.privacy.ranks.processes import Processes
from tests.privacy.ranks.jobs import a_run, steps_of
from tests.privacy.ranks.test_same_update import LENGTHS


class Block(nn.Module):
    """A frozen layer, a LoRA beside it by PEFT, and a frozen norm with a trained bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width + 1)
        self.outer = nn.Linear(width + 1, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.outer(torch.tanh(self.inner(x))))


class Model(nn.Module):
    """Frozen blocks, a frozen layer before them, a trained head."""

    def __init__(self, width: int = 9, checkpointing: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(6, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(3)])
        self.head = nn.Linear(width, 3)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            if self.checkpointing and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.head(x).mean(1)


def with_adapters(model: Model) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["inner", "outer"], modules_to_save=["head"], lora_dropout=0.0)
    )
    for name, parameter in adapted.named_parameters():
        if name.endswith("norm.bias"):
            parameter.requires_grad_(True)
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return adapted


def base_bytes(model: nn.Module) -> int:
    return sum(local_part(p).nbytes for p in model.parameters() if not p.requires_grad)


def adapted(*, shard: Any = None, checkpointing: bool = False, seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    model = with_adapters(Model(checkpointing=checkpointing))
    if shard is not None:
        shard_frozen(model, process_group=shard)
    return model


def trained(
    rank: int,
    group: Any,
    *,
    shard: bool,
    steps: int = 3,
    checkpointing: bool = False,
    fails_on: int = -1,
    **settings: Any,
) -> dict[str, Any]:
    """Steps under a fixed key: the trained parameters, bytes of the base, and examples of each step."""
    model = adapted(shard=group if shard else None, checkpointing=checkpointing)
    if rank == fails_on:
        model.get_submodule("base_model.model.blocks.1.norm").register_forward_hook(out_of_memory)
    run = a_run(group, model=model, **settings)
    taken = steps_of(run, steps)
    return {
        "parameters": {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad},
        "base": {n: p.shape for n, p in model.named_parameters() if not p.requires_grad},
        "sharded": [n for n, p in model.named_parameters() if is_sharded(p)],
        "bytes": base_bytes(model),
        "examples": taken,
        "state": run.optimizer.state_dict()["state"],
    }


def out_of_memory(module: nn.Module, inputs: Any, output: Tensor) -> None:
    if len(output) > 2 and torch.is_grad_enabled():
        raise torch.OutOfMemoryError("more than two examples")


SETTINGS: dict[str, dict[str, Any]] = {
    "": {},
    **{f"strategy={name}": {"strategy": name} for name in ("mixed", "two_pass", "per_layer")},
    "checkpointing": {"checkpointing": True},
    "checkpointing, two_pass": {"checkpointing": True, "strategy": "two_pass"},
    "empty ranks": {"batch_size": 1, "steps": 6},
    "one example a micro-batch": {"physical_batch_size": 1},
    "of lengths": {"lengths": LENGTHS, "max_padded_frames": 20},
    "out of memory on rank 1": {"fails_on": 1},
    "bfloat16": {"dtype": torch.bfloat16},
}


@cache
def _results(processes: Processes, size: int, shard: bool, settings: str) -> list[dict[str, Any]]:
    return processes.results(trained, size, shard=shard, **SETTINGS[settings])


def check_same(processes: Processes, size: int, settings: str) -> None:
    whole = _results(processes, size, False, settings)
    parts = _results(processes, size, True, settings)
    assert any(
        len({len(r["examples"][step]) for r in parts}) > 1 for step in range(len(parts[0]["examples"]))
    )
    for one, other in zip(whole, parts, strict=True):
        assert not one["sharded"]
        assert other["sharded"] == list(other["base"])
        assert one["examples"] == other["examples"]
        for name, value in one["parameters"].items():
            torch.testing.assert_close(other["parameters"][name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", [2, 3])
def test_takes_the_steps_of_whole_replicas(processes: Processes, size: int) -> None:
    check_same(processes, size, "")


@pytest.mark.parametrize("settings", list(SETTINGS)[1:])
def test_in_every_setting(processes: Processes, settings: str) -> None:
    check_same(processes, 2, settings)


@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_holds_its_part_of_the_base(processes: Processes, size: int) -> None:
    whole = _results(processes, size, False, "")[0]
    parts = [result["bytes"] for result in _results(processes, size, True, "")]
    assert sum(parts) == whole["bytes"]
    rows = sum(4 * shape.numel() // shape[0] for shape in whole["base"].values())
    assert max(parts) <= whole["bytes"] / size + rows  # weights are cut between rows
