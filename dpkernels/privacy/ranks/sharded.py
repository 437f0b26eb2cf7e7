"""Frozen weights in parts, by torch's fully_shard (FSDP2): where they are, which are refused, and `shard_frozen`.

fully_shard keeps 1/R of each weight on each of R processes, as a DTensor, and replaces it by the whole weight while its
module computes. Trained parameters are kept out of it (`ignored_params`): their gradients are clipped on each process,
and their sums and optimizer state are in parts already.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpkernels.privacy.ranks.agreement import bits_of
from dpkernels.privacy.ranks.group import SHARD, Ranks, ranks_of

_HELPER = "dpkernels.privacy.shard_frozen(model) does so"


@dataclass(frozen=True)
class Slot:
    """A place in a module that holds a sharded weight, or the gathered one while the weight is in use.

    Attributes:
        name: the parameter's qualified name.
        owner: the module that holds it, under `attribute`.
    """

    name: str
    owner: nn.Module
    attribute: str

    @property
    def tensor(self) -> Tensor | None:
        """What the place holds now."""
        return self.owner._parameters.get(self.attribute)


@dataclass(frozen=True)
class ShardedModule:
    """A module that fully_shard was called on, and the places of the weights that it gathers."""

    name: str
    module: Any
    slots: tuple[Slot, ...]

    def weights(self) -> list[Any]:
        """The sharded weights, each once, in the order in which they are gathered. The module must be resharded."""
        return list({id(slot.tensor): slot.tensor for slot in self.slots}.values())


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor: this process holds a part of it."""
    library = sys.modules.get(
        "torch.distributed.tensor"
    )  # whoever shards has imported it, which takes a second
    return library is not None and isinstance(tensor, library.DTensor)


