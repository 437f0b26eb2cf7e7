"""The types of a configuration's values, and the error messages about wrong ones.

pydantic reads and checks the values; this module turns its errors into messages with the key, the value and the fix.
"""

from __future__ import annotations

import difflib
import functools
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from dpkernels.errors import UserError

_SET_NAME = re.compile(r"[\w-]+")  # it is a part of file names
PLACEHOLDER = "..."  # stands in a printed configuration for a value that only the user knows
# Options of every section. The text under a field is its help, which `--print-config` shows.
CHECKS = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class ConfigError(UserError, ValueError):
    """A configuration cannot be used: the message names the key, the value and the fix."""


@contextmanager
def as_config_error() -> Iterator[None]:
    """Within it, a ValueError of dpkernels is raised as a ConfigError: the argument came from the configuration."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise ConfigError(str(error)) from error


def _number(value: Any) -> Any:
    """Convert text to a number, since YAML reads "1e-3" as text, and reject truth values."""
    if isinstance(value, bool):
        raise ValueError("a truth value")
    return float(value) if isinstance(value, str) else value


def _text(value: Any) -> Any:
    """Convert an integer to text, since YAML reads the speaker's name 19 as a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _sources(value: Any) -> Any:
    """A source of data, or a list of them; a list of one is that one."""
    items = [_text(item) for item in value] if isinstance(value, list) and value else [_text(value)]
    if not all(isinstance(item, str) and item for item in items):
        raise ConfigError(
            f"{value!r} as data: expected a folder, a file or an id, or a list of them, e.g. [a, b]"
        )
    return items[0] if len(items) == 1 else items


def _splits(value: Any) -> Any:
    """A split, or a list with one split (or null) for each source."""
    items = [_text(item) for item in value] if isinstance(value, list) else [_text(value)]
    if not all(item is None or isinstance(item, str) for item in items):
        raise ConfigError(
            f"{value!r} as split: expected text, or a list with one for each source, e.g. [a, null]"
        )
    return items if isinstance(value, list) else items[0]


def _by_name(each: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A validator of one value, or of a mapping with one for each test set; `each` validates a value."""

    def validate(value: Any) -> Any:
        try:
            if not isinstance(value, Mapping):
                return each(value)
            if value and all(isinstance(name, str) and _SET_NAME.fullmatch(name) for name in value):
                return {name: each(item) for name, item in value.items()}
        except ConfigError as error:
            raise ConfigError(f"{error}; {_BY_NAME}") from error
        raise ConfigError(f"{value!r} as test data: expected text, a list, or names of test sets; {_BY_NAME}")

    return validate


_BY_NAME = (
    "of several test sets give each a name (letters, digits, - and _), e.g. {clean: test_clean.jsonl, other: "
    "[test_a.jsonl, test_b.jsonl]}"
)
Text = Annotated[str, BeforeValidator(_text)]
Sources = Annotated[str | list[str], BeforeValidator(_sources)]
Splits = Annotated[str | list[str | None], BeforeValidator(_splits)]
SourcesByName = Annotated[str | list[str] | dict[str, str | list[str]], BeforeValidator(_by_name(_sources))]
SplitsByName = Annotated[
    str | list[str | None] | dict[str, str | list[str | None] | None], BeforeValidator(_by_name(_splits))
]
_Int = Annotated[int, BeforeValidator(_number)]
_Float = Annotated[float, BeforeValidator(_number)]
Count = Annotated[_Int, Field(ge=1)]
Natural = Annotated[_Int, Field(ge=0)]
Positive = Annotated[_Float, Field(gt=0)]
NonNegative = Annotated[_Float, Field(ge=0)]
Share = Annotated[_Float, Field(ge=0, lt=1)]
Delta = Annotated[_Float, Field(gt=0, lt=0.5)]  # above, no number of recordings gives it a meaning

_Section = TypeVar("_Section", bound=type)
# pydantic's name of an error -> the part of the message after the key and the value
_MESSAGES = {
    "list_type": "expected a list, e.g. [a, b]",
    "bool_type": "expected true or false",
    "string_type": "expected text; quote it",
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be below {lt:g}",
}
_UNKNOWN = "unexpected_keyword_argument"


def section_name(section: type) -> str:
    """The name of a class's YAML section: `privacy` for PrivacyConfig, "" for Config itself."""
    return section.__name__.removesuffix("Config").lower()


def fields_of(section: type) -> dict[str, FieldInfo]:
    """The fields of a section by name, with type, default and help (`description`)."""
    return typing.cast(Any, section).__pydantic_fields__


def help_of(field: FieldInfo) -> str:
    """The help of a field, on one line."""
    return " ".join((field.description or "").split())


def choices(hint: Any) -> list[str]:
    """The values that a Literal, or an optional Literal, allows; [] for any other type."""
    if typing.get_origin(hint) is Literal:
        return list(map(str, typing.get_args(hint)))
    return [choice for part in typing.get_args(hint) for choice in choices(part)]


def explained(section: _Section) -> _Section:
    """Make the constructor of a pydantic dataclass raise ConfigError, with this package's messages."""
    build = section.__init__  # type: ignore[misc]

    @functools.wraps(build)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            build(self, *args, **kwargs)
        except ValidationError as error:
            raise ConfigError(_message(section, error)) from None

    section.__init__ = init  # type: ignore[misc]
    return section


def unknown_key(key: str, name: str, known: Sequence[str], prefix: str = "") -> str:
    """The error message about an unknown key, with the nearest known name."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    fix = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
    return f"{key}: unknown key; {fix}"


def _message(section: type, error: ValidationError) -> str:
    """The message about the first error: unknown keys come first, then missing ones."""
    order = {_UNKNOWN: 0, "missing": 1}
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda entry: (order.get(entry["type"], 2), len(entry["loc"])))
    kind, place, value, context = first["type"], first["loc"], first["input"], first.get("ctx", {})
    names = [name for name in place if isinstance(name, str)]
    for name in names[:-1]:
        section = typing.cast(type, fields_of(section)[name].annotation)
    prefix = f"{section_name(section)}." if section_name(section) else ""
    if kind == _UNKNOWN:
        return unknown_key(f"{prefix}{names[-1]}", names[-1], list(fields_of(section)), prefix)
    field = fields_of(section)[names[-1]]
    key = prefix + names[-1] + "".join(f"[{name}]" for name in place if isinstance(name, int))
    if kind == "missing":
        return f"{key} is missing ({help_of(field)}): set it{'' if prefix else f', or give --{key}'}"
    if isinstance(context.get("error"), ConfigError):
        return str(context["error"])
    if kind == "dataclass_type":
        return f"{key}: expected a section, got {value!r}; write `{key}:` and indented keys under it"
    return f"{key}={value!r}: {_expectation(kind, value, context, field.annotation)}"


def _expectation(kind: str, value: Any, context: dict[str, Any], hint: Any) -> str:
    if kind in _MESSAGES:
        return _MESSAGES[kind].format(**context)
    if kind == "literal_error":
        near = difflib.get_close_matches(str(value), choices(hint), n=1)
        guess = f"; did you mean {near[0]}?" if near else ""
        return f"expected one of {', '.join(choices(hint))}{guess}"
    return f"expected {'a whole number' if int in types_within(hint) else 'a number'}"


def types_within(hint: Any) -> Iterator[Any]:
    """A type and, recursively, its arguments."""
    yield hint
    for part in typing.get_args(hint):
        yield from types_within(part)
