"""swap(model): ghost layers in place of torch's, without touching a parameter.

Modules are re-classed (`module.__class__ = GhostLinear`), so parameters, buffers, hooks, names and what
optimizers refer to all survive. Exact types are swapped, subclasses that replace nothing of what the torch class
computes with (Opacus's RNNLinear), and those that only change its input or output (`dpkernels.nn.thin`): any other
subclass may compute something else.
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
# subclass of a torch class -> the ghost class made for it
_INHERITED: dict[type[nn.Module], type[nn.Module]] = {}
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
    """Have `uncovered` name all that is trained below a module for which `refusal(module)` gives a reason."""
    if refusal not in _REFUSALS:
        _REFUSALS.append(refusal)


def subtree_refusal(module: nn.Module) -> str | None:
    """The first registered reason why nothing below `module` can be trained privately, or None."""
    return next((reason for refusal in _REFUSALS if (reason := refusal(module)) is not None), None)


def ghost_subclass(own_class: type[nn.Module], ghost_class: type[nn.Module]) -> type[nn.Module]:
    """A ghost ghost for a subclass of a torch layer whose forward calls `super().forward` and reads no
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
    """Re-class every module that has a ghost ghost; in place; returns `model`.

    nn.Linear, convolutions and transposed ones, Embedding, EmbeddingBag, LayerNorm, RMSNorm, GroupNorm, instance norms,
    LSTM, GRU, RNN and their cells, MultiheadAttention, torch's Transformer layers, subclasses of these that inherit all
    that they compute with or only change input or output, PEFT's LoRA layers, and the transformers layers named in
    `dpkernels.interop`. Swapping twice changes nothing. What has no ghost stays as it is: `uncovered` names what of it
    is trained. Raises TypeError for what is no module.
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
    """Whether `swap` would re-class this module for its own type's sake."""
    return _ghost_class(module) is not None


def _ghost_class(module: nn.Module) -> type[nn.Module] | None:
    # weight_norm by hooks leaves the type as it is but takes the weight out of the parameters.
    if "weight" in module.__dict__ or isinstance(module, GhostModule) or parametrize.is_parametrized(module):
        return None
    own_class = type(module)
    if own_class in _SWAPS:
        return _SWAPS[own_class]
    base = next((c for c in own_class.__mro__ if c in _SWAPS), None)
    if base is None or not (_replaces_nothing(own_class, base, module) or is_thin(own_class, base)):
        return None
    return _inherited_ghost_class(own_class, _SWAPS[base])


# What a subclass may define without computing anything else: how it is made, drawn and shown.
_HARMLESS = {"__init__", "extra_repr", "__repr__", "reset_parameters", "__parameters__"}
_HARMLESS |= {"__doc__", "__module__", "__qualname__", "__annotations__", "__dict__", "__weakref__"}
_HARMLESS |= {"__firstlineno__", "__static_attributes__"}


def _replaces_nothing(own_class: type[nn.Module], base: type[nn.Module], module: nn.Module) -> bool:
    before = own_class.__mro__[: own_class.__mro__.index(base)]
    own = {name for c in before for name in vars(c)} - _HARMLESS
    used = {"__slots__", *dir(base), *vars(module), *module._parameters, *module._buffers}
    for parent in base.__mro__:  # what torch's classes declare, and set when they are made
        used.update(getattr(parent, "__annotations__", ()), getattr(parent, "__constants__", ()))
    return own.isdisjoint(used)


def _inherited_ghost_class(own_class: type[nn.Module], ghost_class: type[nn.Module]) -> type[nn.Module]:
    if own_class not in _INHERITED:
        ghost = ghost_subclass(own_class, ghost_class)
        _INHERITED[own_class], _ORIGINALS[ghost] = ghost, own_class
    return _INHERITED[own_class]


def unswap(model: nn.Module) -> nn.Module:
    """The inverse of `swap`; in place; returns `model`."""
    for module in model.modules():
        if type(module) in _ORIGINALS:
            module.__class__ = _ORIGINALS[type(module)]
    return model
