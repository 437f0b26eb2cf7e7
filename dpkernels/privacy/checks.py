"""What must hold of the model, the optimizer and the losses, each refused by name and with the mend."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dpkernels.nn import batch_norms_in_training, coverage, mixes_samples, named_modules


def check_single_process() -> None:
    """Raise RuntimeError where torch.distributed runs more than one process."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise RuntimeError(
            f"{distributed.get_world_size()} processes: private training over more than one process is "
            "refused, since its noise, divisor and sampling are not implemented; run one process on one "
            "device"
        )


def check_module(module: nn.Module) -> None:
    """Raise for a wrapped model, BatchNorm in training mode, or nothing trained."""
    wrappers = ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel", "GradSampleModule")
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if type(module).__name__ in wrappers:
        raise ValueError(
            f"module is wrapped in {type(module).__name__}; give the model itself (module.module)"
        )
    names = batch_norms_in_training(module)
    if names:
        raise ValueError(batch_norm_message(names))
    hooked = [name for name, p in trained_parameters(module).items() if p._post_accumulate_grad_hooks]
    if hooked:
        raise ValueError(
            f"trained parameters with post-accumulate-grad hooks: {', '.join(hooked)}. Such a hook sees gradients "
            "before they are clipped, and can hide that autograd filled .grad; remove it"
        )
    if not trained_parameters(module):
        raise ValueError("module has no trained parameters (requires_grad): there is nothing to make private")


def check_coverage(module: nn.Module) -> None:
    """Raise ValueError naming the trained parameters that have no norm rule."""
    uncovered = coverage(module)
    if uncovered:
        lines = "".join(f"\n  {item.name} ({item.module_type}): {item.reason}" for item in uncovered)
        raise ValueError(
            "trained parameters without a norm rule, so that nothing bounds what an example adds to "
            f"them:{lines}\nMend: freeze them (requires_grad_(False)) or replace the layer."
        )


def check_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Raise unless the optimizer holds every trained parameter and none that is not the model's."""
    if type(optimizer).__name__ == "DPOptimizer" or not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer must be an ordinary torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "LBFGS evaluates the loss several times a step; use an optimizer that steps without a closure"
        )
    held = {id(parameter): parameter for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, parameter in trained_parameters(module).items() if id(parameter) not in held]
    if missing:
        raise ValueError(
            f"the optimizer does not hold these trained parameters: {', '.join(missing)}. Their gradients "
            "would be clipped and noised for nothing; give them to the optimizer, or freeze them "
            "(requires_grad_(False))."
        )
    own = {id(parameter) for parameter in module.parameters()}
    foreign = [tuple(parameter.shape) for key, parameter in held.items() if key not in own]
    trained = {id(parameter) for parameter in trained_parameters(module).values()}
    check_no_gradient([parameter for key, parameter in held.items() if key not in trained])
    if foreign:
        raise ValueError(
            f"the optimizer holds {len(foreign)} parameters that are not the module's (shapes "
            f"{foreign[:5]}): their gradients would be neither clipped nor noised. Build the optimizer from "
            "module.parameters()."
        )


def check_no_gradient(parameters: Iterable[nn.Parameter]) -> None:
    """Raise RuntimeError where a parameter that is not trained has a gradient: torch's optimizers step any
    parameter whose .grad is set, requires_grad or not."""
    shapes = [tuple(parameter.shape) for parameter in parameters if parameter.grad is not None]
    if shapes:
        raise RuntimeError(
            f"the optimizer holds {len(shapes)} parameters that are not trained but have a .grad (shapes "
            f"{shapes[:5]}): it would step them with a gradient that is neither clipped nor noised. Call "
            "optimizer.zero_grad() before make_private, and compute no gradients past optimizer.backward."
        )


@dataclass(frozen=True)
class Snapshot:
    """What must not change while a model is trained privately, of one walk over its modules.

    Attributes:
        batch_norms: whether a batch norm mixes the samples of a batch.
        buffers: (identity, version) of every buffer that state_dict() would release, in the modules' order.
        trained: identities of the parameters with requires_grad, in the modules' order.
    """

    batch_norms: bool
    buffers: list[tuple[int, int]]
    trained: list[int]


