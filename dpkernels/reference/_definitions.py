"""The table of the ops' definitions."""

from collections.abc import Callable
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])

DEFINITIONS: dict[str, Callable[..., Any]] = {}
"""Every op's definition, by the op's name. This table also defines which ops exist."""


def definition(function: _F) -> _F:
    """Register a function as the definition of the op of its name. Backends implement it in a file of the same name."""
    DEFINITIONS[function.__name__] = function
    return function
