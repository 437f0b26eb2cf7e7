"""A configuration's YAML: found, read, overridden by flags, compared, and written with every key explained.

The recipes that come with the package are found by name. A file may stand on another: `base: other.yaml` (beside it,
or a recipe's name) gives every key that the file does not.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from asr_finetune.config.schema import SECTIONS, Config
from asr_finetune.config.values import PLACEHOLDER, ConfigError, unknown_key

RECIPES = Path(__file__).with_name("recipes")
_COMMENT_COLUMN = 44


def recipes() -> list[str]:
    """Names of the recipes that come with the package, as `--config` takes them."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find(path: str | Path) -> Path:
    """The file that is meant: a path, or the name of a recipe, with or without .yaml.

    Raises:
        FileNotFoundError: neither.
    """
    path = Path(path)
    if path.is_file():
        return path
    if path.parent == Path():
        recipe = RECIPES / f"{path.name.removesuffix('.yaml')}.yaml"
        if recipe.is_file():
            return recipe
    near = difflib.get_close_matches(path.name.removesuffix(".yaml"), recipes(), n=1)
    meant = f"did you mean {near[0]}?" if near else f"recipes: {', '.join(recipes())}"
    raise FileNotFoundError(
        f"--config {path}: no such file; `asr-finetune train --print-config > {path}` writes one. {meant}"
    )


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The plain values of a YAML file (or recipe) and its bases, unchecked: overrides may come before the check.

    Raises:
        FileNotFoundError: no such file, or no such base.
        ConfigError: not YAML, not a mapping, or a file that stands on itself.
    """
    return _load(find(path), ())


def _load(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in above:
        raise ConfigError(f"--config {path}: its `base` leads back to itself")
    values = _read(path)
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"--config {path}: base={base!r}: expected another configuration's path or name")
    beside = path.parent / base
    under = _load(beside if beside.is_file() else find(base), (*above, path.resolve()))
    both = [key for key in under.keys() & values.keys() if isinstance(under[key], Mapping)]
    return {**under, **values, **{key: _over(under[key], values[key]) for key in both}}


def _over(under: Any, values: Any) -> Any:
    """A section over its base's; what is no section is left for the check to name."""
    return {**under, **values} if isinstance(values, Mapping) else under if values is None else values


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: expected sections like `model:` and `data:`, got {values!r}")
    return values


def typed(overrides: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """What a command line says, by key: the flags that were given, and the settings, which go over them.

    Raises:
        ConfigError: see `parse_setting`.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    return given | dict(map(parse_setting, settings))


def overridden(
    values: Mapping[str, Any], overrides: Mapping[str, Any] | None = None, settings: Sequence[str] = ()
) -> dict[str, Any]:
    """Plain values with `overrides` and then `settings` put in.

    A target ε among them takes the place of a noise multiplier in `values`, under which it would choose nothing;
    unless they give a noise multiplier as well, which then makes the noise, and ε is where training stops.

    Raises:
        ConfigError: an unknown key, or a setting that is none.
    """
    result = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    given = typed(overrides or {}, settings)
    if given.get("privacy.epsilon") is not None:
        given.setdefault("privacy.noise_multiplier", None)
    for key, value in given.items():
        if key == "output":
            result["output"] = value
            continue
        section, _, name = key.partition(".")
        if section not in SECTIONS:
            raise ConfigError(unknown_key(key, section, [*SECTIONS, "output"]))
        known = [item.name for item in fields(SECTIONS[section])]  # type: ignore[arg-type]
        if name not in known:
            raise ConfigError(unknown_key(key, name, known, prefix=f"{section}."))
        result[section] = {**(result.get(section) or {}), name: value}
    return result


def parse_setting(text: str) -> tuple[str, Any]:
    """`"train.steps=60"` as ("train.steps", 60); the value is read as YAML.

    Raises:
        ConfigError: no "=", or a value that is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text!r}: expected section.key=value, e.g. --set train.steps=60")
    try:
        return key.strip(), yaml.safe_load(value) if value.strip() else value
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text!r}: the value is not YAML; quote it. {error}") from error


def changed_keys(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """The keys (dotted) that differ between two plain configurations, with both values."""
    changes: dict[str, tuple[Any, Any]] = {}
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changes |= changed_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            changes[f"{prefix}{key}"] = (before, after)
    return changes


def template(given: Mapping[str, Any] | None = None) -> str:
    """A commented configuration with every key: as given, or at its default, or "..." to be filled in.

    Raises:
        ConfigError: a given value that cannot be.
    """
    given = given or {}
    values: dict[str, Any] = {"output": given.get("output") or "runs/first"}
    for name, section in SECTIONS.items():
        required = {item.name: PLACEHOLDER for item in fields(section) if item.default is MISSING}  # type: ignore[arg-type]
        found = given.get(name) or {}
        values[name] = {**required, **found} if isinstance(found, Mapping) else found
    unknown = {key: value for key, value in given.items() if key not in values}
    return commented_yaml(Config.from_dict({**values, **unknown}).to_dict())


def commented_yaml(values: Mapping[str, Any]) -> str:
    """YAML of plain values with the help of each key beside it; reads back as the same values."""
    return "\n".join(_commented_lines(values)) + "\n"


def _commented_lines(values: Mapping[str, Any]) -> Iterator[str]:
    for name, section in SECTIONS.items():
        summary = (section.__doc__ or "").strip()
        yield f"{name}:  # {summary}"
        for item in fields(section):  # type: ignore[arg-type]
            dumped = yaml.safe_dump(
                values[name][item.name], default_flow_style=True, width=10**6, allow_unicode=True
            )
            line = f"  {item.name}: {dumped.removesuffix('...' + chr(10)).strip()}"
            hint = typing.get_type_hints(section)[item.name]
            yield f"{line.ljust(_COMMENT_COLUMN)}  # {_describe(item, hint)}"
        yield ""
    yield (
        f"output: {values['output']}".ljust(_COMMENT_COLUMN) + "  # the folder that everything is written to"
    )


def _describe(item: Field[Any], hint: Any) -> str:
    choices = [str(choice) for choice in typing.get_args(hint)] if typing.get_origin(hint) is Literal else []
    text = str(item.metadata["help"])
    missing = [choice for choice in choices if choice not in text]
    return f"{text} ({' | '.join(choices)})" if missing else text
