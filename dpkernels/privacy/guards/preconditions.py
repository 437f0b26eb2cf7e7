"""Preconditions of the model, the optimizer and the losses; each refusal has the name and the fix."""

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dpkernels.nn import batch_norms_in_training, named_modules, uncovered


def check_module(module: nn.Module) -> None:
    """Raise for a wrapped model, BatchNorm in training mode, or nothing trained."""
    wrappers = ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel", "GradSampleModule")
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if type(module).__name__ in wrappers:
        raise ValueError(
            f"module is wrapped in {type(module).__name__}; give the model as it was before it was wrapped (by "
            "Accelerator.prepare, for example: prepare none of model, optimizer and data loader). make_private itself "
            "trains on all processes that torch.distributed runs. Gradients are never averaged before they are "
            "clipped, so DDP's hooks that compress or delay averages have no counterpart; to keep frozen weights in "
            "parts, use dpkernels.privacy.shard_frozen"
        )
    if "_original_forward" in vars(module) and "forward" in vars(module):
        raise ValueError(
            f"module ({type(module).__name__}) was prepared by Accelerate for mixed precision, which replaced its "
            "forward by another that private layers cannot take part in: give the model as it was before "
            "Accelerator.prepare, and call it under torch.autocast (accelerator.autocast())"
        )
    names = batch_norms_in_training(module)
    if names:
        raise ValueError(batch_norm_message(names))
    hooked = [name for name, p in trained_parameters(module).items() if p._post_accumulate_grad_hooks]
    if hooked:
        raise ValueError(
            f"trained parameters have post-accumulate-grad hooks: {quoted(hooked)}. Such a hook gets gradients "
            "before they are clipped, and can hide that autograd filled .grad; remove it"
        )
    if not trained_parameters(module):
        raise ValueError("module has no trained parameters: set requires_grad on those to be trained")


def warn_of_generators(module: nn.Module) -> None:
    """Warn, by name, of random generators that a module holds: their seeds are not the run's secret ones."""
    held = [
        f"{prefix}.{name}" if prefix else name
        for prefix, part in named_modules(module)
        for name, value in vars(part).items()
        if isinstance(value, torch.Generator)
    ]
    if held:
        warnings.warn(
            f"module holds random generators of its own: {quoted(held)}. Under a known seed one more example changes "
            "the draws of all that follow it, and so their gradients, by far more than the clipping norm. Draw from "
            "torch's global generator (leave generator= out), which has a secret seed",
            stacklevel=4,
        )


def check_forward() -> None:
    """Raise RuntimeError if a forward with gradients begins within the forward of a DistributedDataParallel."""
    if torch.is_grad_enabled() and getattr(DistributedDataParallel, "_active_ddp_module", None) is not None:
        raise RuntimeError(
            "the private model is called through DistributedDataParallel, which would average gradients that are not "
            "clipped, and wait for processes that have no example: call the model that make_private returned, and do "
            "not wrap it. make_private itself trains on all processes"
        )


def check_coverage(module: nn.Module) -> None:
    """Raise ValueError naming the trained parameters that have no norm rule."""
    refused = uncovered(module)
    if refused:
        lines = "".join(f"\n  {item.name!r} ({item.module_type}): {item.reason}" for item in refused)
        raise ValueError(
            "trained parameters have no norm rule, so an example's contribution to their gradient has no "
            f"bound:{lines}\nFix: freeze them (requires_grad_(False)) or replace the layer."
        )


