"""The fused noise-and-optimizer step: one pass over memory, for torch's AdamW, Adam and SGD.

`dpkernels.ops.noise_adamw` and `noise_sgd` add the noise, divide and update. The optimizer's state stays in torch's
place and layout, so that a `state_dict` is valid for the fused step, the unfused step and plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as torch_optimizer

from dpkernels import ops
from dpkernels.privacy.rng.streams import SecretStream
from dpkernels.privacy.step.states import Span

DTYPES = (torch.float32, torch.bfloat16)
ADAM_STATES = ("exp_avg", "exp_avg_sq")


def _unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """A class's step without the wrapper that torch puts around it when it creates the first instance."""
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[attr-defined]


# The steps at import time: a step that was replaced since then has to be called.
_STEPS = {kind: _unhooked(kind.step) for kind in (AdamW, Adam, SGD)}


def uncovered(optimizer: Optimizer, trained: Sequence[nn.Parameter]) -> str:
    """The reason why the fused step cannot replace the optimizer's own step; "" if it can.

    Args:
        optimizer: the wrapped optimizer.
        trained: the parameters that the step updates.
    """
    kind = type(optimizer)
    if kind not in _STEPS:
        return f"{kind.__name__} is not one of torch's AdamW, Adam and SGD"
    step = vars(optimizer).get("step")
    # A scheduler's wrapper around the step only records the call; take_step records it instead.
    step = getattr(step, "__wrapped__", step) if hasattr(step, "_wrapped_by_lr_sched") else step
    if _unhooked(kind.step) is not _STEPS[kind] or step not in (None, kind.step):
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
        return "a gradient scaler is in use"
    trained_ids = {id(parameter) for parameter in trained}
    for number, group in enumerate(optimizer.param_groups):
        if any(id(parameter) in trained_ids for parameter in group["params"]):
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
    """The pieces of one group on one device, and the arguments of their op.

    counters: torch's counter of each span. buffers: SGD's momentum buffer of each span, to be kept.
    """

    group: Mapping[str, Any]
    params: list[Tensor] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    states: dict[str, list[Tensor]] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    counters: list[Tensor] = field(default_factory=list)
    buffers: dict[nn.Parameter, Tensor] = field(default_factory=dict)


def take_step(
    optimizer: Optimizer,
    states: MutableMapping[nn.Parameter, dict[str, Any]],
    trained: Sequence[nn.Parameter],
    sums: Sequence[Tensor],
    spans: Sequence[Span],
    release: Release,
    stream: SecretStream,
    draw: int,
    *,
    gradients: Sequence[Tensor],
    stochastic_rounding: bool,
) -> None:
    """Noise the sums and step, for an optimizer that `uncovered` returns "" for. The sums are 0 afterwards.

    Everything is allocated before anything is changed. After an exception in the middle, some of the parameters are
    updated, each with noise added once: less was released than was counted.

    Args:
        optimizer: the wrapped optimizer.
        states: its state, or this process's part of it: updated, in torch's layout and in float32.
        trained: the trained parameters.
        sums: the sum of every trained parameter, float64.
        spans: what this process steps of them. A piece's index is its stream's.
        release: the noise's constants.
        stream: the source of the noise.
        draw: this step's number in the stream.
        gradients: tensors like the trained parameters, which get the noised gradients; or none.
        stochastic_rounding: round bfloat16 parameters at random.
    """
    span_of = {trained[span.place]: span for span in spans}
    parts = [
        _prepare(optimizer, states, group, these, trained, sums, gradients)
        for group in optimizer.param_groups
        for these in _by_device(group["params"], span_of)
    ]
    for part in parts:
        _run(optimizer, states, part, release, stream, draw, stochastic_rounding)
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        optimizer._opt_called = True  # type: ignore[attr-defined]  # as the scheduler's wrapper records it


def _by_device(params: Sequence[nn.Parameter], span_of: Mapping[nn.Parameter, Span]) -> list[list[Span]]:
    by_device: dict[torch.device, list[Span]] = {}
    for parameter in params:
        if parameter in span_of:
            by_device.setdefault(parameter.device, []).append(span_of[parameter])
    return list(by_device.values())


def _prepare(
    optimizer: Optimizer,
    states: MutableMapping[nn.Parameter, dict[str, Any]],
    group: Mapping[str, Any],
    spans: Sequence[Span],
    trained: Sequence[nn.Parameter],
    sums: Sequence[Tensor],
    gradients: Sequence[Tensor],
) -> _Part:
    part = _Part(group)
    for span in spans:
        for piece in span.pieces:
            part.indices.append(piece.index)
            part.params.append(piece.of(trained[piece.place]))
            part.sums.append(piece.of(sums[piece.place]))
            if gradients:
                part.grads.append(piece.of(gradients[piece.place]))
    if isinstance(optimizer, SGD):
        _prepare_sgd(states, part, spans, trained)
    else:
        _prepare_adam(states, part, spans, trained)
    return part


