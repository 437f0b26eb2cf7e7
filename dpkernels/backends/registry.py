"""Which implementation an op uses on a kind of device, and why.

The order is native code, Triton kernels (on GPUs), the torch composition, the reference. `DPKERNELS_BACKEND` (auto,
native, triton, torch, reference) forces one: native that cannot serve an op is an error, not a fallback, and so is
triton where no Triton kernel can run; triton leaves the families that it has no kernels for to what follows it, and
torch leaves to the reference what torch cannot compose (the noise). A norm and its weighted sum always come from the
same backend: the norm is rounded up by a bound on what *that* sum adds. An op that is made of other ops
(`composition`) is no fallback: each of those has its own backend.

Nothing is listed here. `dpkernels.ops` hands in the definitions, which say what ops there are; `dpkernels.backends`
hands in the backends, packages in which an op stands in the file that its definition's file is called.
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
"""By the variable's value, the backends in their order."""

CHOICES = tuple(_TRIED)

Implementation = Callable[..., Any]
_F = TypeVar("_F", bound=Implementation)


@dataclass(frozen=True)
class OpBackend:
    """The backend that serves `op` on `device`, and why none before it does ("" for the first choice)."""

    op: str
    device: str
    backend: str
    reason: str


@dataclass(frozen=True)
class _Backend:
    """package: its import name. unavailable_reason: of (device type, op), why it cannot serve it; "" if it may."""

    package: str
    unavailable_reason: Callable[[str, str], str]


_backends: dict[str, _Backend] = {}
_definitions: Mapping[str, Implementation] = MappingProxyType({})
_chosen: dict[tuple[str, str, str], tuple[OpBackend, Implementation]] = {}


def add_backend(name: str, package: str, unavailable_reason: Callable[[str, str], str]) -> None:
    """Hand in a backend: the name in CHOICES, its package, and of (device type, op) why it is unavailable or ""."""
    _backends[name] = _Backend(package, unavailable_reason)


def add_reference(definitions: Mapping[str, Implementation]) -> None:
    """Hand in the definitions, by op, and with them what ops there are. This package imports no `reference`."""
    global _definitions
    _definitions = definitions
    _chosen.clear()


def composition(function: _F) -> _F:
    """Mark an implementation that is made of other ops, each of which it gets from here, by its own backend."""
    function.made_of_ops = True  # type: ignore[attr-defined]
    return function


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


def ops() -> tuple[str, ...]:
    """Every op, by name."""
    return tuple(sorted(_definitions))


def family(op: str) -> tuple[str, ...]:
    """The ops that the same backend serves: a norm and its weighted sum, or the op alone.

    Raises:
        ValueError: unknown op.
    """
    if op not in _definitions:
        raise ValueError(f"op: given {op!r}; the ops are {', '.join(ops())}")
    stem = op.removesuffix("_norm_sq").removesuffix("_weighted_sum")
    pair = (f"{stem}_norm_sq", f"{stem}_weighted_sum")
    return pair if _definitions.keys() >= set(pair) and op in pair else (op,)


def families() -> dict[str, tuple[str, ...]]:
    """The ops by family: the name of its layer, or of the op alone."""
    found = {}
    for op in ops():
        together = family(op)
        name = op if len(together) == 1 else together[0].removesuffix("_norm_sq")
        found[name] = together
    return found


def function(backend: str, op: str) -> Implementation | None:
    """A backend's function of this name, or None where it has none; its file is imported, whatever the device.

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
    """What `__getattr__` of a backend's package gives: its function of an op.

    Raises:
        AttributeError: there is no such op, or the backend has no function for it.
    """
    found = function(backend, name) if name in _definitions else None
    if found is None:
        raise AttributeError(f"{backend}_ops has no {name}")
    return found


def _unavailable(backend: str, op: str, device: str) -> str:
    """Why this backend does not serve the op; "" where it does."""
    if backend == "reference":
        return ""
    reason = _backends[backend].unavailable_reason(device, op)
    if reason:
        return reason
    missing = [one for one in family(op) if function(backend, one) is None]
    return f"{backend}_ops has no {', '.join(missing)}" if missing else ""


def _choose(op: str, device: str, choice: str) -> tuple[OpBackend, Implementation]:
    family(op)  # refuses an unknown op
    why: list[str] = []
    for backend in _TRIED[choice]:
        if backend == "triton":
            if choice == "auto" and device == "cpu":
                continue  # interpreted, for tests: nothing to choose, or to log, unasked
            unusable = _backends[backend].unavailable_reason(device, op)
            if unusable and choice == "triton":
                raise RuntimeError(f"{op} on {device}: {unusable}; or unset {ENVIRONMENT_VARIABLE}")
        reason = _unavailable(backend, op, device)
        found = None if reason else function(backend, op)
        if found is not None:
            return _served(op, device, backend, found, why)
        why.append(reason)
    composed = function("torch", op)
    if composed is not None and _made_of_ops(composed):
        return _served(op, device, "torch", composed, why)
    raise RuntimeError(
        f"{op} on {device}: no implementation ({'; '.join(why)}); unset {ENVIRONMENT_VARIABLE}"
    )


def _served(
    op: str, device: str, backend: str, found: Implementation, why: list[str]
) -> tuple[OpBackend, Implementation]:
    if why and _made_of_ops(found):
        why = [*why, "it is made of other ops, each by its own backend"]
    return OpBackend(op, device, backend, "; ".join(why)), found


def _made_of_ops(found: Implementation) -> bool:
    return getattr(found, "made_of_ops", False)


def implementation(op: str, device_type: str) -> Implementation:
    """The function that computes `op` on this kind of device; a fallback is logged once, with its reason.

    Args:
        op: one of `ops()`.
        device_type: "cpu", "cuda", ...

    Raises:
        ValueError: unknown op, or a DPKERNELS_BACKEND that is none of its values.
        RuntimeError: the backend that DPKERNELS_BACKEND forces cannot serve this op here.
    """
    key = (op, device_type, forced())
    if key not in _chosen:
        _chosen[key] = _choose(*key)
        choice, found = _chosen[key]
        if choice.reason and not _made_of_ops(found):
            logger.warning("%s on %s uses %s: %s", choice.op, choice.device, choice.backend, choice.reason)
    return _chosen[key][1]


def explain(device_types: tuple[str, ...] = ("cpu", "cuda")) -> list[OpBackend]:
    """What every op would use on each kind of device, and why; "none" for an op that nothing serves."""
    rows = []
    for device in device_types:
        for op in ops():
            try:
                rows.append(_choose(op, device, forced())[0])
            except RuntimeError as error:
                rows.append(OpBackend(op, device, "none", str(error)))
    return rows
