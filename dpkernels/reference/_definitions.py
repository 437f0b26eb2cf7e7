"""The definitions by the names of their ops."""

from collections.abc import Callable
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])

DEFINITIONS: dict[str, Callable[..., Any]] = {}
"""Every op's definition; what is not here is no op."""


def definition(function: _F) -> _F:
    """The function is what the op of its name means. A backend has its own in a file that is called like this one's."""
    DEFINITIONS[function.__name__] = function
    return function