def snapshot(modules: Iterable[nn.Module]) -> Snapshot:
    """The snapshot of a model's modules: checks compare it, and look for names only where it differs."""
    batch_norms = False
    buffers: list[tuple[int, int]] = []
    trained: list[int] = []
    for module in modules:  # thousands, in every step: in loops, and with no call where there is nothing
        if module._buffers:
            passing = module._non_persistent_buffers_set
            buffers += [
                (id(buffer), buffer._version)
                for name, buffer in module._buffers.items()
                if buffer is not None and name not in passing
            ]
            batch_norms = batch_norms or mixes_samples(module)
        elif isinstance(module, _BatchNorm):  # one without statistics has no buffers
            batch_norms = batch_norms or mixes_samples(module)
        if module._parameters:
            for parameter in module._parameters.values():
                if parameter is not None and parameter.requires_grad:
                    trained.append(id(parameter))
    return Snapshot(batch_norms, buffers, trained)


def stateful(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of them that a snapshot's buffers and batch norms are read from."""
    return [module for module in modules if module._buffers or isinstance(module, _BatchNorm)]


def released_buffers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(identity, version) of every buffer that state_dict() would release, by name."""
    found = {}
    for prefix, module in named_modules(model):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = (id(buffer), buffer._version)
    return found


def changed_buffers(then: dict[str, tuple[int, int]], now: dict[str, tuple[int, int]]) -> list[str]:
    """Names of the buffers that were written, replaced, added or removed in between."""
    return sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters with requires_grad, by name, each once."""
    found: dict[nn.Parameter, str] = {}
    for prefix, module in named_modules(model):
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                found.setdefault(parameter, f"{prefix}.{name}" if prefix else name)
    return {name: parameter for parameter, name in found.items()}


def check_trained(now: dict[str, nn.Parameter], then: dict[str, nn.Parameter]) -> None:
    """Raise RuntimeError, by name, when the trained parameters changed after make_private."""
    expected = {id(parameter): name for name, parameter in then.items()}
    present = {id(parameter): name for name, parameter in now.items()}
    gone = [name for key, name in expected.items() if key not in present]
    new = [name for key, name in present.items() if key not in expected]
    if gone or new:
        raise RuntimeError(
            "the trained parameters changed after make_private"
            + (f"; no longer there or frozen: {', '.join(gone)}" if gone else "")
            + (f"; new, replaced or unfrozen: {', '.join(new)}" if new else "")
            + ". Move, wrap, freeze and replace parameters before make_private."
        )


def batch_norm_message(names: list[str]) -> str:
    """Why BatchNorm in training mode is refused, and the mend."""
    return (
        "BatchNorm in training mode mixes the examples of a batch, so no example's gradient is its own: "
        f"{', '.join(names)}. Mend: dpkernels.nn.freeze_batch_norm(model) (running statistics, also in "
        "training), or GroupNorm."
    )


def check_losses(losses: Tensor) -> None:
    """Raise TypeError or ValueError unless losses are [B], floating and part of a graph."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"losses must be a Tensor of shape [B], got {type(losses).__name__}")
    if losses.dim() != 1:
        mend = (
            "a reduced loss cannot be told apart by example: use reduction='none' and, for losses over "
            "time, sum or average within each example: loss(..., reduction='none').flatten(1).sum(1)"
        )
        raise ValueError(
            f"losses must have shape [B], one loss an example, got shape {tuple(losses.shape)}; {mend}"
        )
    if not losses.is_floating_point():
        raise TypeError(f"losses must be floating-point, got {losses.dtype}")
    if losses.shape[0] and not losses.requires_grad:
        raise ValueError(
            "losses do not require grad: no trained parameter had a part in them (torch.no_grad, detach, or "
            "everything frozen?)"
        )
