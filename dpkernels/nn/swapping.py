"""swap(model): ghost layers in place of torch's, without touching a parameter.

Modules are re-classed (`module.__class__ = GhostLinear`), so parameters, buffers, hooks, names and what
optimizers refer to all survive. Exact types are swapped, and subclasses that leave to the torch class all that its
parameters do (`thin_base`): any other subclass may compute something else.
"""

from __future__ import annotations

import dis
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType, FunctionType

from torch import nn

from dpkernels.nn.module import GhostModule

# exact torch class -> ghost class
_SWAPS: dict[type[nn.Module], type[nn.Module]] = {}
# exact class of a parent -> {attribute: ghost class of that child}
_CHILDREN: dict[type[nn.Module], dict[str, type[nn.Module]]] = {}
# ghost class -> the class it came from
_ORIGINALS: dict[type[nn.Module], type[nn.Module]] = {}
# reasons why nothing below a module can be trained privately
_REFUSALS: list[Callable[[nn.Module], str | None]] = []

# Libraries whose layers have rules of their own. The import direction is interop -> nn, so this is the one
# place where nn knows that interop exists: it has the rules registered of those libraries that are already
# loaded.
_LIBRARIES = ("peft", "transformers")


def register_swap(torch_class: type[nn.Module], ghost_class: type[nn.Module]) -> None:
    """Have `swap` turn modules of exactly `torch_class` into `ghost_class`.

    `ghost_class` is a subclass of `torch_class` and of GhostModule, with no state of its own. Raises
    TypeError if not.
    """
    if not (issubclass(ghost_class, torch_class) and issubclass(ghost_class, GhostModule)):
        raise TypeError(
            f"register_swap: {ghost_class.__name__} must be a subclass of {torch_class.__name__} and of "
            "GhostModule"
        )
    _SWAPS[torch_class] = ghost_class
    _ORIGINALS[ghost_class] = torch_class


def register_child_swap(
    parent_class: type[nn.Module], attribute: str, torch_class: type[nn.Module], ghost_class: type[nn.Module]
) -> None:
    """As register_swap, for the one child that modules of exactly `parent_class` hold as `attribute`.

    For a layer that its parent uses in a way of its own, so that its type does not say what it computes.
    """
    _CHILDREN.setdefault(parent_class, {})[attribute] = ghost_class
    _ORIGINALS[ghost_class] = torch_class


def register_refusal(refusal: Callable[[nn.Module], str | None]) -> None:
    """Have `coverage` name all that is trained below a module for which `refusal(module)` gives a reason."""
    if refusal not in _REFUSALS:
        _REFUSALS.append(refusal)


def subtree_refusal(module: nn.Module) -> str | None:
    """The first registered reason why nothing below `module` can be trained privately, or None."""
    return next((reason for refusal in _REFUSALS if (reason := refusal(module)) is not None), None)


def ghost_subclass(own_class: type[nn.Module], ghost_class: type[nn.Module]) -> type[nn.Module]:
    """A ghost twin for a subclass of a torch layer whose forward calls `super().forward` and reads no
    parameter itself.

    `register_swap(MyConv, ghost_subclass(MyConv, GhostConv1d))`. If it does read a parameter itself,
    autograd fills that parameter's .grad and the engine raises, naming it.
    """
    return type(f"Ghost{own_class.__name__}", (own_class, ghost_class), {"__module__": own_class.__module__})


def load_library_rules() -> None:
    """Have the rules registered for those libraries that are already loaded."""
    for library in _LIBRARIES:
        if library in sys.modules:
            importlib.import_module(f"dpkernels.interop.{library}").register()


def swap(model: nn.Module) -> nn.Module:
    """Re-class every module that has a ghost twin; in place; returns `model`.

    nn.Linear, Conv1d, Conv2d, Embedding, LayerNorm, RMSNorm, their thin subclasses (`thin_base`), PEFT's LoRA
    layers, and the transformers layers named in `dpkernels.interop`. Swapping twice changes nothing. What has
    no twin stays as it is: `coverage` names what of it is trained. Raises TypeError for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap: model must be a torch.nn.Module, got {type(model).__name__}")
    load_library_rules()
    for module in list(model.modules()):
        for attribute, ghost_class in _CHILDREN.get(type(module), {}).items():
            child = getattr(module, attribute, None)
            if child is not None and _ORIGINALS.get(type(child), type(child)) is _ORIGINALS[ghost_class]:
                child.__class__ = ghost_class
        if has_twin(module):
            module.__class__ = _SWAPS[type(module)]
    return model


def has_twin(module: nn.Module) -> bool:
    """Whether `swap` would re-class this module for its own type's sake."""
    # weight_norm by hooks leaves the type as it is but takes the weight out of the parameters.
    return "weight" not in module.__dict__ and _twin(type(module)) is not None


def _twin(own_class: type[nn.Module]) -> type[nn.Module] | None:
    """The ghost class of `own_class`: registered, or made where it is a thin subclass of a torch layer."""
    if own_class not in _SWAPS and (base := thin_base(own_class)) is not None:
        register_swap(own_class, ghost_subclass(own_class, _SWAPS[base]))
    return _SWAPS.get(own_class)


# What a class may add to a torch layer: nothing here takes part in a forward that has begun.
_HARMLESS = {"__init__", "reset_parameters", "extra_repr", "forward", "__module__", "__doc__", "__qualname__"}
_HARMLESS |= {"__annotations__", "__classcell__", "__parameters__", "__orig_bases__", "__constants__"}
_FACTS = ("device", "dtype", "shape")


def thin_base(own_class: type[nn.Module]) -> type[nn.Module] | None:
    """The torch layer that `own_class` is a thin subclass of, or None.

    Thin: each class between the two defines no more than how it is built and a `forward` that calls
    `super().forward` and reads no parameter but for its device, dtype or shape: it changes the input or the
    output. Its parameters then do what the torch layer's do. Should the reading of the forward's code miss a
    use of a parameter, autograd fills that parameter's .grad and the engine raises.
    """
    for base in own_class.__mro__[1:]:
        if base in _SWAPS and base.__module__.startswith("torch.nn."):
            between = own_class.__mro__[: own_class.__mro__.index(base)]
            return base if all(_is_thin(part) for part in between) else None
    return None


def _is_thin(part: type) -> bool:
    """Whether one class adds to the class above it only what `thin_base` says."""
    helpers = {name: value for name, value in vars(part).items() if name not in _HARMLESS}
    if any(callable(value) or hasattr(value, "__get__") for value in helpers.values()):
        return False
    forward = vars(part).get("forward")
    if forward is None:
        return True
    return isinstance(forward, FunctionType) and not hasattr(forward, "__wrapped__") and _only_defers(forward)


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
    """Whether every `.weight` and `.bias` in `code` is followed by `.device`, `.dtype` or `.shape`."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "EXTENDED_ARG")]
    if any(
        step.argval in ("getattr", "parameters", "named_parameters", "_parameters", "__dict__")
        for step in steps
    ):
        return False
    return all(
        after.argval in _FACTS
        for step, after in itertools.pairwise(steps)
        if step.argval in ("weight", "bias") and "CONST" not in step.opname
    )


def unswap(model: nn.Module) -> nn.Module:
    """The inverse of `swap`; in place; returns `model`."""
    for module in model.modules():
        if type(module) in _ORIGINALS:
            module.__class__ = _ORIGINALS[type(module)]
    return model
