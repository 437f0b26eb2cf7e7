"""swap(model): ghost layers in place of torch's, without touching a parameter.

`swap` changes the class of a module (`module.__class__ = GhostLinear`), so parameters, buffers, hooks, names and
references in optimizers survive. It swaps modules of exactly a torch class, subclasses that override nothing that the
torch class computes with (Opacus's RNNLinear), and subclasses that only change the input or output
(`dpkernels.nn.thin`). Any other subclass may compute something else.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

from torch import nn
from torch.nn.utils import parametrize

from dpkernels.nn.copying import ORIGINALS as _ORIGINALS
from dpkernels.nn.recording.module import GhostModule
from dpkernels.nn.thin import is_thin

# exact torch class -> ghost class
_SWAPS: dict[type[nn.Module], type[nn.Module]] = {}
# exact class of a parent -> {attribute: ghost class of that child}
_CHILDREN: dict[type[nn.Module], dict[str, type[nn.Module]]] = {}
# subclass of a torch class -> the ghost class created for it
_INHERITED: dict[type[nn.Module], type[nn.Module]] = {}
# functions that return the reason why no parameter below a module can be trained privately, or None
_REFUSALS: list[Callable[[nn.Module], str | None]] = []

# Libraries with rules for their layers. The import direction is interop -> nn, so this is the only place where nn
# refers to interop: it registers the rules of the libraries that are loaded already.
_LIBRARIES = ("peft", "transformers")


def register_swap(torch_class: type[nn.Module], ghost_class: type[nn.Module]) -> None:
    """Register `ghost_class` as the class that `swap` gives to modules of exactly `torch_class`.

    `ghost_class` must be a subclass of `torch_class` and of GhostModule (else TypeError), and add no state.
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
    """As register_swap, but only for the child that modules of exactly `parent_class` hold as `attribute`.

    For a layer that its parent uses in a special way, so that its type does not determine what is computed with it.
    """
    _CHILDREN.setdefault(parent_class, {})[attribute] = ghost_class
    _ORIGINALS[ghost_class] = torch_class


def register_refusal(refusal: Callable[[nn.Module], str | None]) -> None:
    """Register `refusal(module)`: if it returns a reason, `uncovered` lists all trained parameters below the module."""
    if refusal not in _REFUSALS:
        _REFUSALS.append(refusal)


def subtree_refusal(module: nn.Module) -> str | None:
    """The first registered reason why no parameter below `module` can be trained privately, or None."""
    return next((reason for refusal in _REFUSALS if (reason := refusal(module)) is not None), None)


def ghost_subclass(own_class: type[nn.Module], ghost_class: type[nn.Module]) -> type[nn.Module]:
    """A ghost class for a subclass of a torch layer whose forward calls `super().forward` and reads no
    parameter itself.

    `register_swap(MyConv, ghost_subclass(MyConv, GhostConv1d))`. If the forward does read a parameter itself,
    autograd fills that parameter's .grad, and the engine raises an error that names it.
    """
    return type(f"Ghost{own_class.__name__}", (own_class, ghost_class), {"__module__": own_class.__module__})


def load_library_rules() -> None:
    """Register the rules for the layers of libraries that are loaded already."""
    for library in _LIBRARIES:
        if library in sys.modules:
            importlib.import_module(f"dpkernels.interop.{library}").register()


def swap(model: nn.Module) -> nn.Module:
    """Change every module that has a ghost class to that class, in place; returns `model`.

    These are nn.Linear, convolutions and transposed ones, Embedding, EmbeddingBag, LayerNorm, RMSNorm, GroupNorm,
    instance norms, LSTM, GRU, RNN and their cells, MultiheadAttention, torch's Transformer layers, subclasses of these
    that inherit their whole computation or only change input or output, PEFT's LoRA layers, and the transformers layers
    named in `dpkernels.interop`. A second swap changes nothing. Other modules keep their class, and `uncovered` lists
    their trained parameters. Raises TypeError if `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap: model must be a torch.nn.Module, got {type(model).__name__}")
    load_library_rules()
    for module in list(model.modules()):
        for attribute, ghost_class in _CHILDREN.get(type(module), {}).items():
            child = getattr(module, attribute, None)
            if child is not None and _ORIGINALS.get(type(child), type(child)) is _ORIGINALS[ghost_class]:
                child.__class__ = ghost_class
        ghost = _ghost_class(module)
        if ghost is not None:
            module.__class__ = ghost
    return model


def has_ghost_class(module: nn.Module) -> bool:
    """Whether `swap` would change the class of this module because of its type."""
    return _ghost_class(module) is not None


def _ghost_class(module: nn.Module) -> type[nn.Module] | None:
    # weight_norm by hooks keeps the type, but removes the weight from the parameters.
    if "weight" in module.__dict__ or isinstance(module, GhostModule) or parametrize.is_parametrized(module):
        return None
    original = type(module)
    if original in _SWAPS:
        return _SWAPS[original]
    base = next((c for c in original.__mro__ if c in _SWAPS), None)
    if base is None or not (_overrides_nothing(original, base, module) or is_thin(original, base)):
        return None
    return _inherited_ghost_class(original, _SWAPS[base])


# Attributes that a subclass may define without a change to its computation: construction, initialisation, display.
_HARMLESS = {"__init__", "extra_repr", "__repr__", "reset_parameters", "__parameters__"}
_HARMLESS |= {"__doc__", "__module__", "__qualname__", "__annotations__", "__dict__", "__weakref__"}
_HARMLESS |= {"__firstlineno__", "__static_attributes__"}


def _overrides_nothing(subclass: type[nn.Module], base: type[nn.Module], module: nn.Module) -> bool:
    before = subclass.__mro__[: subclass.__mro__.index(base)]
    defined = {name for c in before for name in vars(c)} - _HARMLESS
    used = {"__slots__", *dir(base), *vars(module), *module._parameters, *module._buffers}
    for parent in base.__mro__:  # attributes that torch's classes declare, and set in their constructors
        used.update(getattr(parent, "__annotations__", ()), getattr(parent, "__constants__", ()))
    return defined.isdisjoint(used)


def _inherited_ghost_class(subclass: type[nn.Module], ghost_class: type[nn.Module]) -> type[nn.Module]:
    if subclass not in _INHERITED:
        ghost = ghost_subclass(subclass, ghost_class)
        _INHERITED[subclass], _ORIGINALS[ghost] = ghost, subclass
    return _INHERITED[subclass]


def unswap(model: nn.Module) -> nn.Module:
    """The inverse of `swap`; in place; returns `model`."""
    for module in model.modules():
        if type(module) in _ORIGINALS:
            module.__class__ = _ORIGINALS[type(module)]
    return model
