"""The private step in one sweep over memory, for the optimizers that it covers, and why it does not cover others.

Noise, division and update go through `dpkernels.ops.noise_adamw` and `noise_sgd`. The optimizer's state stays where
torch keeps it and as torch lays it out, so that a `state_dict` goes from one path to the other, and to plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as torch_optimizer

from dpkernels import ops
from dpkernels.privacy.rng.streams import SecretStream

DTYPES = (torch.float32, torch.bfloat16)
ADAM_STATES = ("exp_avg", "exp_avg_sq")


def _unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """A class's step without the wrapper that torch puts around it when the first instance is made."""
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[attr-defined]


# As this module found them: a step that someone replaced since is one that has to be called.
_STEPS = {kind: _unhooked(kind.step) for kind in (AdamW, Adam, SGD)}


def uncovered(optimizer: Optimizer, trained: Sequence[nn.Parameter]) -> str:
    """Why one sweep cannot take the optimizer's place; "" where it can.

    Args:
        optimizer: the wrapped optimizer.
        trained: the parameters it is to update.
    """
    kind = type(optimizer)
    if kind not in _STEPS:
        return f"{kind.__name__} is not one of torch's AdamW, Adam and SGD"
    own = vars(optimizer).get("step")
    # A scheduler puts a wrapper around it that notes the call, which take_step does in its place.
    own = getattr(own, "__wrapped__", own) if hasattr(own, "_wrapped_by_lr_sched") else own
    if _unhooked(kind.step) is not _STEPS[kind] or own not in (None, kind.step):
        return f"{kind.__name__}.step was replaced"
    hooks = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
    if any(hooks):
        return "hooks are registered on the optimizer's step"
    if getattr(optimizer, "grad_scale", None) is not None:
        return "a gradient scaler is at work"
    mine = {id(parameter) for parameter in trained}
    for number, group in enumerate(optimizer.param_groups):
        if any(id(parameter) in mine for parameter in group["params"]):
            reason = _uncovered_group(group)
            if reason:
                return f"parameter group {number}: {reason}"
    for parameter in trained:
        reason = _uncovered_parameter(parameter, optimizer.state.get(parameter, {}))
        if reason:
            return f"a parameter of shape {tuple(parameter.shape)}: {reason}"
    return ""


def _uncovered_group(group: Mapping[str, Any]) -> str:
    for name in ("amsgrad", "capturable", "differentiable"):
        if group.get(name, False):
            return f"{name}=True"
    numbers = {name: group.get(name, 0.0) for name in ("momentum", "dampening", "weight_decay", "eps")}
    numbers |= {f"betas[{i}]": beta for i, beta in enumerate(group.get("betas", ()))}
    for name, value in numbers.items():
        if isinstance(value, Tensor):
            return f"{name} is a tensor"
    lr = group["lr"]
    if isinstance(lr, Tensor) and (lr.device.type != "cpu" or lr.requires_grad):
        return "lr is a tensor on a device, or one that requires a gradient"
    return ""


def _uncovered_parameter(parameter: nn.Parameter, state: Mapping[str, Any]) -> str:
    shape, device = parameter.shape, parameter.device
    if parameter.dtype not in DTYPES:
        return f"its dtype is {parameter.dtype}"
    if device.type not in ("cpu", "cuda"):
        return f"it is on {device.type}"
    if parameter.layout != torch.strided or not parameter.is_contiguous():
        return "it is not contiguous"
    for name in (*ADAM_STATES, "momentum_buffer"):
        kept = state.get(name)
        if kept is not None and (kept.shape != shape or kept.device != device):
            return f"its {name} has another shape or device"
    return ""


@dataclass(frozen=True)
class Release:
    """The public constants of a step's noise: deviation of the noise on the sum, the grid, the divisor."""

    noise_scale: float
    grid: float
    divisor: float


@dataclass
class _Part:
    """The parameters of one group on one device, and all that their op needs."""

    group: Mapping[str, Any]
    params: list[nn.Parameter]
    indices: list[int]
    states: dict[str, list[Tensor]]
    counters: list[Tensor]
    steps: list[float]
    grads: list[Tensor]


def take_step(
    optimizer: Optimizer,
    trained: Sequence[nn.Parameter],
    sums: Mapping[nn.Parameter, Tensor],
    release: Release,
    stream: SecretStream,
    draw: int,
    *,
    keep_gradients: bool,
    stochastic_rounding: bool,
) -> dict[nn.Parameter, Tensor]:
    """Noise the sums and step, for an optimizer of which `uncovered` says "". The sums are 0 afterwards.

    Everything is allocated before anything is changed. What an exception in the middle leaves is a part of the
    parameters stepped on, each noised once: less than was counted was released.

    Args:
        optimizer: the wrapped optimizer; its state is updated, in torch's layout but float32 throughout.
        trained: the trained parameters; their place in this list is their stream's index.
        sums: of every trained parameter, float64.
        release: the noise's constants.
        stream: where the noise comes from.
        draw: this step's number in the stream.
        keep_gradients: also return what was applied.
        stochastic_rounding: round bfloat16 parameters at random.

    Returns:
        The noised gradients by parameter where they are kept, else nothing.
    """
    parts = [
        _prepare(optimizer, group, params, trained, keep_gradients)
        for group in optimizer.param_groups
        for params in _by_device(group["params"], trained)
    ]
    for part in parts:
        _run(optimizer, part, sums, release, stream, draw, stochastic_rounding)
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        optimizer._opt_called = True  # type: ignore[attr-defined]  # what its wrapper would have noted
    return {p: grad for part in parts for p, grad in zip(part.params, part.grads, strict=False)}


