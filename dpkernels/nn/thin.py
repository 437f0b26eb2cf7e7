"""Thin subclasses of torch's layers: their forward changes the torch layer's input or output, and nothing else.

transformers has some seventy: scaled word embeddings, learned positions, layer norms over channels. The check reads the
attributes of a class and the bytecode of its forward.
"""

from __future__ import annotations

import dis
import itertools
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType

from torch import nn

# Attributes that a class may add to a torch layer: a running forward uses none of them.
_HARMLESS = {"__init__", "reset_parameters", "extra_repr", "forward", "__module__", "__doc__", "__qualname__"}
_HARMLESS |= {"__annotations__", "__classcell__", "__parameters__", "__orig_bases__", "__constants__"}
_FACTS = ("device", "dtype", "shape")
_ROUNDABOUT = {"getattr", "vars", "parameters", "named_parameters", "_parameters", "__dict__", "state_dict"}
_ROUNDABOUT |= {"get_parameter", "_flat_weights", "all_weights"}


def is_thin(subclass: type[nn.Module], base: type[nn.Module]) -> bool:
    """Whether `subclass` is a thin subclass of `base`, a layer of torch.nn.

    In a thin subclass each class between the two defines only its construction and a `forward`. That calls
    `super().forward` to change the input or the output, and reads nothing of a parameter but its device, dtype or
    shape. The parameters are then used as in the torch layer. If this check misses another use of a parameter,
    autograd fills the parameter's .grad, and the engine raises an error.
    """
    between = subclass.__mro__[: subclass.__mro__.index(base)]
    return base.__module__.startswith("torch.nn.") and all(_is_thin(part) for part in between)


def _is_thin(part: type) -> bool:
    """Whether one class adds to its parent class only what `is_thin` allows."""
    helpers = {name: value for name, value in vars(part).items() if name not in _HARMLESS}
    if any(callable(value) or hasattr(value, "__get__") for value in helpers.values()):
        return False
    forward = vars(part).get("forward")
    if forward is None:
        return True
    return isinstance(forward, FunctionType) and _only_defers(forward)


@cache
def _only_defers(forward: FunctionType) -> bool:
    code = forward.__code__
    names = {name for part in _nested(code) for name in part.co_names}
    reaches_up = "__class__" in code.co_freevars and {"super", "forward"} <= names
    return reaches_up and all(_reads_only_facts(part) for part in _nested(code))


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _reads_only_facts(code: CodeType) -> bool:
    """Whether `code` reads only the device, dtype or shape of a parameter by name, and no parameter in another way."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "EXTENDED_ARG")]
    names = [
        step.argval if isinstance(step.argval, str) and "CONST" not in step.opname else "" for step in steps
    ]
    if not _ROUNDABOUT.isdisjoint(names):
        return False
    return all(
        after in _FACTS
        for name, after in itertools.pairwise([*names, ""])
        if name.startswith(("weight", "bias"))
    )
