"""The configuration of a run: frozen dataclasses, one a YAML section, that check themselves.

A field's type, default, help and limits are written once, on the field; the YAML reader, the overrides and
the commented configuration that `asr-finetune train --print-config` prints are derived from them. Every error
names the key, the value given and the mend.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

import yaml

_COMMENT_COLUMN = 44


class ConfigError(ValueError):
    """A configuration that cannot be used: the message names the key, what was given, and the mend."""


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


class _Section:
    """What every section does: check its values, and read itself from a mapping."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in fields(self):  # type: ignore[arg-type]
            key = f"{section_name(type(self))}.{item.name}"
            value = _coerce(key, getattr(self, item.name), hints[item.name])
            _check_limits(key, value, item)
            object.__setattr__(self, item.name, value)  # frozen: only here, only to normalise

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The section from plain values, as YAML gives them.

        Raises:
            ConfigError: an unknown key (with the nearest name), a missing one, a value of the wrong type or
                range.
        """
        name = section_name(cls)
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"{name}: expected a section, got {values!r}; write `{name}:` and indented keys under it"
            )
        known = [item.name for item in fields(cls)]  # type: ignore[arg-type]
        for key in values:
            if key not in known:
                raise ConfigError(_unknown(f"{name}.{key}", str(key), known, prefix=f"{name}."))
        for item in fields(cls):  # type: ignore[arg-type]
            if item.default is MISSING and item.name not in values:
                raise ConfigError(f"{name}.{item.name} is missing ({item.metadata['help']}): set it")
        return cls(**values)


@dataclass(frozen=True)
class ModelConfig(_Section):
    """Which recogniser, and how it is loaded."""

    name: str = field(
        metadata=about("folder or hub id of a CTC or Whisper checkpoint in Hugging Face format")
    )
    window_seconds: float | None = field(
        default=None,
        metadata=about("Whisper: trim the encoder to that many seconds (faster); CTC: leave null", above=0),
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata=about("type of the weights")
    )
    device: str = field(
        default="auto", metadata=about("auto (CUDA where there is one), cpu, cuda, cuda:1, ...")
    )
    revision: str | None = field(
        default=None, metadata=about("revision of a hub id: pin it for a run that can be repeated")
    )
    new_head: bool = field(
        default=False, metadata=about("CTC: train a new output layer on `vocabulary`, drop the old one")
    )
    vocabulary: Literal["keep", "characters", "words"] = field(
        default="keep", metadata=about("what the output layer's classes are")
    )


@dataclass(frozen=True)
class DataConfig(_Section):
    """The recordings: a LibriSpeech tree, a JSON-lines manifest, or a `datasets` id."""

    train: str = field(
        metadata=about("private training data: LibriSpeech folder, manifest .jsonl, or `datasets` id")
    )
    test: str | None = field(
        default=None, metadata=about("data for the before/after error rates; null: no evaluation")
    )
    valid: str | None = field(
        default=None, metadata=about("*public* data for the curve over training; null: no curve")
    )
    train_split: str | None = field(
        default=None, metadata=about("value of `split` (manifest), split (datasets) or subset (LibriSpeech)")
    )
    test_split: str | None = field(default=None, metadata=about("the same for data.test"))
    valid_split: str | None = field(default=None, metadata=about("the same for data.valid"))
    corpus: str | None = field(default=None, metadata=about("manifest: keep lines with this `corpus` only"))
    speakers: list[str] | None = field(default=None, metadata=about("keep these speakers only"))
    exclude_speakers: list[str] | None = field(default=None, metadata=about("leave these speakers out"))
    min_seconds: float = field(
        default=0.05, metadata=about("shorter recordings are left out, and listed as problems", least=0)
    )
    max_seconds: float = field(
        default=30.0, metadata=about("longer recordings are left out, and listed as problems", above=0)
    )
    text_case: Literal["keep", "lower", "upper"] = field(
        default="keep", metadata=about("case of the transcripts that are learnt")
    )
    strip_punctuation: bool = field(
        default=False, metadata=about("remove punctuation from the transcripts that are learnt")
    )
    target_prefix: str = field(
        default="", metadata=about('seq2seq: put before each transcript (" " for Whisper)')
    )
    audio_column: str = field(default="audio", metadata=about("`datasets`: column with the audio"))
    text_column: str = field(default="text", metadata=about("`datasets`: column with the transcript"))
    speaker_column: str = field(default="speaker", metadata=about("`datasets`: column with the speaker"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_seconds >= self.max_seconds:
            raise ConfigError(
                f"data.min_seconds={self.min_seconds:g} leaves nothing below "
                f"data.max_seconds={self.max_seconds:g}: lower it"
            )


@dataclass(frozen=True)
class MethodConfig(_Section):
    """What is trained."""

    kind: Literal["full", "lora", "bitfit", "dp_rp", "head"] = field(
        default="full",
        metadata=about(
            "full, lora, bitfit (biases), dp_rp (lora, one factor frozen at random), head (output layer)"
        ),
    )
    rank: int = field(default=8, metadata=about("lora, dp_rp: rank of the adapters", least=1))
    alpha: float = field(
        default=16, metadata=about("lora, dp_rp: the adapter is scaled by alpha / rank", above=0)
    )
    dropout: float = field(default=0.0, metadata=about("lora: dropout before the adapter", least=0, below=1))
    targets: list[str] | None = field(
        default=None, metadata=about("lora, dp_rp: endings of module names; null: the model's default")
    )
    layers: Literal["all", "encoder", "decoder"] = field(
        default="all", metadata=about("which half of a seq2seq model is trained")
    )


@dataclass(frozen=True)
class PrivacyConfig(_Section):
    """The guarantee: (epsilon, delta) and what it protects."""

    epsilon: float | None = field(
        default=None,
        metadata=about("target: training stops before it is exceeded; chooses the noise", above=0),
    )
    delta: float | None = field(
        default=None, metadata=about("required; well below 1 / number of training units", above=0, below=1)
    )
    noise_multiplier: float | None = field(
        default=None, metadata=about("noise by hand; null: calibrated to epsilon and steps", least=0)
    )
    max_grad_norm: float = field(
        default=1.0, metadata=about("clipping bound C on one unit's gradient", above=0)
    )
    unit: Literal["example", "speaker"] = field(
        default="example", metadata=about("what is protected: one utterance, or all of a speaker's")
    )
    max_examples_per_speaker: int | None = field(
        default=None, metadata=about("unit speaker: utterances of one speaker in a step", least=1)
    )
    max_batch_size: int | None = field(
        default=None, metadata=about("truncated Poisson: a batch never exceeds it; null: no limit", least=1)
    )
    accountant: Literal["pld", "rdp"] = field(default="pld", metadata=about("pld (tight) or rdp"))
    strategy: Literal["bookkeeping", "two_pass", "per_layer"] = field(
        default="bookkeeping", metadata=about("how gradients are clipped")
    )
    enabled: bool = field(
        default=True, metadata=about("false: ordinary training, for comparison; nothing is private then")
    )


@dataclass(frozen=True)
class TrainConfig(_Section):
    """The training loop."""

    batch_size: int = field(
        default=256,
        metadata=about("expected logical batch: each unit joins with probability batch_size / N", least=1),
    )
    physical_batch_size: int = field(
        default=16,
        metadata=about("utterances in one forward; changes speed and memory, not the result", least=1),
    )
    steps: int = field(default=100, metadata=about("logical steps", least=1))
    optimizer: Literal["adam", "adamw", "sgd"] = field(default="adam", metadata=about("torch.optim class"))
    learning_rate: float = field(default=1e-3, metadata=about("peak learning rate", above=0))
    lr_schedule: Literal["constant", "cosine", "linear"] = field(
        default="constant", metadata=about("after warm-up; the last two fall to 0")
    )
    warmup_steps: int = field(default=0, metadata=about("steps of linear warm-up", least=0))
    weight_decay: float = field(default=0.0, metadata=about("the optimizer's weight decay", least=0))
    spec_augment: bool = field(
        default=False, metadata=about("mask bands of time and frequency, drawn for each utterance")
    )
    seed: int = field(
        default=0,
        metadata=about(
            "initialisation and public data only: sampling and noise always use fresh keys", least=0
        ),
    )
    checkpoint_every: int = field(default=10, metadata=about("steps between checkpoints", least=1))
    eval_every: int = field(
        default=0, metadata=about("steps between evaluations on data.valid; 0: none", least=0)
    )
    num_workers: int = field(default=0, metadata=about("processes that read audio", least=0))
    cache_features: bool = field(
        default=True, metadata=about("keep the features in memory after the first pass")
    )


@dataclass(frozen=True)
class EvaluateConfig(_Section):
    """Error rates before and after."""

    before: bool = field(
        default=True, metadata=about("error rates of the checkpoint before training too, with its own window")
    )
    batch_size: int = field(default=32, metadata=about("utterances decoded at once", least=1))
    restrict_to: list[str] | None = field(
        default=None, metadata=about("decode to one of these texts only; null: free decoding")
    )
    bootstrap: int = field(
        default=1000, metadata=about("resamples of the confidence interval over utterances; 0: none", least=0)
    )
    normalize: Literal["basic", "english", "none"] = field(
        default="basic",
        metadata=about(
            "basic: lower case, no punctuation, single spaces; english: Whisper's own, numbers as digits"
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. `output` is the folder that everything is written to."""

    model: ModelConfig
    data: DataConfig
    method: MethodConfig = field(default_factory=MethodConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    output: str

    def __post_init__(self) -> None:
        if not isinstance(self.output, str) or not self.output:
            raise ConfigError(
                f"output: expected a folder, got {self.output!r}; write e.g. `output: runs/first`"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values: what `from_dict` reads and what is written as YAML."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """The configuration from plain values.

        Raises:
            ConfigError: an unknown key (with the nearest name), a missing one, a value of the wrong type or
                range.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"a configuration is a mapping of sections, got {type(values).__name__}")
        known = [*SECTIONS, "output"]
        for key in values:
            if key not in known:
                raise ConfigError(_unknown(str(key), str(key), known))
        if values.get("output") is None:
            raise ConfigError(
                "output is missing (the folder that everything is written to): set it, or give --output"
            )
        built: dict[str, Any] = {
            name: section.from_dict(values.get(name) or {}) for name, section in SECTIONS.items()
        }
        return cls(output=values["output"], **built)

    def to_yaml(self) -> str:
        """YAML without comments."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def commented(self) -> str:
        """YAML with each key's help beside it."""
        return commented_yaml(self.to_dict())

    def with_values(self, section: str, **values: Any) -> Config:
        """A copy in which some values of one section are replaced, and checked again."""
        return replace(self, **{section: replace(getattr(self, section), **values)})

    def check_trainable(self) -> None:
        """Whether the parts fit together for training; what a single section cannot see.

        Raises:
            ConfigError: no δ; neither ε nor a noise multiplier; options that need each other.
        """
        privacy, train = self.privacy, self.train
        if privacy.enabled:
            if privacy.delta is None:
                raise ConfigError(
                    "privacy.delta is missing: there is no safe default. Choose it well below 1 / number of "
                    "training units, e.g. --delta 1e-6 for 100,000 utterances"
                )
            if privacy.epsilon is None and privacy.noise_multiplier is None:
                raise ConfigError(
                    "privacy.epsilon and privacy.noise_multiplier are both missing: give --epsilon 8 (the "
                    "noise is then calibrated), or --noise-multiplier 0.7, or --not-private"
                )
            if privacy.max_examples_per_speaker is not None and privacy.unit != "speaker":
                raise ConfigError(
                    f"privacy.max_examples_per_speaker={privacy.max_examples_per_speaker} needs "
                    f"privacy.unit=speaker, got {privacy.unit!r}: set both, or neither"
                )
            if privacy.max_batch_size is not None and privacy.max_batch_size < train.batch_size:
                raise ConfigError(
                    f"privacy.max_batch_size={privacy.max_batch_size} is below "
                    f"train.batch_size={train.batch_size}, so that most batches would be cut: give at least "
                    "batch_size + 6·√batch_size, or null"
                )
        if train.eval_every and self.data.valid is None:
            raise ConfigError(
                f"train.eval_every={train.eval_every} needs data.valid, which must be public data (private "
                "data may not steer or describe training): set data.valid, or train.eval_every=0"
            )
        if train.warmup_steps >= train.steps and train.warmup_steps:
            raise ConfigError(
                f"train.warmup_steps={train.warmup_steps} must be below train.steps={train.steps}: lower it"
            )


SECTIONS: dict[str, type[_Section]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "method": MethodConfig,
    "privacy": PrivacyConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
}


def section_name(section: type) -> str:
    """`privacy` for PrivacyConfig: the name of its YAML section."""
    return section.__name__.removesuffix("Config").lower()


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The plain values of a YAML file, unchecked (overrides may come before the check).

    Raises:
        FileNotFoundError: no such file.
        ConfigError: not YAML, or not a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"--config {path}: no such file; `asr-finetune train --print-config > {path}` writes one"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: expected sections like `model:` and `data:`, got {values!r}")
    return values


def load_config(
    path: str | Path, overrides: Mapping[str, Any] | None = None, settings: Sequence[str] = ()
) -> Config:
    """A YAML file with overrides, checked.

    Args:
        path: the YAML file.
        overrides: {"section.key": value}; None values are no override.
        settings: ["section.key=value", ...], values written as in YAML.
    """
    return Config.from_dict(overridden(load_yaml(path), overrides, settings))


def overridden(
    values: Mapping[str, Any], overrides: Mapping[str, Any] | None = None, settings: Sequence[str] = ()
) -> dict[str, Any]:
    """Plain values with `overrides` and then `settings` put in; unknown keys are refused."""
    result = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    for key, value in [*given.items(), *(parse_setting(setting) for setting in settings)]:
        if key == "output":
            result["output"] = value
            continue
        section, _, name = key.partition(".")
        if section not in SECTIONS:
            raise ConfigError(_unknown(key, section, [*SECTIONS, "output"]))
        known = [item.name for item in fields(SECTIONS[section])]  # type: ignore[arg-type]
        if name not in known:
            raise ConfigError(_unknown(key, name, known, prefix=f"{section}."))
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


def template() -> str:
    """A commented configuration with every key at its default, the required ones to be filled in."""
    values: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        values[name] = {
            item.name: "..." if item.default is MISSING else item.default
            for item in fields(section)  # type: ignore[arg-type]
        }
    return commented_yaml({**values, "output": "runs/first"})


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


def _unknown(key: str, name: str, known: Sequence[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    mend = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
    return f"{key}: unknown key; {mend}"


def _coerce(key: str, value: Any, hint: Any) -> Any:
    """`value` as `hint` wants it: YAML gives 1 for a float, "1e-3" as text, 19 for a speaker's name."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        (inner,) = [argument for argument in arguments if argument is not type(None)]
        return _coerce(key, value, inner)
    if origin is Literal:
        if value in arguments:
            return value
        near = difflib.get_close_matches(str(value), [str(argument) for argument in arguments], n=1)
        guess = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{key}={value!r}: expected one of {', '.join(map(str, arguments))}{guess}")
    if origin is list:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigError(f"{key}={value!r}: expected a list, e.g. [a, b]")
        return [_coerce(f"{key}[{index}]", entry, arguments[0]) for index, entry in enumerate(value)]
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


def _check_limits(key: str, value: Any, item: Field[Any]) -> None:
    if value is None:
        return
    above, least, below = (item.metadata.get(name) for name in ("above", "least", "below"))
    if above is not None and not value > above:
        raise ConfigError(f"{key}={value!r}: must be above {above:g}")
    if least is not None and not value >= least:
        raise ConfigError(f"{key}={value!r}: must be at least {least:g}")
    if below is not None and not value < below:
        raise ConfigError(f"{key}={value!r}: must be below {below:g}")
