"""Copies of a private model, by copy.deepcopy, pickle or torch.save: ordinary models, without a tape or a hook of ours.

`swap` and `attach` change a module's class in place, and a class that is made at run time has no name under which
pickle would find it. A module that holds a tape, or is of such a class, is copied as the class that it had before: what
torch.save writes of a private model loads where this package is not installed. `swap` makes ghost layers of it again.
"""

from __future__ import annotations

import copyreg
import pickle
import sys
from collections import OrderedDict
from operator import attrgetter
from typing import Any

from torch import nn

# ghost class -> the class that it was made of
ORIGINALS: dict[type[nn.Module], type[nn.Module]] = {}

HANDLES = "_ghost_root_hooks"
"""Attribute of an attached model that holds the handles of our hooks on it."""

_OURS = ("ghost_tape", "ghost_name", "__reduce_ex__")
_OURS_BEGIN = "_ghost_"
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before `swap` and `attach`; its own where they did not change it."""
    return ORIGINALS.get(type(module), type(module))


def ordinary(module: nn.Module, reduced: Any) -> Any:
    """What `module.__reduce_ex__` said, `reduced`, for the ordinary module: its state without what `attach` put there,
    and its class before `swap` where it holds a tape or its class has no name to be found by."""
    if not isinstance(reduced, tuple) or len(reduced) < 3 or not isinstance(reduced[2], dict):
        return reduced
    make, arguments, state, *rest = reduced
    ghost = type(module)
    if state.get("ghost_tape") is not None or not _found_by_name(ghost):
        original = ORIGINALS.get(ghost, ghost)
        if original is not ghost and make is copyreg.__newobj__:  # type: ignore[attr-defined]
            # pickle lets that make nothing but the object's own class
            make, arguments = copyreg._reconstructor, (ghost, object, None)  # type: ignore[attr-defined]
        arguments = tuple(original if argument is ghost else argument for argument in arguments)
    kept = {name: value for name, value in state.items() if not _is_ours(name)}
    ids = {handle.id for handle in state.get(HANDLES, ())}
    for name in _HOOKS:
        if ids and name in kept:
            kept[name] = OrderedDict((key, hook) for key, hook in kept[name].items() if key not in ids)
    return make, arguments, kept, *rest


def reduce_root(model: nn.Module, protocol: Any = pickle.DEFAULT_PROTOCOL) -> Any:
    """`__reduce_ex__` of an attached model, whatever its class: instances are asked before classes."""
    return ordinary(model, type(model).__reduce_ex__(model, protocol))


def _is_ours(name: str) -> bool:
    return name in _OURS or name.startswith(_OURS_BEGIN)


def _found_by_name(kind: type[nn.Module]) -> bool:
    """Whether pickle finds this very class under its name."""
    try:
        return attrgetter(kind.__qualname__)(sys.modules[kind.__module__]) is kind
    except (KeyError, AttributeError):
        return False
