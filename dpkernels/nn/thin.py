"""Thin subclasses of torch's layers: their forward changes the torch layer's input or output, and nothing else.

transformers has some seventy: scaled word embeddings, learned positions, layer norms over channels. A class is read,
not trusted: what it defines, and the code of its forward.
"""

from __future__ import annotations

import dis
import itertools
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType

from torch import nn

# What a class may add to a torch layer: nothing here takes part in a forward that has begun.
_HARMLESS = {"__init__", "reset_parameters", "extra_repr", "forward", "__module__", "__doc__", "__qualname__"}
_HARMLESS |= {"__annotations__", "__classcell__", "__parameters__", "__orig_bases__", "__constants__"}
_FACTS = ("device", "dtype", "shape")
_ROUNDABOUT = {"getattr", "vars", "parameters", "named_parameters", "_parameters", "__dict__", "state_dict"}
_ROUNDABOUT |= {"get_parameter", "_flat_weights", "all_weights"}


def is_thin(own_class: type[nn.Module], base: type[nn.Module]) -> bool:
    """Whether `own_class` is a thin subclass of `base`, a layer of torch.nn.

    Thin: each class between the two defines no more than how it is built and a `forward` that calls
    `super().forward` and reads no parameter but for its device, dtype or shape: it changes the input or the
    output. Its parameters then do what the torch layer's do. Should the reading of the forward's code miss a
    use of a parameter, autograd fills that parameter's .grad and the engine raises.
    """
    between = own_class.__mro__[: own_class.__mro__.index(base)]
    return base.__module__.startswith("torch.nn.") and all(_is_thin(part) for part in between)


def _is_thin(part: type) -> bool:
    """Whether one class adds to the class above it only what `thin_base` says."""
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
    """Whether `code` reads no parameter by name but for its device, dtype or shape, and none by other ways."""
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
