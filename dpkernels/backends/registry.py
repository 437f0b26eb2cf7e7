"""The choice of an op's implementation on a device type, and the reason for it.

The order is native code, Triton kernels (on GPUs), the torch composition, the reference. `DPKERNELS_BACKEND` (auto,
native, triton, torch, reference) forces one. With native, an op that native code cannot serve is an error, not a
fallback; with triton, so is a machine that cannot run Triton kernels. A family without Triton kernels, and an op that
torch cannot compose (the noise), fall back to the next backend in the order. A norm and its weighted sum always come
from the same backend, because the norm is rounded up by a bound on *that* sum. An op that is composed of other ops
(`composition`) does not count as a fallback: each of those has its own backend.

This module lists neither ops nor backends. `dpkernels.ops` registers the definitions, which define the ops;
`dpkernels.backends` registers the backends: packages with an op in the file named as that of its definition.
"""

import importlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

logger = logging.getLogger("dpkernels")

ENVIRONMENT_VARIABLE = "DPKERNELS_BACKEND"
_TRIED = {
    "auto": ("native", "triton", "torch", "reference"),
    "native": ("native",),
    "triton": ("triton", "torch", "reference"),
    "torch": ("torch", "reference"),
    "reference": ("reference",),
}
"""For each value of the variable, the backends in the order in which they are tried."""

CHOICES = tuple(_TRIED)

Implementation = Callable[..., Any]
_F = TypeVar("_F", bound=Implementation)


@dataclass(frozen=True)
class OpBackend:
    """The backend that serves `op` on `device`, and why no earlier one does ("" for the first choice)."""

    op: str
    device: str
    backend: str
    reason: str


@dataclass(frozen=True)
class _Backend:
    """A backend's import name, and the function (device type, op) → reason why it is unavailable, or ""."""

    package: str
    unavailable_reason: Callable[[str, str], str]


_backends: dict[str, _Backend] = {}
_definitions: Mapping[str, Implementation] = MappingProxyType({})
_chosen: dict[tuple[str, str, str], tuple[OpBackend, Implementation]] = {}


def add_backend(name: str, package: str, unavailable_reason: Callable[[str, str], str]) -> None:
    """Register a backend: its name in CHOICES, its package, and (device type, op) → why it is unavailable, or ""."""
    _backends[name] = _Backend(package, unavailable_reason)


def add_reference(definitions: Mapping[str, Implementation]) -> None:
    """Register the definitions by op, which also defines the ops. This package does not import `reference`."""
    global _definitions
    _definitions = definitions
    _chosen.clear()


def composition(function: _F) -> _F:
    """Mark an implementation that is composed of other ops, each of which this registry resolves to its own backend."""
    function.is_composition = True  # type: ignore[attr-defined]
    return function


def forced() -> str:
    """Return the value of DPKERNELS_BACKEND, which no other function reads.

    Raises:
        ValueError: the value is not one of CHOICES.
    """
    value = os.environ.get(ENVIRONMENT_VARIABLE, "auto").strip().lower() or "auto"
    if value not in CHOICES:
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE}: given {value!r}; set it to one of {', '.join(CHOICES)}, or unset it"
        )
    return value


def ops() -> tuple[str, ...]:
    """Every op, by name."""
    return tuple(sorted(_definitions))


def family(op: str) -> tuple[str, ...]:
    """The ops that the same backend serves: a norm and its weighted sum, or the op alone.

    Raises:
        ValueError: the op is unknown.
    """
    if op not in _definitions:
        raise ValueError(f"op: given {op!r}; pass one of {', '.join(ops())}")
    stem = op.removesuffix("_norm_sq").removesuffix("_weighted_sum")
    pair = (f"{stem}_norm_sq", f"{stem}_weighted_sum")
    return pair if _definitions.keys() >= set(pair) and op in pair else (op,)


def families() -> dict[str, tuple[str, ...]]:
    """Return the ops by family, which is named after its layer, or after its only op."""
    by_name = {}
    for op in ops():
        together = family(op)
        name = op if len(together) == 1 else together[0].removesuffix("_norm_sq")
        by_name[name] = together
    return by_name