@torch.no_grad()
def local_part(tensor: Any) -> Tensor:
    """This process's part of a sharded tensor, or the whole tensor if it is not sharded. No copy."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return part


def reshard(model: nn.Module) -> None:
    """Drop every gathered weight of the model: its modules then hold the sharded ones."""
    for _, module in _fully_sharded(model):
        module.reshard()


def sharded_modules(model: nn.Module) -> list[ShardedModule]:
    """The modules that fully_shard was called on, parents first. Drops the gathered weights."""
    reshard(model)
    roots = dict(_fully_sharded(model))
    inner = {id(module) for module in roots.values()}
    # A weight of several modules belongs to the innermost, which was sharded first.
    taken: dict[int, Any] = {}
    for module in reversed(roots.values()):
        for slot in _slots("", module, inner - {id(module)}):
            taken.setdefault(id(slot.tensor), module)
    return [
        ShardedModule(
            name,
            module,
            tuple(s for s in _slots(name, module, inner - {id(module)}) if taken[id(s.tensor)] is module),
        )
        for name, module in roots.items()
    ]


def check_sharded(model: nn.Module, ranks: Ranks) -> None:
    """Raise ValueError, by name, for a sharded model that this run cannot train.

    Trained parameters must not be sharded, and frozen ones must be sharded by fully_shard, along their first dimension,
    over all processes of the run.
    """
    if not isinstance(model, nn.Module):
        return  # `check_module` refuses it
    modules = sharded_modules(model)
    if any(not hasattr(sharded.module, "reset_iter_state") for sharded in modules):
        raise ValueError(
            f"a model that fully_shard has sharded needs a later torch than {torch.__version__}, one whose FSDPModule "
            "has reset_iter_state (torch 2.13 has it)"
        )
    trained = [name for name, p in model.named_parameters() if p.requires_grad and is_sharded(p)]
    if trained:
        raise ValueError(
            f"trained parameters are sharded: {_some(trained)}. Each process clips whole gradients, so these must be "
            "whole: give fully_shard ignored_params={p for p in model.parameters() if p.requires_grad}, in every call "
            f"({_HELPER}). Fully sharded training of all parameters is not supported; freeze those that are to be "
            "sharded"
        )
    of_modules = {slot.name for module in modules for slot in module.slots}
    frozen = {name: p for name, p in model.named_parameters(remove_duplicate=False) if is_sharded(p)}
    foreign = [name for name in frozen if name not in of_modules]
    if foreign:
        raise ValueError(
            f"parameters are DTensors without fully_shard: {_some(foreign)}. Tensor and pipeline parallel models are "
            "refused, since an example's gradient would be spread over processes. Shard frozen weights by "
            f"torch.distributed.fsdp.fully_shard ({_HELPER})"
        )
    members = [0] if ranks.group is None else dist.get_process_group_ranks(ranks.group)
    for name, parameter in frozen.items():
        mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
        if mesh.ndim != 1 or not placements[0].is_shard(0) or mesh.mesh.tolist() != members:
            raise ValueError(
                f"{name!r} is sharded as {placements} over the processes {mesh.mesh.tolist()}, and the run's are "
                f"{members}: give fully_shard a one-dimensional mesh of these, and no shard_placement_fn ({_HELPER})"
            )


@contextmanager
def gathered_root(model: nn.Module) -> Iterator[None]:
    """Gather the sharded weights outside of the blocks, for code that calls parts of the model and not the model.

    fully_shard gathers these when the model itself is called. A decoder that calls the encoder, and then generates
    tokens, does not. Nothing happens if the model is not sharded. In a private run, ranks need not enter it equally
    often.
    """
    roots = [module for _, module in _fully_sharded(model)][:1]
    for root in roots:
        root.unshard()
    try:
        yield
    finally:
        for root in roots:
            root.reshard()


def shard_frozen(
    model: nn.Module,
    blocks: Iterable[nn.Module] | None = None,
    *,
    process_group: dist.ProcessGroup | None = None,
) -> list[str]:
    """Keep 1/R of every frozen weight on each of R processes, by torch's fully_shard: gathered block by block in use.

    Call it on every rank, after the trained parameters are chosen (PEFT, requires_grad_) and before the optimizer is
    built and `make_private` is called. Trained parameters stay as they are, and so do frozen factors of LoRA adapters,
    which are saved with the trained ones. With one process nothing changes.

    It calls `fully_shard` on each block and on the model with what a private run needs: the trained parameters in
    `ignored_params`, and a mesh of the run's processes. It also compares the ranks' weights first. fully_shard takes
    each rank's own part without a look at the others, so that ranks with different weights would make up a model that
    is none of theirs.

    Args:
        model: the model, on this rank's device, with the same weights on all ranks.
        blocks: the modules whose weights are gathered together and dropped together. Default the items of the
            outermost `nn.ModuleList`s (a transformer's layers). Memory holds the weights outside of the blocks, and
            of about two blocks at a time. A block has to be used by calling it.
        process_group: as in `make_private`.

    Returns:
        Names of the blocks.

    Raises:
        ValueError: the model is sharded already; a block that is not of the model; no blocks were found; frozen weights
            on several devices.
        RanksError: the ranks' models differ.
    """
    ranks = ranks_of(process_group)
    with ranks.meeting(SHARD):
        if any(is_sharded(parameter) for parameter in model.parameters()):
            raise ValueError("shard_frozen: the model is sharded already; call it once, or fully_shard alone")
        chosen = _blocks(model, blocks)
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        devices = {parameter.device.type for parameter in frozen.values()}
        if len(devices) > 1:
            raise ValueError(
                f"shard_frozen: frozen weights are on {sorted(devices)}; move the model to this rank's device first"
            )
    if ranks.group is None or ranks.size == 1 or not frozen:
        return []
    ranks.check_same(SHARD, {f"model's {name!r}": _identity(p) for name, p in frozen.items()})
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    mesh = DeviceMesh.from_group(ranks.group, devices.pop())
    whole = {parameter for name, parameter in model.named_parameters() if _stays_whole(name, parameter)}
    for block in chosen.values():
        fully_shard(block, mesh=mesh, ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)
    return list(chosen)


def _stays_whole(name: str, parameter: nn.Parameter) -> bool:
    """Whether `shard_frozen` leaves a parameter out: a trained one; a frozen factor of an adapter, which is small and
    saved with the others; a scalar and a strided view, which fully_shard cannot cut."""
    adapter = "lora_" in name
    return parameter.requires_grad or adapter or parameter.dim() == 0 or not parameter.is_contiguous()


def _blocks(model: nn.Module, blocks: Iterable[nn.Module] | None) -> dict[str, nn.Module]:
    """The given or default blocks that have frozen parameters, by name."""
    names = {module: name for name, module in model.named_modules()}
    if blocks is None:
        blocks = list(_outermost_items(model))
        if not blocks:
            raise ValueError(
                "shard_frozen: the model has no nn.ModuleList, whose items would be the blocks. Give blocks=[...]: the "
                "modules whose weights are gathered together; each of them is used by calling it"
            )
    given = list(blocks)
    foreign = [type(block).__name__ for block in given if block not in names]
    if foreign:
        raise ValueError(
            f"shard_frozen: blocks holds modules that are not the model's: {', '.join(foreign[:5])}"
        )
    return {
        names[block]: block
        for block in given
        if block is not model and any(not p.requires_grad for p in block.parameters())
    }


def _outermost_items(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _outermost_items(child)


def _identity(tensor: Tensor) -> str:
    bits = "without values" if tensor.is_meta else f"bits {bits_of(tensor)}"
    return f"{tensor.dtype}, {tuple(tensor.shape)}, {bits}"


def _fully_sharded(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of each module that fully_shard was called on, parents first."""
    library = sys.modules.get("torch.distributed.fsdp")
    if library is not None:
        for name, module in model.named_modules():
            if isinstance(module, library.FSDPModule):
                yield name, module


def _slots(name: str, module: nn.Module, without: set[int]) -> Iterator[Slot]:
    """The places of sharded parameters below a module, except below the modules `without`: in fully_shard's order, in
    which a module's own parameters follow those of its children."""
    for key, child in module._modules.items():
        if child is not None and id(child) not in without:
            yield from _slots(f"{name}.{key}" if name else key, child, without)
    for attribute, parameter in module._parameters.items():
        if is_sharded(parameter):
            yield Slot(f"{name}.{attribute}" if name else attribute, module, attribute)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(repr, names[:5])) + more
