"""The configuration of a run: frozen dataclasses, one a YAML section, that check themselves.

A field's type, default, help and limits are written once, on the field. How single values are checked is in
`values.py`; the YAML reader, the overrides and the commented configuration that `asr-finetune train
--print-config` prints are derived from the fields in `config_file.py`. Every error names the key, the value
given and the fix.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any, Literal, Self

import yaml

from asr_finetune.config.values import PLACEHOLDER, ConfigError, about, check_limits, coerce, unknown_key


class _Section:
    """What every section does: check its values, and read itself from a mapping."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in fields(self):  # type: ignore[arg-type]
            key = f"{section_name(type(self))}.{item.name}"
            value = coerce(key, getattr(self, item.name), hints[item.name])
            check_limits(key, value, item)
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
                raise ConfigError(unknown_key(f"{name}.{key}", str(key), known, prefix=f"{name}."))
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
    language: str | None = field(
        default=None,
        metadata=about("multilingual Whisper: de, German, ...; null: the checkpoint's own, else English"),
    )
    task: Literal["transcribe", "translate"] | None = field(
        default=None, metadata=about("multilingual Whisper: null: the checkpoint's own, else transcribe")
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32",
        metadata=about(
            "of matrix products and frozen weights (autocast); what is trained is float32. Half types: see "
            "docs/privacy.md, Rounding"
        ),
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
    vocabulary: Literal["keep", "own", "characters", "words"] = field(
        default="keep",
        metadata=about(
            "keep; for a new output layer: own (the checkpoint's) or characters; words: a model made for them"
        ),
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
    check_audio: bool = field(
        default=True, metadata=about("read every file to its end first, and leave out what does not decode")
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
    train_head: bool = field(
        default=False,
        metadata=about("CTC: train the output layer along with any method; a new one is trained anyway"),
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
        default=1.0, metadata=about("clipping bound C on one utterance's gradient", above=0)
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
    strategy: Literal["bookkeeping", "mixed", "two_pass", "per_layer"] = field(
        default="bookkeeping",
        metadata=about(
            "what is kept until norms are known: inputs; per-sample gradients where smaller; nothing (a second "
            "backward); nothing (each layer clipped on its own: other gradients)"
        ),
    )
    enabled: bool = field(
        default=True, metadata=about("false: ordinary training, for comparison; nothing is private then")
    )

    def check(self) -> None:
        """Whether it says what a private run needs to know; a section that is not enabled always does.

        Raises:
            ConfigError: no δ; neither ε nor a noise multiplier; options that need each other.
        """
        if not self.enabled:
            return
        if self.delta is None:
            raise ConfigError(
                "privacy.delta is missing: there is no safe default. Choose it well below 1 / number of "
                "training units, e.g. --delta 1e-6 for 100,000 utterances"
            )
        if self.epsilon is None and self.noise_multiplier is None:
            raise ConfigError(
                "privacy.epsilon and privacy.noise_multiplier are both missing: give --epsilon 8 (the "
                "noise is then calibrated), or --noise-multiplier 0.7, or train with --not-private"
            )
        if self.epsilon is not None and self.noise_multiplier == 0:
            raise ConfigError(
                f"privacy.noise_multiplier=0 with privacy.epsilon={self.epsilon:g}: without noise epsilon "
                "is infinite: set noise_multiplier null (calibrated), or epsilon null"
            )
        if self.unit == "speaker" and self.max_examples_per_speaker is None:
            raise ConfigError(
                "privacy.unit=speaker needs privacy.max_examples_per_speaker, the most utterances of one "
                "speaker in a step: the noise grows with it. Try 4"
            )
        if self.max_examples_per_speaker is not None and self.unit != "speaker":
            raise ConfigError(
                f"privacy.max_examples_per_speaker={self.max_examples_per_speaker} needs "
                f"privacy.unit=speaker, got {self.unit!r}: set both, or neither"
            )


@dataclass(frozen=True)
class TrainConfig(_Section):
    """The training loop."""

    batch_size: int = field(
        default=256,
        metadata=about(
            "expected logical batch, in utterances: each joins with probability batch_size / N; unit speaker: each "
            "speaker with batch_size / (max_examples_per_speaker · N)",
            least=1,
        ),
    )
    physical_batch_size: int = field(
        default=16,
        metadata=about("utterances in one forward; changes speed and memory, not the result", least=1),
    )
    checkpointing: bool = field(
        default=False,
        metadata=about("recompute each block's activations in the backward: less memory, more time"),
    )
    compile_frozen: bool = field(
        default=False,
        metadata=about("torch.compile the blocks without trained parameters: minutes to start; for a GPU"),
    )
    fill_micro_batches: bool = field(
        default=False,
        metadata=about("physical_batch_size counts utterances of the longest length; more of shorter ones"),
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.restrict_to is not None and not self.restrict_to:
            raise ConfigError("evaluate.restrict_to=[]: give at least one text, or null for free decoding")


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
                raise ConfigError(unknown_key(str(key), str(key), known))
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

    def with_values(self, section: str, **values: Any) -> Config:
        """A copy in which some values of one section are replaced, and checked again."""
        return replace(self, **{section: replace(getattr(self, section), **values)})

    def check_filled(self) -> None:
        """Whether every placeholder of a printed configuration was replaced.

        Raises:
            ConfigError: naming those that were not.
        """
        left = [
            f"{name}.{item.name} ({item.metadata['help']})"
            for name, section in SECTIONS.items()
            for item in fields(section)  # type: ignore[arg-type]
            if getattr(getattr(self, name), item.name) == PLACEHOLDER
        ]
        if left:
            raise ConfigError(
                f"still the placeholder {PLACEHOLDER!r} of --print-config, to be replaced by a value of yours: "
                f"{'; '.join(left)}"
            )

    def check_trainable(self) -> None:
        """Whether the sections are complete, and fit together for training.

        Raises:
            ConfigError: a placeholder; what `PrivacyConfig.check` refuses; options that need each other.
        """
        self.check_filled()
        privacy, train = self.privacy, self.train
        privacy.check()
        capacity = privacy.max_batch_size if privacy.enabled else None
        if capacity is not None and capacity < train.batch_size:
            raise ConfigError(
                f"privacy.max_batch_size={capacity} is below "
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