def _prepare_sgd(
    states: Mapping[nn.Parameter, dict[str, Any]],
    part: _Part,
    spans: Sequence[Span],
    trained: Sequence[nn.Parameter],
) -> None:
    for span in spans:
        parameter = trained[span.place]
        momentum = part.group["momentum"] != 0
        kept = states[parameter].get("momentum_buffer") if momentum else None
        if momentum:
            buffer = (
                torch.zeros_like(span.of(parameter), dtype=torch.float32, requires_grad=False)
                if kept is None
                else kept.float().contiguous()
            )
            part.buffers[parameter] = buffer
            part.states.setdefault("momentum_buffer", []).extend(span.cut(buffer))
        part.steps += [1.0 if kept is None else 2.0] * len(span.pieces)


def _prepare_adam(
    states: Mapping[nn.Parameter, dict[str, Any]],
    part: _Part,
    spans: Sequence[Span],
    trained: Sequence[nn.Parameter],
) -> None:
    kind = torch_optimizer._get_scalar_dtype(part.group["fused"])
    for span in spans:
        p = trained[span.place]
        state = states[p]
        if not state:
            # Adam's layout: the counter is on the host unless the group is fused.
            place_of_step = p.device if part.group["fused"] else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=kind, device=place_of_step)
        elif state["step"].dtype != kind:  # from another optimizer; one call increments all counters
            state["step"] = state["step"].to(kind)
        for name in ADAM_STATES:
            kept = state.get(name)
            if kept is None:
                state[name] = torch.zeros_like(span.of(p), dtype=torch.float32, requires_grad=False)
            elif kept.dtype != torch.float32 or not kept.is_contiguous():
                state[name] = kept.float().contiguous()
            part.states.setdefault(name, []).extend(span.cut(state[name]))
        part.counters.append(state["step"])
    # One transfer for all counters on a GPU.
    counts = torch.stack(part.counters).tolist()
    for span, count in zip(spans, counts, strict=True):
        part.steps += [count + 1.0] * len(span.pieces)


def _run(
    optimizer: Optimizer,
    states: MutableMapping[nn.Parameter, dict[str, Any]],
    part: _Part,
    release: Release,
    stream: SecretStream,
    draw: int,
    stochastic_rounding: bool,
) -> None:
    group = part.group
    common: dict[str, Any] = {
        **stream.step_secrets(part.indices, draw=draw, rounding=stochastic_rounding),
        "noise_scale": release.noise_scale,
        "grid": release.grid,
        "divisor": release.divisor,
        "lr": float(group["lr"]),
        "weight_decay": float(group["weight_decay"]),
        "maximize": bool(group["maximize"]),
        "grads": part.grads,
    }
    totals = part.sums
    if isinstance(optimizer, SGD):
        ops.noise_sgd(
            part.params,
            totals,
            part.states.get("momentum_buffer", []),
            part.steps,
            momentum=float(group["momentum"]),
            dampening=float(group["dampening"]),
            nesterov=bool(group["nesterov"]),
            **common,
        )
        for parameter, buffer in part.buffers.items():
            states[parameter]["momentum_buffer"] = buffer
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
    # torch would convert a number to a tensor again for each counter on the host.
    torch._foreach_add_(part.counters, torch.ones_like(part.counters[0]))


def narrow_states(optimizer: Optimizer, trained: Sequence[nn.Parameter]) -> None:
    """Convert the states to their parameters' dtypes, which torch's own step expects."""
    for parameter in trained:
        state = optimizer.state.get(parameter, {})
        for name in (*ADAM_STATES, "momentum_buffer"):
            if isinstance(state.get(name), Tensor) and state[name].dtype != parameter.dtype:
                state[name] = state[name].to(parameter.dtype)


def restore_wide_states(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Restore the float32 states that `optimizer.load_state_dict(saved)` has cast to their parameters' dtypes.

    Args:
        optimizer: the wrapped optimizer, loaded.
        saved: the state_dict that it was loaded from.
    """
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    for parameter, number in zip(order, numbers, strict=True):
        for name, value in saved["state"].get(number, {}).items():
            if name == "step" or not isinstance(value, Tensor) or not isinstance(parameter, Tensor):
                continue
            if parameter.dtype == torch.bfloat16 and value.dtype == torch.float32:
                optimizer.state[parameter][name] = value.to(parameter.device, copy=True)
