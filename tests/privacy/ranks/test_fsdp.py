"""A frozen base in parts, by fully_shard: the steps of whole replicas, 1/R of the memory, and guards that still see."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpkernels import checkpoint, swap
from dpkernels.privacy import back_propagate, shard_frozen
from dpkernels.privacy.ranks.sharded import is_sharded, local_part
from tests.privacy.private_run import Run, losses_of
from tests.privacy.ranks.jobs import a_run, steps_of
from tests.privacy.ranks.processes import Failure, Processes
from tests.privacy.ranks.test_same_update import LENGTHS
from tests.slow import slow_unless


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


def adapted(
    *, shard: Any = None, checkpointing: bool = False, frozen: str | None = None, seed: int = 3
) -> nn.Module:
    torch.manual_seed(seed)
    model = with_adapters(Model(checkpointing=checkpointing))
    for name, parameter in model.named_parameters():
        if frozen is not None and frozen in name:
            parameter.requires_grad_(False)
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
    frozen: str | None = None,
    fails_on: int = -1,
    **settings: Any,
) -> dict[str, Any]:
    """Steps under a fixed key: the trained parameters, bytes of the base, and examples of each step."""
    model = adapted(shard=group if shard else None, checkpointing=checkpointing, frozen=frozen)
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
        "saved": saved(run),
    }


def saved(run: Run) -> dict[str, Tensor]:
    """What is saved of a run: PEFT's adapter, what a checkpoint keeps, and the optimizer's state, by name."""
    from peft import get_peft_model_state_dict

    states = run.optimizer.state_dict()["state"]
    return {
        **{f"adapter {name}": value for name, value in get_peft_model_state_dict(run.model).items()},
        **{f"checkpoint {name}": value for name, value in checkpoint.kept_parameters(run.model).items()},
        **{f"state {place} {name}": v for place, state in states.items() for name, v in state.items()},
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
    "DP-RP": {"frozen": "lora_A"},
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
        assert other["sharded"] == [name for name in other["base"] if "lora_" not in name]
        assert one["examples"] == other["examples"]
        for name, value in one["parameters"].items():
            torch.testing.assert_close(other["parameters"][name], value, rtol=1e-6, atol=1e-7)
        assert one["saved"].keys() == other["saved"].keys()
        for name, value in one["saved"].items():
            assert type(other["saved"][name]) in (Tensor, nn.Parameter), name
            torch.testing.assert_close(other["saved"][name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", [2, 3])
def test_takes_the_steps_of_whole_replicas(processes: Processes, size: int) -> None:
    check_same(processes, size, "")


QUICK = ("strategy=two_pass", "checkpointing", "empty ranks", "out of memory on rank 1")


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("settings", "size"), slow_unless(lambda name, _: name in QUICK, [(name, 2) for name in SETTINGS if name])
)
def test_in_every_setting(processes: Processes, settings: str, size: int) -> None:
    check_same(processes, size, settings)


@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_holds_its_part_of_the_base(processes: Processes, size: int) -> None:
    whole = _results(processes, size, False, "")[0]
    parts = [result["bytes"] for result in _results(processes, size, True, "")]
    assert sum(parts) == whole["bytes"]
    rows = sum(4 * shape.numel() // shape[0] for shape in whole["base"].values())
    assert max(parts) <= whole["bytes"] / size + rows  # weights are cut between rows


class Encoder(nn.Module):
    """torch's own transformer layers: a block is a private layer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.first(x))).mean(1)


class Mixed(nn.Module):
    """Blocks with convolutions, a weight that two blocks share, a raw trained parameter, and a frozen scalar."""

    class Block(nn.Module):
        def __init__(self, shared: nn.Linear) -> None:
            super().__init__()
            self.conv = nn.Conv1d(6, 6, 3, padding=1, groups=2)
            self.shared = shared
            self.offset = nn.Parameter(torch.zeros(6))
            self.scale = nn.Parameter(torch.tensor(0.5), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x.transpose(1, 2)).transpose(1, 2)
            return x + self.scale * self.shared(y + self.offset)

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(6, 6)
        self.layers = nn.ModuleList([Mixed.Block(shared) for _ in range(2)])
        self.head = nn.Linear(6, 3)
        shared.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x).mean(1)


MODELS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "biases of transformer layers": (Encoder, ("bias",)),
    "attention's projection": (Encoder, ("in_proj_weight", "head.weight")),
    "raw parameters": (Mixed, ("offset", "head.weight")),
    "one conv": (Mixed, ("layers.1.conv.weight",)),
}