def check_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Raise unless the optimizer holds every trained parameter and no parameter of another module."""
    if type(optimizer).__name__ == "DPOptimizer":
        raise TypeError(
            "optimizer must be an ordinary torch.optim.Optimizer, got a DPOptimizer, which an earlier make_private "
            "returned: give the one that it wraps, optimizer.original_optimizer, or build model and optimizer anew"
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer must be an ordinary torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    if type(optimizer).__module__.startswith("accelerate."):
        scaler = getattr(optimizer, "scaler", None)
        precision = (
            "; and for float16 it scales losses, which clipping does not allow: use bfloat16 under torch.autocast"
            if scaler is not None
            else ""
        )
        raise TypeError(
            f"optimizer is Accelerate's {type(optimizer).__name__}, which decides itself whether a step is taken"
            f"{precision}. Give the optimizer as it was before Accelerator.prepare"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "LBFGS evaluates the loss several times a step; use an optimizer that steps without a closure"
        )
    held = {id(parameter): parameter for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, parameter in trained_parameters(module).items() if id(parameter) not in held]
    if missing:
        raise ValueError(
            f"the optimizer does not hold these trained parameters: {quoted(missing)}. Their gradients "
            "would be clipped and noised without an update; give them to the optimizer, or freeze them "
            "(requires_grad_(False))."
        )
    of_module = {id(parameter) for parameter in module.parameters()}
    foreign = [tuple(parameter.shape) for key, parameter in held.items() if key not in of_module]
    trained = {id(parameter) for parameter in trained_parameters(module).values()}
    check_no_gradient([parameter for key, parameter in held.items() if key not in trained])
    if foreign:
        raise ValueError(
            f"the optimizer holds {len(foreign)} parameters that are not the module's (shapes "
            f"{foreign[:5]}): their gradients would be neither clipped nor noised. Build the optimizer from "
            "module.parameters()."
        )


def check_no_gradient(parameters: Iterable[nn.Parameter]) -> None:
    """Raise RuntimeError if a parameter that is not trained has a gradient: torch's optimizers update every parameter
    whose .grad is set, with or without requires_grad."""
    shapes = [tuple(parameter.shape) for parameter in parameters if parameter.grad is not None]
    if shapes:
        raise RuntimeError(
            f"the optimizer holds {len(shapes)} parameters that are not trained but have a .grad (shapes "
            f"{shapes[:5]}): it would update them with a gradient that is neither clipped nor noised. Call "
            "optimizer.zero_grad() before make_private, and compute gradients with optimizer.backward only."
        )


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters with requires_grad, by name, each once."""
    names: dict[nn.Parameter, str] = {}
    for prefix, module in named_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                names.setdefault(parameter, f"{prefix}.{name}" if prefix else name)
    return {name: parameter for parameter, name in names.items()}


def quoted(names: Iterable[str]) -> str:
    """All names, in quotes, for a message."""
    return ", ".join(map(repr, names))


def some_of(names: Iterable[object]) -> str:
    """The first five names (in quotes) or shapes, sorted, and the number of the others, for a message."""
    items = sorted(map(repr, names))
    more = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return ", ".join(items[:5]) + more if items else "none"


def batch_norm_message(names: list[str]) -> str:
    """The message that refuses BatchNorm in training mode: the reason, the layers and the fix."""
    return (
        "BatchNorm in training mode mixes the examples of a batch, so each example's gradient depends on the others: "
        f"{quoted(names)}. Fix: dpkernels.nn.freeze_batch_norm(model) (running statistics, also in "
        "training), or GroupNorm."
    )


def check_losses(losses: Tensor) -> None:
    """Raise TypeError or ValueError unless losses are [B], floating and part of a graph."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"losses must be a Tensor of shape [B], got {type(losses).__name__}")
    if losses.dim() != 1:
        hint = (
            "a reduced loss cannot be separated by example: use reduction='none' and, for losses over "
            "time, sum or average within each example: loss(..., reduction='none').flatten(1).sum(1)"
        )
        raise ValueError(
            f"losses must have shape [B], one loss for each example, got shape {tuple(losses.shape)}; {hint}"
        )
    if not losses.is_floating_point():
        raise TypeError(f"losses must be floating-point, got {losses.dtype}")
    if losses.shape[0] and not losses.requires_grad:
        raise ValueError(
            "losses do not require grad: they depend on no trained parameter; remove torch.no_grad or detach, or "
            "unfreeze parameters"
        )
