"""Copies of a private model (copy.deepcopy, pickle, torch.save) are ordinary models, without our tape and hooks.

`swap` and `attach` change a module's class in place, and pickle cannot find a class that is created at run time by its
name. A module that holds a tape, or has such a class, is copied as the class that it had before. So torch.save of a
private model writes a file that loads without this package, and `swap` turns the loaded model into ghost layers again.
"""

from __future__ import annotations

import copyreg
import pickle
import sys
from collections import OrderedDict
from operator import attrgetter
from typing import Any

from torch import nn

# ghost class -> the original class
ORIGINALS: dict[type[nn.Module], type[nn.Module]] = {}

HANDLES = "_ghost_root_hooks"
"""Attribute of an attached model that holds the handles of our hooks on it."""

_OURS = ("ghost_tape", "ghost_name", "ghost_number", "__reduce_ex__")
_OURS_BEGIN = "_ghost_"
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before `swap` and `attach`; its current class if they did not change it."""
    return ORIGINALS.get(type(module), type(module))


def ordinary(module: nn.Module, reduced: Any) -> Any:
    """`reduced`, the result of `module.__reduce_ex__`, changed to describe the ordinary module: its state without the
    attributes of `attach`, and its class before `swap` if it holds a tape or pickle cannot find its class by name."""
    if not isinstance(reduced, tuple) or len(reduced) < 3 or not isinstance(reduced[2], dict):
        return reduced
    make, arguments, state, *rest = reduced
    ghost = type(module)
    if state.get("ghost_tape") is not None or not _found_by_name(ghost):
        original = ORIGINALS.get(ghost, ghost)
        if original is not ghost and make is copyreg.__newobj__:  # type: ignore[attr-defined]
            # pickle accepts __newobj__ only with the object's own class
            make, arguments = copyreg._reconstructor, (ghost, object, None)  # type: ignore[attr-defined]
        arguments = tuple(original if argument is ghost else argument for argument in arguments)
    kept = {name: value for name, value in state.items() if not _is_ours(name)}
    ids = {handle.id for handle in state.get(HANDLES, ())}
    for name in _HOOKS:
        if ids and name in kept:
            kept[name] = OrderedDict((key, hook) for key, hook in kept[name].items() if key not in ids)
    return make, arguments, kept, *rest


def reduce_root(model: nn.Module, protocol: Any = pickle.DEFAULT_PROTOCOL) -> Any:
    """`__reduce_ex__` of an attached model of any class: the instance's attribute takes precedence over the class's."""
    return ordinary(model, type(model).__reduce_ex__(model, protocol))


def _is_ours(name: str) -> bool:
    return name in _OURS or name.startswith(_OURS_BEGIN)


def _found_by_name(kind: type[nn.Module]) -> bool:
    """Whether pickle finds this class, and no other, under its name."""
    try:
        return attrgetter(kind.__qualname__)(sys.modules[kind.__module__]) is kind
    except (KeyError, AttributeError):
        return False