def of_model(rank: int, group: Any, name: str, how: str) -> Any:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    make, suffixes = MODELS[name]
    torch.manual_seed(5)
    model: nn.Module = make()
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name.endswith(suffixes))
    if how == "private layers first":
        swap(model)
    if how == "fully_shard":
        mesh = DeviceMesh.from_group(group, "cpu")
        ignored = {p for p in model.parameters() if p.requires_grad or not p.dim()}
        fully_shard(model.head, mesh=mesh, ignored_params=ignored)
        fully_shard(model, mesh=mesh, ignored_params=ignored, reshard_after_forward=True)
    elif how != "whole":
        blocks = model.layers.layers if make is Encoder else [model.head]
        shard_frozen(model, blocks, process_group=group)
    run = a_run(group, model=model)
    steps_of(run, 2)
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.thinned(5)
@pytest.mark.parametrize("how", ["shard_frozen", "private layers first", "fully_shard"])
@pytest.mark.parametrize("name", MODELS)
def test_models_of_many_kinds(processes: Processes, name: str, how: str) -> None:
    whole = processes.results(of_model, 2, name, "whole")[0]
    for parts in processes.results(of_model, 2, name, how):
        assert parts.keys() == whole.keys()
        for parameter, value in parts.items():
            torch.testing.assert_close(value, whole[parameter], rtol=1e-6, atol=1e-7)


BASE = "base_model.model.blocks.1.inner.base_layer"


def overwritten(module: nn.Module, *_: Any) -> None:
    module.weight.add_(1)


def overwritten_past_autograd(module: nn.Module, *_: Any) -> None:
    module.weight.data.mul_(1.5)


def replaced(module: nn.Module, *_: Any) -> None:
    module.weight = nn.Parameter(module.weight * 2, requires_grad=False)


def overwritten_in_parts(model: nn.Module, *_: Any) -> None:
    local_part(model.get_parameter(f"{BASE}.weight")).add_(1)


def overwritten_in_parts_past_autograd(model: nn.Module, *_: Any) -> None:
    local_part(model.get_parameter(f"{BASE}.weight")).data.add_(1)


def replaced_between(model: nn.Module, *_: Any) -> None:
    layer = model.get_submodule(BASE)
    layer._parameters["weight"] = nn.Parameter(torch.zeros(10, 9), requires_grad=False)


# When it happens, and what.
FAULTS: dict[str, tuple[str, Any]] = {
    "written": ("forward of the layer", overwritten),
    "written past autograd": ("forward of the layer", overwritten_past_autograd),
    "replaced": ("forward of the layer", replaced),
    "its part written": ("forward of the model", overwritten_in_parts),
    "its part written past autograd": ("forward of the model", overwritten_in_parts_past_autograd),
    "written in the backward": ("backward of the layer", overwritten),
    "replaced before the step": ("step", replaced_between),
}
# The gathered weight changes, and is gathered anew before anything else reads it.
HARMLESS: dict[str, tuple[str, Any]] = {
    "replaced after the forward": ("forward of the model", replaced_between),
    "written in the backward past autograd": ("backward of the layer", overwritten_past_autograd),
}


def faulty(rank: int, group: Any, fault: str) -> Tensor:
    """A step with a fault; the whole weight after it."""
    when, write = {**FAULTS, **HARMLESS}[fault]
    model = adapted(shard=group)
    # One example alone: its backward is not repeated, which autograd would refuse after a write. All examples are
    # drawn, and each rank has two, so that none waits for one that raised.
    run = a_run(group, model=model, examples=4, batch_size=4, physical_batch_size=1)
    layer = model.get_submodule(BASE)
    hook = torch.no_grad()(write)
    if "forward" in when:
        (layer if when == "forward of the layer" else model).register_forward_hook(hook)
    batch = next(iter(run.loader))
    for number, part in enumerate(batch, 1):
        if number == len(batch) and when == "backward of the layer":  # no later forward would find it
            layer.register_full_backward_hook(hook)
        run.optimizer.backward(losses_of(model, part))
    if when == "step":
        hook(model)
    run.optimizer.step()
    return model.get_parameter(f"{BASE}.weight").full_tensor()


@pytest.mark.thinned(2)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_frozen_weight_must_not_change(processes: Processes, fault: str) -> None:
    for result in processes.run(faulty, 2, fault):
        assert isinstance(result, Failure)
        assert result.kind == "RuntimeError", result
        assert f"{BASE}.weight" in result.message


