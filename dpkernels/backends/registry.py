"""Which implementation an op uses on a kind of device, and why.

The order is native code, Triton kernels (on GPUs), the torch composition, the reference. `DPKERNELS_BACKEND` (auto,
native, triton, torch, reference) forces one: native that cannot serve an op is an error, not a fallback, and so is
triton where no Triton kernel can run; triton leaves the families that it has no kernels for to what follows it, and
torch leaves to the reference what torch cannot compose (the noise). A norm and its weighted sum always come from the
same backend: the norm is rounded up by a bound on what *that* sum adds.
"""

import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

logger = logging.getLogger("dpkernels")

ENVIRONMENT_VARIABLE = "DPKERNELS_BACKEND"
CHOICES = ("auto", "native", "triton", "torch", "reference")

FAMILIES: dict[str, tuple[str, ...]] = {
    "linear": ("linear_norm_sq", "linear_weighted_sum"),
    "bias": ("bias_norm_sq", "bias_weighted_sum"),
    "lora": ("lora_norm_sq", "lora_weighted_sum"),
    "lora_gradients": ("lora_gradients",),
    "embedding": ("embedding_norm_sq", "embedding_weighted_sum"),
    "layer_norm": ("layer_norm_norm_sq", "layer_norm_weighted_sum"),
    "depthwise_conv1d": ("depthwise_conv1d_norm_sq", "depthwise_conv1d_weighted_sum"),
    "clip": ("clip_factors",),
    "chacha20_keystream": ("chacha20_keystream",),
    "chacha20_normal": ("chacha20_normal",),
    "noise_adamw": ("noise_adamw",),
    "noise_sgd": ("noise_sgd",),
    "total_norm_sq": ("total_norm_sq",),
    "clip_and_noise": ("clip_and_noise",),
}
"""Every op, by the group that is served by one backend."""

OPS: tuple[str, ...] = tuple(op for family in FAMILIES.values() for op in family)

_NATIVE_MODULES = {
    "chacha20_keystream": "native_chacha20",
    "chacha20_normal": "native_chacha20",
    "noise_adamw": "native_sweep",
    "noise_sgd": "native_sweep",
    "total_norm_sq": "native_grouped",
    "clip_and_noise": "native_grouped",
}
"""Where a family's native functions are, if not in native_ops."""

_TORCH_MODULES = {
    "noise_adamw": "torch_sweep",
    "noise_sgd": "torch_sweep",
    "total_norm_sq": "torch_grouped",
    "clip_and_noise": "torch_grouped",
}
"""The same for the torch compositions, if not in torch_ops."""

Implementation = Callable[..., Any]


@dataclass(frozen=True)
class OpBackend:
    """The backend that serves `op` on `device`, and why none before it does ("" for the first choice)."""

    op: str
    device: str
    backend: str
    reason: str


_reference: dict[str, Implementation] = {}
_chosen: dict[tuple[str, str, str], tuple[OpBackend, Implementation]] = {}


def add_reference(functions: dict[str, Implementation]) -> None:
    """Hand in the definitions, by op. `dpkernels.ops` does so: this package imports no `reference`."""
    _reference.update(functions)
    _chosen.clear()


def forced() -> str:
    """The value of DPKERNELS_BACKEND: the only place that reads it.

    Raises:
        ValueError: the value is none of CHOICES.
    """
    value = os.environ.get(ENVIRONMENT_VARIABLE, "auto").strip().lower() or "auto"
    if value not in CHOICES:
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE}: given {value!r}; set it to one of {', '.join(CHOICES)}, or unset it"
        )
    return value


def _family(op: str) -> str:
    for family, ops in FAMILIES.items():
        if op in ops:
            return family
    raise ValueError(f"op: given {op!r}; the ops are {', '.join(OPS)}")


def _missing(module: ModuleType, family: str) -> str:
    missing = [op for op in FAMILIES[family] if not hasattr(module, op)]
    return f"{module.__name__.rpartition('.')[2]} has no {', '.join(missing)}" if missing else ""


