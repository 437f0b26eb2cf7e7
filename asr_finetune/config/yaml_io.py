"""A configuration's YAML: finding, reading, overriding by flags, comparing, and writing it with comments.

The recipes that come with the package are found by name. A file may have a base: the key `base: other.yaml` (a file
beside it, or a recipe's name) supplies every key that the file does not have.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from asr_finetune.config.schema import OLD_KEYS, SECTIONS, Config
from asr_finetune.config.values import (
    PLACEHOLDER,
    ConfigError,
    choices,
    fields_of,
    help_of,
    unknown_key,
)
from asr_finetune.files import MissingFile

RECIPES = Path(__file__).with_name("recipes")
_COMMENT_COLUMN = 44


def recipes() -> list[str]:
    """Names of the recipes that come with the package, as `--config` takes them."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_titles() -> dict[str, str]:
    """The first line of each recipe, by name."""
    return {name: _title(RECIPES / f"{name}.yaml") for name in recipes()}


def _title(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ").rstrip(".:")


def find(path: str | Path) -> Path:
    """The file of a path, or of a recipe's name, with or without .yaml.

    Raises:
        FileNotFoundError: there is neither such a file nor such a recipe.
    """
    path = Path(path)
    if path.is_file():
        return path
    if path.parent == Path():
        recipe = RECIPES / f"{path.name.removesuffix('.yaml')}.yaml"
        if recipe.is_file():
            return recipe
    near = difflib.get_close_matches(path.name.removesuffix(".yaml"), recipes(), n=1)
    hint = f"did you mean {near[0]}?" if near else f"recipes: {', '.join(recipes())}"
    raise MissingFile(
        f"--config {path}: no such file; `asr-finetune train --print-config > {path}` writes one. {hint}"
    )


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The plain values of a YAML file (or recipe) and its bases. They are unchecked, since overrides may follow.

    Raises:
        FileNotFoundError: the file or a base does not exist.
        ConfigError: a file is not YAML, is not a mapping, or is its own base.
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
    inherited = _load(beside if beside.is_file() else find(base), (*above, path.resolve()))
    both = [key for key in inherited.keys() & values.keys() if isinstance(inherited[key], Mapping)]
    return {**inherited, **values, **{key: _merged(inherited[key], values[key]) for key in both}}


def _merged(inherited: Any, values: Any) -> Any:
    """A section's values over its base's. A value that is no section is returned, and the later check refuses it."""
    return {**inherited, **values} if isinstance(values, Mapping) else inherited if values is None else values


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: expected sections like `model:` and `data:`, got {values!r}")
    return values


def typed(overrides: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """The values of a command line by key: the flags that were given, overridden by the settings.

    Raises:
        ConfigError: see `parse_setting`.
    """
    flags = {key: value for key, value in overrides.items() if value is not None}
    return flags | dict(map(parse_setting, settings))


def overridden(
    values: Mapping[str, Any], overrides: Mapping[str, Any] | None = None, settings: Sequence[str] = ()
) -> dict[str, Any]:
    """Plain values, overridden by `overrides` and then by `settings`.

    A target ε among them removes a noise multiplier from `values`, so that the noise is calibrated to ε. If they give a
    noise multiplier as well, it sets the noise, and training stops before ε is exceeded.

    Raises:
        ConfigError: a key is unknown, or a setting cannot be parsed.
    """
    result = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    changes = typed(overrides or {}, settings)
    if changes.get("privacy.epsilon") is not None:
        changes.setdefault("privacy.noise_multiplier", None)
    for key, value in changes.items():
        if key == "output":
            result["output"] = value
            continue
        section, _, name = key.partition(".")
        if section not in SECTIONS:
            raise ConfigError(unknown_key(key, section, [*SECTIONS, "output"]))
        known = list(fields_of(SECTIONS[section]))
        if name not in known and name not in OLD_KEYS.get(section, ()):
            raise ConfigError(unknown_key(key, name, known, prefix=f"{section}."))
        result[section] = {**(result.get(section) or {}), name: value}
    return result


def parse_setting(text: str) -> tuple[str, Any]:
    """`"train.steps=60"` as ("train.steps", 60); the value is read as YAML.

    Raises:
        ConfigError: the text has no "=", or the value is not YAML.
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
    """A commented configuration with every key: the given value, else its default, else "..." to be filled in.

    Raises:
        ConfigError: a given value is refused.
    """
    given = given or {}
    values: dict[str, Any] = {"output": given.get("output") or "runs/first"}
    for name, section in SECTIONS.items():
        required = {key: PLACEHOLDER for key, item in fields_of(section).items() if item.is_required()}
        section_values = given.get(name) or {}
        values[name] = (
            {**required, **section_values} if isinstance(section_values, Mapping) else section_values
        )
    unknown = {key: value for key, value in given.items() if key not in values}
    return commented_yaml(Config.from_dict({**values, **unknown}).to_dict())


def commented_yaml(values: Mapping[str, Any]) -> str:
    """YAML of plain values with the help of each key beside it. Reading it gives the same values."""
    return "\n".join(_commented_lines(values)) + "\n"


def _commented_lines(values: Mapping[str, Any]) -> Iterator[str]:
    for name, section in SECTIONS.items():
        summary = (section.__doc__ or "").strip()
        yield f"{name}:  # {summary}"
        for key, item in fields_of(section).items():
            dumped = yaml.safe_dump(
                values[name][key], default_flow_style=True, width=10**6, allow_unicode=True
            )
            line = f"  {key}: {dumped.removesuffix('...' + chr(10)).strip()}"
            listed, text = choices(item.annotation), help_of(item)
            if any(choice not in text for choice in listed):
                text += f" ({' | '.join(listed)})"
            yield f"{line.ljust(_COMMENT_COLUMN)}  # {text}"
        yield ""
    yield (f"output: {values['output']}".ljust(_COMMENT_COLUMN) + "  # the folder of all output")