def _by_device(params: Sequence[nn.Parameter], trained: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    mine = {id(parameter) for parameter in trained}
    found: dict[torch.device, list[nn.Parameter]] = {}
    for parameter in params:
        if id(parameter) in mine:
            found.setdefault(parameter.device, []).append(parameter)
    return list(found.values())


def _prepare(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    params: list[nn.Parameter],
    trained: Sequence[nn.Parameter],
    keep_gradients: bool,
) -> _Part:
    place = {id(parameter): index for index, parameter in enumerate(trained)}
    grads = [torch.empty_like(p, requires_grad=False) for p in params] if keep_gradients else []
    part = _Part(group, params, [place[id(p)] for p in params], {}, [], [], grads)
    if isinstance(optimizer, SGD):
        if group["momentum"] != 0:
            kept = [optimizer.state[p].get("momentum_buffer") for p in params]
            part.states["momentum_buffer"] = [
                torch.zeros_like(p, dtype=torch.float32, requires_grad=False)
                if b is None
                else b.float().contiguous()
                for p, b in zip(params, kept, strict=True)
            ]
            part.steps = [1.0 if b is None else 2.0 for b in kept]
        else:
            part.steps = [1.0] * len(params)
        return part
    for p in params:
        state = optimizer.state[p]
        kind = torch_optimizer._get_scalar_dtype(group["fused"])
        if not state:
            # As Adam lays it out: the counter lives on the host unless the group is fused.
            place_of_step = p.device if group["fused"] else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=kind, device=place_of_step)
        elif state["step"].dtype != kind:  # of another optimizer's state: all are counted on together
            state["step"] = state["step"].to(kind)
        for name in ADAM_STATES:
            kept_state = state.get(name)
            if kept_state is None:
                state[name] = torch.zeros_like(p, dtype=torch.float32, requires_grad=False)
            elif kept_state.dtype != torch.float32 or not kept_state.is_contiguous():
                state[name] = kept_state.float().contiguous()
            part.states.setdefault(name, []).append(state[name])
        part.counters.append(state["step"])
    # One transfer for all counters that live on a GPU.
    part.steps = [count + 1.0 for count in torch.stack(part.counters).tolist()]
    return part


def _run(
    optimizer: Optimizer,
    part: _Part,
    sums: Mapping[nn.Parameter, Tensor],
    release: Release,
    stream: SecretStream,
    draw: int,
    stochastic_rounding: bool,
) -> None:
    group = part.group
    common: dict[str, Any] = {
        **stream.sweep_secrets(part.indices, draw=draw, rounding=stochastic_rounding),
        "noise_scale": release.noise_scale,
        "grid": release.grid,
        "divisor": release.divisor,
        "lr": float(group["lr"]),
        "weight_decay": float(group["weight_decay"]),
        "maximize": bool(group["maximize"]),
        "grads": part.grads,
    }
    totals = [sums[p] for p in part.params]
    if isinstance(optimizer, SGD):
        buffers = part.states.get("momentum_buffer", [])
        ops.noise_sgd(
            part.params,
            totals,
            buffers,
            part.steps,
            momentum=float(group["momentum"]),
            dampening=float(group["dampening"]),
            nesterov=bool(group["nesterov"]),
            **common,
        )
        for p, buffer in zip(part.params, buffers, strict=False):
            optimizer.state[p]["momentum_buffer"] = buffer
        return
    beta1, beta2 = group["betas"]
    ops.noise_adamw(
        part.params,
        totals,
        part.states["exp_avg"],
        part.states["exp_avg_sq"],
        part.steps,
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group["eps"]),
        decoupled=bool(group["decoupled_weight_decay"]),
        **common,
    )
    # A number would be made a tensor anew for each of the counters that are on the host.
    torch._foreach_add_(part.counters, torch.ones_like(part.counters[0]))


def narrow_states(optimizer: Optimizer, trained: Sequence[nn.Parameter]) -> None:
    """Put the states into their parameters' dtypes, as torch's own step expects them: for a step it takes."""
    for parameter in trained:
        state = optimizer.state.get(parameter, {})
        for name in (*ADAM_STATES, "momentum_buffer"):
            if isinstance(state.get(name), Tensor) and state[name].dtype != parameter.dtype:
                state[name] = state[name].to(parameter.dtype)


def restore_wide_states(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """After `optimizer.load_state_dict(saved)`, which casts states to their parameters' dtypes: float32 ones again.

    Args:
        optimizer: the wrapped optimizer, loaded.
        saved: what it was loaded from.
    """
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    for parameter, number in zip(order, numbers, strict=True):
        for name, value in saved["state"].get(number, {}).items():
            if name == "step" or not isinstance(value, Tensor) or not isinstance(parameter, Tensor):
                continue
            if parameter.dtype == torch.bfloat16 and value.dtype == torch.float32:
                optimizer.state[parameter][name] = value.to(parameter.device, copy=True)
