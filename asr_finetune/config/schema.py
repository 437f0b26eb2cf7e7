"""The configuration of a run: frozen pydantic dataclasses that check their values, one for each YAML section.

This module defines a field's type, limits, default and help (the text under it). The YAML reader, the overrides, the
command line's flags and the commented configuration of `asr-finetune train --print-config` are derived from it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import asdict, field, replace
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, StrictBool, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from asr_finetune.config.values import (
    CHECKS,
    PLACEHOLDER,
    ConfigError,
    Count,
    Delta,
    Natural,
    NonNegative,
    Positive,
    Share,
    Sources,
    SourcesByName,
    Splits,
    SplitsByName,
    Text,
    explained,
    fields_of,
    help_of,
)
from dpkernels.deprecation import OLD_STRATEGIES, warn_renamed


def _present_strategy(value: Any) -> Any:
    """The present name of a strategy; a deprecated one warns."""
    if not isinstance(value, str) or value not in OLD_STRATEGIES:
        return value
    warn_renamed(f"privacy.strategy={value}", f"privacy.strategy={OLD_STRATEGIES[value]}")
    return OLD_STRATEGIES[value]


@explained
@dataclass(frozen=True, config=CHECKS)
class ModelConfig:
    """The recogniser, and how it is loaded."""

    name: Text
    """folder or hub id of a CTC, transducer or sequence-to-sequence checkpoint (docs/recognisers.md)"""
    window_seconds: Positive | None = None
    """Whisper: trim the encoder to that many seconds (faster); CTC: leave null"""
    language: Text | None = None
    """multilingual Whisper: de, German, ...; null: the checkpoint's own, else English"""
    task: Literal["transcribe", "translate"] | None = None
    """multilingual Whisper: null: the checkpoint's own, else transcribe"""
    target_lang: Text | None = None
    """Wav2Vec2 with an adapter for each language (MMS): nld, deu, ...; null: the one in the checkpoint's weights"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """of matrix products and frozen weights (autocast); trained parameters are float32. Half types: see
    docs/privacy.md, Rounding"""
    device: Text = "auto"
    """auto (CUDA if available), cpu, cuda, cuda:1, ..."""
    shard: StrictBool = False
    """under torchrun: each of R processes keeps 1/R of the frozen weights (methods lora and dp_rp)"""
    revision: Text | None = None
    """revision of a hub id: pin it to make the run repeatable"""
    new_head: StrictBool = False
    """CTC: train a new output layer on `vocabulary`, drop the old one"""
    vocabulary: Literal["keep", "own", "characters", "words"] = "keep"
    """keep; for a new output layer: own (the checkpoint's) or characters; words: a model built for them"""
    alphabet: Text | None = None
    """vocabulary characters: english (the default), german, french, ..., or a *public* text file with each of them"""


# What a listing says about a recording -> the usual names of its column, of which the first one there counts.
COLUMNS: dict[str, tuple[str, ...]] = {
    "audio": ("audio", "audio_filepath", "file_name", "audio_file_name", "audio_file", "path", "file"),
    "text": ("text", "sentence", "transcription", "transcript"),
    "speaker": ("speaker", "client_id", "speaker_id"),
    "id": ("utt_id", "id"),
    "split": ("split",),
    "corpus": ("corpus",),
    "offset": ("offset",),
    "end": ("end",),
    "duration": ("duration",),
    "sampling_rate": ("sampling_rate", "sample_rate"),
}
_OLD_COLUMNS = {f"{name}_column": name for name in ("audio", "text", "speaker")}


def _columns(value: Any) -> Any:
    if value is None or (isinstance(value, Mapping) and set(value) <= set(COLUMNS)):
        return None if value is None else {key: str(name) for key, name in value.items()}
    raise ConfigError(
        f"data.columns={value!r}: expected a mapping with some of {', '.join(COLUMNS)}; write e.g. "
        "`columns: {audio: path, text: sentence}`"
    )


@explained
@dataclass(frozen=True, config=CHECKS)
class DataConfig:
    """The recordings, in any of the formats of docs/data.md."""

    train: Sources
    """private training data: folder, listing (.jsonl, .csv, ...) or `datasets` id, or a list of them"""
    test: SourcesByName | None = None
    """data for the before/after error rates, a list of them for one set, or several sets: {clean: a, other: b}; null:
    no evaluation"""
    valid: Sources | None = None
    """*public* data for the curve over training; null: no curve"""
    train_split: Splits | None = None
    """value of `split` (listing), split (datasets, Common Voice) or subset (LibriSpeech); a list: of each source"""
    test_split: SplitsByName | None = None
    """the same for data.test; for each test set: {clean: test-clean, other: test-other}"""
    valid_split: Splits | None = None
    """the same for data.valid"""
    columns: Annotated[dict[str, str] | None, BeforeValidator(_columns)] = None
    """names of columns, e.g. {audio: path, text: sentence, speaker: client_id, id: name}; null: the usual ones"""
    sampling_rate: Count | None = None
    """Hz of samples in a table that has no column for it"""
    pieces: Literal["refuse", "examples"] = "refuse"
    """train on several pieces of one recording (segments): examples: ε then protects one piece, not the recording"""
    corpus: Text | None = None
    """manifest: keep lines with this `corpus` only"""
    speakers: list[Text] | None = None
    """keep these speakers only"""
    exclude_speakers: list[Text] | None = None
    """leave these speakers out"""
    min_seconds: NonNegative = 0.05
    """shorter recordings are left out, and listed as problems"""
    max_seconds: Positive = 30.0
    """longer recordings are left out, and listed as problems"""
    text_case: Literal["keep", "lower", "upper"] = "keep"
    """case of the training transcripts"""
    strip_punctuation: StrictBool = False
    """remove punctuation from the training transcripts"""
    check_audio: StrictBool = True
    """decode every file before training, and leave out those that fail"""
    target_prefix: Text = ""
    """seq2seq: prefix of each transcript (" " for Whisper)"""

    @model_validator(mode="before")
    @classmethod
    def _present_columns(cls, given: Any) -> Any:
        """Deprecated keys, `text_column: words`, as the present one, `columns: {text: words}`."""
        values = dict(given if isinstance(given, Mapping) else given.kwargs or {})
        old = {_OLD_COLUMNS[key]: values.pop(key) for key in _OLD_COLUMNS if key in values}
        if not old:
            return given
        for name in old:
            warn_renamed(f"data.{name}_column", f"data.columns={{{name}: ...}}")
        values["columns"] = {**(values.get("columns") or {}), **old}
        return values if isinstance(given, Mapping) else ArgsKwargs(given.args, values)

    def __post_init__(self) -> None:
        if self.min_seconds >= self.max_seconds:
            raise ConfigError(
                f"data.min_seconds={self.min_seconds:g} leaves nothing below "
                f"data.max_seconds={self.max_seconds:g}: lower it"
            )
        named = [set(values) for values in (self.test, self.test_split) if isinstance(values, dict)]
        if named and named[0] != named[-1]:
            raise ConfigError(
                f"data.test={self.test!r}, data.test_split={self.test_split!r}: give both for the same test sets, or "
                "one of them once for all"
            )

    def test_sets(self) -> dict[str, tuple[str | list[str], str | list[str | None] | None]]:
        """Sources and splits of each test set by its name; one without a name is called "test"."""
        if self.test is None:
            return {}
        sources, splits = self.test, self.test_split
        names = next((values for values in (sources, splits) if isinstance(values, dict)), {"test": None})
        return {
            name: (
                sources[name] if isinstance(sources, dict) else sources,
                splits[name] if isinstance(splits, dict) else splits,
            )
            for name in names
        }


@explained
@dataclass(frozen=True, config=CHECKS)
class MethodConfig:
    """The trained parameters."""

    kind: Literal["full", "lora", "bitfit", "dp_rp", "head"] = "lora"
    """full, lora, bitfit (biases), dp_rp (lora, one factor frozen at random), head (output layer)"""
    rank: Count = 8
    """lora, dp_rp: rank of the adapters"""
    alpha: Positive = 16.0
    """lora, dp_rp: the adapter is scaled by alpha / rank"""
    dropout: Share = 0.0
    """lora: dropout before the adapter"""
    targets: list[Text] | None = None
    """lora, dp_rp: endings of module names; null: the model's default"""
    train_head: StrictBool = False
    """CTC: train the output layer along with any method; a new one is trained anyway"""
    layers: Literal["all", "encoder", "decoder"] = "all"
    """the part of a seq2seq model that is trained"""


@explained
@dataclass(frozen=True, config=CHECKS)
class PrivacyConfig:
    """The guarantee: (epsilon, delta) and the unit it protects."""

    epsilon: Positive | None = None
    """target: training stops before it is exceeded; chooses the noise"""
    delta: Delta | None = None
    """required; at most 0.1 / number of training units"""
    noise_multiplier: NonNegative | None = None
    """the noise multiplier; null: calibrated to epsilon and steps"""
    max_grad_norm: Positive = 1.0
    """clipping bound C on one utterance's gradient; adaptive clipping starts from it"""
    clipping: Literal["flat", "automatic", "adaptive"] = "flat"
    """flat: gradients above C are scaled to it; automatic: all are scaled to just below it (C needs no tuning);
    adaptive: flat, and C (strategy per_layer: each layer's) follows the median of the norms; epsilon covers that"""
    unit: Literal["example", "speaker"] = "example"
    """the protected unit: one utterance, or all utterances of a speaker"""
    max_examples_per_speaker: Count | None = None
    """unit speaker: the most utterances of one speaker in a step"""
    clipping_unit: Literal["example", "speaker"] | None = None
    """unit speaker: what is clipped to C: each utterance (null), or a speaker's together, with less noise"""
    max_batch_size: Count | None = None
    """truncated Poisson: a batch never exceeds it; null: no limit"""
    accountant: Literal["pld", "rdp"] = "pld"
    """pld (tight) or rdp"""
    strategy: Annotated[
        Literal["bookkeeping", "mixed", "auto", "two_pass", "per_layer"], BeforeValidator(_present_strategy)
    ] = "bookkeeping"
    """tensors kept until norms are known: inputs; per-sample gradients where smaller, or where faster; none (a second
    backward); none (each layer clipped on its own: other gradients)"""
    enabled: StrictBool = True
    """false: ordinary training, for comparison; nothing is private then"""

    def clips(self) -> str:
        """What is clipped to C, "example" or "speaker": the data set and the recognisers keep the order it rests on."""
        return self.clipping_unit or "example"

    def check(self) -> None:
        """Check that the section is complete for a private run; a section that is not enabled passes.

        Raises:
            ConfigError: δ is missing; both ε and the noise multiplier are missing; an option lacks another it needs.
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
        if self.clipping == "automatic" and self.strategy == "per_layer":
            raise ConfigError(
                "privacy.clipping=automatic with privacy.strategy=per_layer: automatic clipping scales by the norm of "
                "the whole gradient, which per_layer never knows: choose another strategy, or clipping=flat"
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


@explained
@dataclass(frozen=True, config=CHECKS)
class TrainConfig:
    """The training loop."""

    batch_size: Count = 256
    """expected logical batch, in utterances: each joins with probability batch_size / N; unit speaker: each
    speaker with batch_size / (max_examples_per_speaker · N)"""
    physical_batch_size: Count = 16
    """utterances in one forward; changes speed and memory, not the result"""
    checkpointing: StrictBool = False
    """recompute each block's activations in the backward: less memory, more time"""
    compile_frozen: StrictBool = False
    """torch.compile the blocks without trained parameters: minutes to start; for a GPU"""
    fill_micro_batches: StrictBool = False
    """physical_batch_size counts utterances of the longest length; shorter ones share a larger micro-batch"""
    steps: Count = 100
    """logical steps"""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """torch.optim class"""
    learning_rate: Positive = 0.001
    """peak learning rate"""
    lr_schedule: Literal["constant", "cosine", "linear"] = "constant"
    """schedule after warm-up; cosine and linear fall to 0"""
    warmup_steps: Natural = 0
    """steps of linear warm-up"""
    weight_decay: NonNegative = 0.0
    """the optimizer's weight decay"""
    spec_augment: StrictBool = False
    """mask bands of time and frequency, drawn for each utterance"""
    seed: Natural = 0
    """seed of initialisation and public data only: sampling and noise always use fresh keys"""
    checkpoint_every: Count = 10
    """steps between checkpoints"""
    eval_every: Natural = 0
    """steps between evaluations on data.valid; 0: none"""
    num_workers: Natural = 0
    """processes that read audio"""
    cache_features: StrictBool = True
    """keep the features in memory, up to 4 GiB a corpus, from the check of the audio or the first pass on"""


@explained
@dataclass(frozen=True, config=CHECKS)
class EvaluateConfig:
    """Error rates before and after."""

    before: StrictBool = True
    """also measure the error rates of the checkpoint before training, with its own window"""
    batch_size: Count = 32
    """utterances decoded at once"""
    restrict_to: list[Text] | None = None
    """restrict decoding to these texts; null: free decoding"""
    bootstrap: Natural = 1000
    """resamples of the confidence interval over utterances; 0: none"""
    normalize: Literal["basic", "english", "none"] = "basic"
    """basic: lower case, no punctuation, single spaces; english: Whisper's own, numbers as digits"""

    def __post_init__(self) -> None:
        if self.restrict_to is not None and not self.restrict_to:
            raise ConfigError("evaluate.restrict_to=[]: give at least one text, or null for free decoding")


@explained
@dataclass(frozen=True, config=CHECKS)
class LogConfig:
    """Logs for TensorBoard."""

    tensorboard: StrictBool = False
    """write ε, learning rate and the curve to OUTPUT/tensorboard, what ε does not cover to not_private/tensorboard"""
    not_private: StrictBool = False
    """also write losses and clip rates, which ε does not cover, to OUTPUT/tensorboard"""


def _folder(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"output: expected a folder, got {value!r}; write e.g. `output: runs/first`")
    return value


@explained
@dataclass(frozen=True, kw_only=True, config=CHECKS)
class Config:
    """A whole run."""

    model: ModelConfig
    """the recogniser"""
    data: DataConfig
    """the recordings"""
    method: MethodConfig = field(default_factory=MethodConfig)
    """the trained parameters"""
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    """the guarantee"""
    train: TrainConfig = field(default_factory=TrainConfig)
    """the training loop"""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """error rates"""
    log: LogConfig = field(default_factory=LogConfig)
    """logs"""
    output: Annotated[str, BeforeValidator(_folder)]
    """the folder that everything is written to"""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `from_dict` reads them and as they are written as YAML."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """The configuration from plain values.

        Raises:
            ConfigError: a key is unknown (the message has the nearest name) or missing, or a value has the wrong type
                or range.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"a configuration is a mapping of sections, got {type(values).__name__}")
        sections = {str(key): value for key, value in values.items() if value is not None}
        return cls(**{**{name: {} for name in SECTIONS}, **sections})

    def to_yaml(self) -> str:
        """YAML without comments."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def with_values(self, section: str, **values: Any) -> Config:
        """A copy in which some values of one section are replaced; the copy is checked again."""
        return replace(self, **{section: replace(getattr(self, section), **values)})

    def check_filled(self) -> None:
        """Check that every placeholder of a printed configuration was replaced.

        Raises:
            ConfigError: some were not; the message names them.
        """
        unfilled = [
            f"{name}.{key} ({help_of(item)})"
            for name, section in SECTIONS.items()
            for key, item in fields_of(section).items()
            if getattr(getattr(self, name), key) == PLACEHOLDER
        ]
        if unfilled:
            raise ConfigError(
                f"still the placeholder {PLACEHOLDER!r} of --print-config; replace each by a value of yours: "
                f"{'; '.join(unfilled)}"
            )

    def check_trainable(self) -> None:
        """Check that the sections are complete and consistent for training.

        Raises:
            ConfigError: a placeholder is left, `PrivacyConfig.check` fails, or an option lacks another it needs.
        """
        self.check_filled()
        privacy, train = self.privacy, self.train
        privacy.check()
        capacity = privacy.max_batch_size if privacy.enabled else None
        if capacity is not None and capacity < train.batch_size:
            raise ConfigError(
                f"privacy.max_batch_size={capacity} is below "
                f"train.batch_size={train.batch_size}, so most batches would be truncated: give at least "
                "batch_size + 6·√batch_size, or null"
            )
        if train.eval_every and self.data.valid is None:
            raise ConfigError(
                f"train.eval_every={train.eval_every} needs data.valid, which must be public data (private "
                "data may not steer or describe training): set data.valid, or train.eval_every=0"
            )
        if self.model.shard and self.method.kind not in ADAPTER_METHODS:
            raise ConfigError(
                f"model.shard=true with method.kind={self.method.kind}: such a run saves the whole model, whose "
                f"weights are then in parts; use {' or '.join(ADAPTER_METHODS)}, or set model.shard to false"
            )
        if self.log.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ConfigError(
                "log.tensorboard=true needs the package tensorboard: pip install 'dpkernels[log]', or set it to false"
            )
        if train.warmup_steps >= train.steps and train.warmup_steps:
            raise ConfigError(
                f"train.warmup_steps={train.warmup_steps} must be below train.steps={train.steps}: lower it"
            )


ADAPTER_METHODS = ("lora", "dp_rp")
"""Methods that train and save an adapter, and leave the model's own weights frozen."""

OLD_KEYS = {"data": tuple(_OLD_COLUMNS)}  # section -> deprecated keys, which are still accepted
SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "method": MethodConfig,
    "privacy": PrivacyConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "log": LogConfig,
}