@pytest.mark.parametrize("fault", HARMLESS)
def test_a_gathered_weight_ends_with_its_micro_batch(processes: Processes, fault: str) -> None:
    before = adapted().get_parameter(f"{BASE}.weight")
    for weight in processes.results(faulty, 2, fault):
        assert torch.equal(weight, before)


def kept_gathered(rank: int, group: Any, fault: bool) -> dict[str, Tensor]:
    """Steps with a base that fully_shard keeps gathered after a backward. With the fault the first backward of the
    batch writes it."""
    model = adapted(shard=group)
    run = a_run(group, model=model, physical_batch_size=1)
    for _, module in model.named_modules():
        if isinstance(module, torch.distributed.fsdp.FSDPModule):
            module.set_reshard_after_backward(False)
    if fault:
        hook = torch.no_grad()(overwritten_past_autograd)
        model.get_submodule(BASE).register_full_backward_hook(hook)
    steps_of(run, 1)
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_a_write_to_a_gathered_weight_reaches_no_other_example(processes: Processes) -> None:
    without, with_fault = (processes.results(kept_gathered, 2, fault)[0] for fault in (False, True))
    for name, value in without.items():
        assert torch.equal(value, with_fault[name]), name


def refused(rank: int, group: Any, case: str) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    model = adapted(seed=rank if case == "other weights" else 3)
    mesh = DeviceMesh.from_group(group, "cpu")
    frozen = {p for p in model.parameters() if not p.requires_grad}
    ignored = set(model.parameters()) - frozen
    if case == "trained":
        fully_shard(model, mesh=mesh)
    elif case == "mixed precision":
        fully_shard(model, mesh=mesh, ignored_params=ignored, mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    elif case == "other processes":
        alone = dist.new_group([rank], use_local_synchronization=True)
        fully_shard(model, mesh=DeviceMesh.from_group(alone, "cpu"), ignored_params=ignored)
    elif case == "tensor parallel":
        layer = model.get_submodule(BASE)
        part = distribute_tensor(layer.weight.detach(), mesh, [Shard(0)])
        layer.weight = nn.Parameter(part, requires_grad=False)
    elif case == "without blocks":
        shard_frozen(model.get_submodule("base_model.model.blocks.0"), process_group=group)
    elif case == "foreign blocks":
        shard_frozen(model, [nn.Linear(2, 2)], process_group=group)
    else:
        shard_frozen(model, process_group=group)
        if case == "twice":
            shard_frozen(model, process_group=group)
    steps_of(a_run(group, model=model), 1)


@pytest.mark.thinned(5)
@pytest.mark.parametrize(
    ("case", "kind", "message"),
    [
        ("trained", "ValueError", "ignored_params"),
        ("mixed precision", "RuntimeError", "torch.autocast instead of mp_policy"),
        ("other processes", "ValueError", r"over the processes \[\d\], and the run's are \[0, 1\]"),
        ("tensor parallel", "ValueError", "Tensor and pipeline parallel models are refused"),
        ("without blocks", "ValueError", r"Give blocks=\[...\]"),
        ("foreign blocks", "ValueError", "not the model's: Linear"),
        ("twice", "ValueError", "sharded already"),
        ("other weights", "RanksError", "model's .*bits.*rank 0.*bits.*rank 1"),
    ],
)
def test_refuses(processes: Processes, case: str, kind: str, message: str) -> None:
    for result in processes.run(refused, 2, case):
        assert isinstance(result, Failure)
        assert result.kind == kind, result
        assert re.search(message, result.message), result.message


def unlike(rank: int, group: Any) -> dict[str, Any]:
    """Rank 0 checks itself and evaluates, in the middle of a batch; rank 1 does neither."""
    model = adapted(shard=group)
    run = a_run(group, model=model)
    for steps, logical in enumerate(run.loader):
        if rank == 0:
            run.engine.self_check(losses_of, run.data[:4])
            with torch.no_grad():
                model.eval()
                losses_of(model, run.data[:3])
                model.train()
        back_propagate(run.optimizer, logical, lambda part: losses_of(model, part))
        run.optimizer.step()
        if steps == 1:
            break
    if rank == 0:
        model.eval()(run.data[:5][0])
    run.engine.wait_for_ranks()
    torch.distributed.barrier(group)
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_no_rank_has_to_call_the_model_as_often_as_the_others(processes: Processes) -> None:
    first, second = processes.results(unlike, 2)
    like = processes.results(trained, 2, shard=False, steps=2)[0]["parameters"]
    for name, value in first.items():
        assert torch.equal(value, second[name])
        torch.testing.assert_close(value, like[name], rtol=1e-6, atol=1e-7)