def function(backend: str, op: str) -> Implementation | None:
    """Return a backend's function for an op, or None if it has none; this imports its file, on any device.

    Args:
        backend: "native", "triton", "torch" or "reference".
        op: one of `ops()`.
    """
    definition = _definitions[op]
    if backend == "reference":
        return definition
    module = f"{_backends[backend].package}.{definition.__module__.rpartition('.')[2]}"
    try:
        return getattr(importlib.import_module(module), op, None)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        return None


def attribute(backend: str, name: str) -> Implementation:
    """Return a backend's function for an op, on behalf of its package's `__getattr__`.

    Raises:
        AttributeError: there is no such op, or the backend has no function for it.
    """
    backend_function = function(backend, name) if name in _definitions else None
    if backend_function is None:
        raise AttributeError(f"{backend}_ops has no {name}")
    return backend_function


def _unavailable(backend: str, op: str, device: str) -> str:
    """Return why this backend does not serve the op; "" if it does."""
    if backend == "reference":
        return ""
    reason = _backends[backend].unavailable_reason(device, op)
    if reason:
        return reason
    missing = [member for member in family(op) if function(backend, member) is None]
    return f"{backend}_ops has no {', '.join(missing)}" if missing else ""


def _choose(op: str, device: str, choice: str) -> tuple[OpBackend, Implementation]:
    family(op)  # raises for an unknown op
    why: list[str] = []
    for backend in _TRIED[choice]:
        if backend == "triton":
            if choice == "auto" and device == "cpu":
                continue  # the interpreter is for tests: it is used and logged on request only
            unusable = _backends[backend].unavailable_reason(device, op)
            if unusable and choice == "triton":
                raise RuntimeError(f"{op} on {device}: {unusable}; or unset {ENVIRONMENT_VARIABLE}")
        reason = _unavailable(backend, op, device)
        chosen = None if reason else function(backend, op)
        if chosen is not None:
            return _served(op, device, backend, chosen, why)
        why.append(reason)
    composed = function("torch", op)
    if composed is not None and _is_composition(composed):
        return _served(op, device, "torch", composed, why)
    raise RuntimeError(
        f"{op} on {device}: no implementation ({'; '.join(why)}); unset {ENVIRONMENT_VARIABLE}"
    )


def _served(
    op: str, device: str, backend: str, chosen: Implementation, why: list[str]
) -> tuple[OpBackend, Implementation]:
    if why and _is_composition(chosen):
        why = [*why, "it is composed of other ops, each by its own backend"]
    return OpBackend(op, device, backend, "; ".join(why)), chosen


def _is_composition(implementation: Implementation) -> bool:
    return getattr(implementation, "is_composition", False)


def implementation(op: str, device_type: str) -> Implementation:
    """Return the function that computes `op` on a device type; a fallback is logged once, with its reason.

    Args:
        op: one of `ops()`.
        device_type: "cpu", "cuda", ...

    Raises:
        ValueError: the op is unknown, or DPKERNELS_BACKEND has an unknown value.
        RuntimeError: the backend that DPKERNELS_BACKEND forces cannot serve this op here.
    """
    key = (op, device_type, forced())
    if key not in _chosen:
        _chosen[key] = _choose(*key)
        choice, chosen = _chosen[key]
        if choice.reason and not _is_composition(chosen):
            logger.warning("%s on %s uses %s: %s", choice.op, choice.device, choice.backend, choice.reason)
    return _chosen[key][1]


def backend_of(op: str, device_type: str) -> str:
    """The name of the backend that serves `op` on a device type; raises as `implementation` does."""
    implementation(op, device_type)
    return _chosen[op, device_type, forced()][0].backend


def explain(device_types: tuple[str, ...] = ("cpu", "cuda")) -> list[OpBackend]:
    """Return the backend of every op on each device type, with the reason; "none" if no backend serves the op."""
    rows = []
    for device in device_types:
        for op in ops():
            try:
                rows.append(_choose(op, device, forced())[0])
            except RuntimeError as error:
                rows.append(OpBackend(op, device, "none", str(error)))
    return rows