def _native(family: str, device: str) -> tuple[ModuleType | None, str]:
    """(native_ops, "") where it serves this family on this kind of device, else (None, why not)."""
    try:
        native = importlib.import_module("dpkernels.backends.native")
        module = importlib.import_module(f"dpkernels.backends.{_NATIVE_MODULES.get(family, 'native_ops')}")
    except ModuleNotFoundError as error:
        return None, f"this installation has no native loader ({error})"
    reason = native.unavailable_reason(device, family)
    if reason:
        return None, reason
    reason = _missing(module, family)
    return (None, reason) if reason else (module, "")


def _triton_unavailable(device: str) -> str:
    availability = importlib.import_module("dpkernels.backends.triton_availability")
    return str(availability.unavailable_reason(device))


def _triton(family: str) -> tuple[ModuleType | None, str]:
    module = importlib.import_module("dpkernels.backends.triton_ops")
    reason = _missing(module, family)
    return (None, reason) if reason else (module, "")


def _torch(family: str) -> tuple[ModuleType | None, str]:
    module = importlib.import_module(f"dpkernels.backends.{_TORCH_MODULES.get(family, 'torch_ops')}")
    reason = _missing(module, family)
    return (None, reason) if reason else (module, "")


def _choose(op: str, device: str, choice: str) -> tuple[OpBackend, Implementation]:
    family = _family(op)
    why: list[str] = []
    if choice in ("auto", "native"):
        module, reason = _native(family, device)
        if module is not None:
            return OpBackend(op, device, "native", ""), getattr(module, op)
        why.append(reason)
    # on the CPU Triton is interpreted, for tests: nothing to choose, or to log, unasked
    triton = choice == "triton" or (choice == "auto" and device != "cpu")
    unavailable = _triton_unavailable(device) if triton else ""
    if triton and not unavailable:
        module, unavailable = _triton(family)
        if module is not None:
            return OpBackend(op, device, "triton", "; ".join(why)), getattr(module, op)
    elif choice == "triton":
        raise RuntimeError(f"{op} on {device}: {unavailable}; or unset {ENVIRONMENT_VARIABLE}")
    if unavailable:
        why.append(unavailable)
    if choice in ("auto", "triton", "torch"):
        module, reason = _torch(family)
        if module is not None:
            return OpBackend(op, device, "torch", "; ".join(why)), getattr(module, op)
        why.append(reason)
    if choice in ("auto", "triton", "torch", "reference"):
        if op in _reference:
            return OpBackend(op, device, "reference", "; ".join(why)), _reference[op]
        why.append("the reference has no such function")
    hint = f"unset {ENVIRONMENT_VARIABLE}" if choice != "auto" else "reinstall dpkernels"
    raise RuntimeError(f"{op} on {device}: no implementation ({'; '.join(why)}); {hint}")


def implementation(op: str, device_type: str) -> Implementation:
    """The function that computes `op` on this kind of device; a fallback is logged once, with its reason.

    Args:
        op: a name in OPS.
        device_type: "cpu", "cuda", ...

    Raises:
        ValueError: unknown op, or a DPKERNELS_BACKEND that is none of its values.
        RuntimeError: the backend that DPKERNELS_BACKEND forces cannot serve this op here.
    """
    key = (op, device_type, forced())
    if key not in _chosen:
        _chosen[key] = _choose(*key)
        choice = _chosen[key][0]
        if choice.reason:
            logger.warning("%s on %s uses %s: %s", choice.op, choice.device, choice.backend, choice.reason)
    return _chosen[key][1]


def explain(device_types: tuple[str, ...] = ("cpu", "cuda")) -> list[OpBackend]:
    """What every op would use on each kind of device, and why; "none" for an op that nothing serves."""
    rows = []
    for device in device_types:
        for op in OPS:
            try:
                rows.append(_choose(op, device, forced())[0])
            except RuntimeError as error:
                rows.append(OpBackend(op, device, "none", str(error)))
    return rows
