"""Single values of a configuration: their documentation and limits, and what is said about a wrong one."""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import Field
from typing import Any, Literal

PLACEHOLDER = "..."  # what a printed configuration holds where only its user knows the value


class ConfigError(ValueError):
    """A configuration that cannot be used: the message names the key, what was given, and the fix."""


def about(
    help: str, *, above: float | None = None, least: float | None = None, below: float | None = None
) -> dict[str, Any]:
    """A field's metadata: its documentation and limits.

    Args:
        help: one line, shown by `--print-config`.
        above: the value must be > above.
        least: the value must be >= least.
        below: the value must be < below.
    """
    return {"help": help, "above": above, "least": least, "below": below}


def unknown_key(key: str, name: str, known: Sequence[str], prefix: str = "") -> str:
    """What is said about a key that there is not, with the nearest name."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
    return f"{key}: unknown key; {hint}"


def coerce(key: str, value: Any, hint: Any) -> Any:
    """`value` as `hint` wants it: YAML gives 1 for a float, "1e-3" as text, 19 for a speaker's name."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        (inner,) = [argument for argument in arguments if argument is not type(None)]
        return coerce(key, value, inner)
    if origin is Literal:
        if value in arguments:
            return value
        near = difflib.get_close_matches(str(value), [str(argument) for argument in arguments], n=1)
        guess = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{key}={value!r}: expected one of {', '.join(map(str, arguments))}{guess}")
    if origin is list:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigError(f"{key}={value!r}: expected a list, e.g. [a, b]")
        return [coerce(f"{key}[{index}]", entry, arguments[0]) for index, entry in enumerate(value)]
    if hint is bool:
        if isinstance(value, bool):
            return value
        raise ConfigError(f"{key}={value!r}: expected true or false")
    if hint is str:
        if isinstance(value, str):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        raise ConfigError(f"{key}={value!r}: expected text; quote it")
    return _number(key, value, hint)


def _number(key: str, value: Any, hint: type) -> int | float:
    expected = "a whole number" if hint is int else "a number"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ConfigError(f"{key}={value!r}: expected {expected}")
    try:
        number = float(value)
    except ValueError:
        raise ConfigError(f"{key}={value!r}: expected {expected}") from None
    if not math.isfinite(number) or (hint is int and number != int(number)):
        raise ConfigError(f"{key}={value!r}: expected {expected}")
    return int(number) if hint is int else number


def check_limits(key: str, value: Any, item: Field[Any]) -> None:
    """Hold a value against the limits of its field.

    Raises:
        ConfigError: it is outside.
    """
    if value is None:
        return
    above, least, below = (item.metadata.get(name) for name in ("above", "least", "below"))
    if above is not None and not value > above:
        raise ConfigError(f"{key}={value!r}: must be above {above:g}")
    if least is not None and not value >= least:
        raise ConfigError(f"{key}={value!r}: must be at least {least:g}")
    if below is not None and not value < below:
        raise ConfigError(f"{key}={value!r}: must be below {below:g}")
