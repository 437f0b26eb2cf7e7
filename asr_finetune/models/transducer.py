"""Transducers (RNN-T, TDT): an encoder, a prediction network over the labels so far, and a joint network of both.

Any model type of transformers' `AutoModelForRNNT` and `AutoModelForTDT` is one. The loss never holds the joint
network's logits of all cells; see `dpkernels.losses.transducer_loss_per_example`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.models.auto import modeling_auto as auto

from asr_finetune.config.schema import ConfigError, ModelConfig
from asr_finetune.data.utterance import Utterance
from asr_finetune.models.alphabets import ctc_tokenizer, read_alphabet
from asr_finetune.models.architecture import attention, blank_of, processor_class, set_blank
from asr_finetune.models.checkpoint import LOAD, placed, read
from asr_finetune.models.checkpoint_fit import (
    check_blank,
    check_tokenizer,
    check_weights,
    classes_needed,
    refuse_whisper_options,
)
from asr_finetune.models.examine import examine
from asr_finetune.models.recognizer import KindName, Recognizer
from dpkernels.blocks import base_model
from dpkernels.losses import IGNORED, transducer_loss_per_example

DECODER_PARTS = ("encoder_projector", "decoder", "joint.head")
"""What a new decoder consists of."""


class TransducerRecognizer(Recognizer):
    """A transducer; items hold input_features [T, F]. Labels are tokens without the blank, which starts a text."""

    kind: ClassVar[KindName] = "transducer"

    def __init__(self, model: nn.Module, processor: Any, **options: Any) -> None:
        super().__init__(model, processor, **options)
        config = self.base.config
        self.blank = int(blank_of(config))
        self.durations = tuple(int(duration) for duration in getattr(config, "durations", ()))
        self.activation = str(config.hidden_act)
        self.read_layers = frozenset(DECODER_PARTS[-1:])
        generation = self.base.generation_config
        if (
            generation.decoder_start_token_id is None
        ):  # a new model: plain generate() is to work where it is loaded
            generation.decoder_start_token_id = self.blank
            generation.suppress_tokens = self._duration_outputs or None

    @property
    def heads(self) -> tuple[str, ...]:
        """See Recognizer; a new output layer comes with a new prediction network and a new projection."""
        return DECODER_PARTS if self.new_head else DECODER_PARTS[-1:]

    def encode_text(self, text: str) -> Tensor:
        """See Recognizer."""
        return torch.tensor(self.token_ids(text), dtype=torch.int64)

    def label_problem(self, labels: Tensor) -> str | None:
        """See Recognizer; the blank is not a label either."""
        if bool((labels == self.blank).any()):
            return f"the blank as a label: {self.tokenizer.convert_ids_to_tokens(self.blank)!r} in the transcript"
        return super().label_problem(labels)

    def states(
        self, model: nn.Module, batch: dict[str, Any], labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The joint network's inputs.

        Returns:
            The encoder's states [B, T', H], the prediction network's [B, U+1, H], and frames of each utterance [B].
        """
        arguments = self.inputs.arguments(batch, next(model.parameters()).dtype)
        with _without_logits(base_model(model).joint) as states:
            model(**arguments, decoder_input_ids=self._before(labels))
        return (
            states["encoder_hidden_states"].squeeze(2),
            states["decoder_hidden_states"].squeeze(1),
            self._own(batch),
        )

    def _own(self, batch: dict[str, Any]) -> Tensor:
        return self.frames(batch["attention_mask"].sum(dim=1))

    def _before(self, labels: Tensor) -> Tensor:
        """What the prediction network reads: the blank, then the labels [B, U]; the blank for what is no class."""
        known = (labels >= 0) & (labels < self.classes)
        return nn.functional.pad(labels.masked_fill(~known, self.blank), (1, 0), value=self.blank)

    def outputs(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """See Recognizer; the encoder's states."""
        encoder, _, frames = self.states(model, batch, batch_labels(batch))
        return encoder, frames

    def _losses(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """−ln p(y | x) in nats of each utterance; see `dpkernels.losses.transducer_loss_per_example`."""
        labels = batch["labels"]
        losses = self._loss(model, *self.states(model, batch, labels), labels)
        learnt = (labels != IGNORED).any(dim=1)
        return torch.where(learnt, losses, torch.zeros_like(losses))

    def _loss(
        self, model: nn.Module, encoder: Tensor, predictor: Tensor, frames: Tensor, labels: Tensor
    ) -> Tensor:
        return transducer_loss_per_example(
            output_layer(model),
            encoder,
            predictor,
            frames,
            labels,
            blank=self.blank,
            durations=self.durations,
            activation=self.activation,
        )

    def _decode(self, batch: dict[str, Any]) -> list[str]:
        return [self.text_of([label for _, label in row]) for row in self.emitted(batch)]

    def text_of(self, labels: Sequence[int]) -> str:
        """The text of labels, repeats kept."""
        # Without this some tokenizers collapse repeats, as for CTC.
        text = self.tokenizer.decode(list(labels), group_tokens=False, skip_special_tokens=True)
        return str(text).strip()

    def emitted(self, batch: dict[str, Any]) -> list[list[tuple[int, int]]]:
        """(frame, label) of each label that greedy decoding emits, for each utterance of a batch."""
        arguments = self.inputs.arguments(batch, next(self.model.parameters()).dtype)
        frames = self._own(batch)
        generation = GenerationConfig(
            decoder_start_token_id=self.blank,
            pad_token_id=self.blank,
            # generate() takes the likeliest of all outputs for the token, and the last ones are durations
            suppress_tokens=self._duration_outputs or None,
            max_new_tokens=max(1, self.base.max_symbols_per_step * int(frames.max())),
            do_sample=False,
            num_beams=1,
        )
        found = self.base.generate(**arguments, generation_config=generation)
        places = (found.durations.cumsum(1) - found.durations).tolist()
        # An utterance that has ended goes on, on padded frames, until all have: what it emits there is left out.
        return [
            [(t, label) for t, label in zip(row, ids, strict=True) if t < n and label != self.blank]
            for row, ids, n in zip(places, found.sequences.tolist(), frames.tolist(), strict=True)
        ]

    @property
    def _duration_outputs(self) -> list[int]:
        return list(range(self.classes, self.classes + len(self.durations)))

    def _scores(self, batch: dict[str, Any], texts: Sequence[str]) -> Tensor:
        arguments = self.inputs.arguments(batch, next(self.model.parameters()).dtype)
        encoder, frames = self.base.get_audio_features(**arguments).pooler_output, self._own(batch)
        columns = []
        for text in texts:
            labels = self.encode_text(self.target_prefix + text).to(encoder.device)[None]
            predictor = self.base.decoder(self._before(labels)).expand(len(encoder), -1, -1)
            columns.append(
                -self._loss(self.model, encoder, predictor, frames, labels.expand(len(encoder), -1))
            )
        return torch.stack(columns, dim=1)

    def length(self, utterance: Utterance) -> int:
        """Output frames."""
        return self.output_frames(utterance)

    def text_problem(self, utterance: Utterance) -> str | None:
        """See Recognizer."""
        labels = self.encode_text(self.target_prefix + utterance.text)
        if len(labels) == 0:
            return "no transcript left after tokenisation"
        problem = self.label_problem(labels) or self.unknown_words(utterance.text)
        frames = self.output_frames(utterance)
        if problem is None and not alignable(frames, len(labels), self.durations):
            return f"no alignment: {len(labels)} labels of durations {list(self.durations)} do not fill {frames} frames"
        return problem

    def describe(self) -> dict[str, Any]:
        """See Recognizer; with the blank's class and a TDT's durations."""
        return {**super().describe(), "blank": self.blank, "durations": list(self.durations)}


def batch_labels(batch: dict[str, Any]) -> Tensor:
    """The labels of a batch, [B, 0] where it has none."""
    mask: Tensor = batch["attention_mask"]
    labels: Tensor = batch.get("labels", mask.new_zeros(len(mask), 0, dtype=torch.int64))
    return labels


def output_layer(model: nn.Module) -> nn.Linear:
    """The joint network's output layer; of a new one beside adapters, PEFT's trained copy while adapters are on."""
    head: Any = base_model(model).joint.head
    if hasattr(head, "modules_to_save"):
        adapted = head.modules_to_save
        head = head.original_module if head.disable_adapters else adapted[head.active_adapters[0]]
    return head


@contextmanager
def _without_logits(joint: Any) -> Iterator[dict[str, Tensor]]:
    """Within it the joint network makes no logits; its last arguments are in the dictionary.

    The model's own forward runs otherwise, so that everything that is attached to it (hooks, gathered weights) runs.
    """
    states: dict[str, Tensor] = {}

    def keep(**arguments: Tensor) -> Tensor:
        states.update(arguments)
        return arguments["encoder_hidden_states"][..., :0]

    joint.forward = keep
    try:
        yield states
    finally:
        del joint.forward


def alignable(frames: int, labels: int, durations: Sequence[int]) -> bool:
    """Whether so many labels, each of one of the durations, and then at least one blank fill the frames exactly.

    An RNN-T has no durations: one frame and more are enough.
    """
    if not durations:
        return frames > 0
    inside = (1 << (frames + 1)) - 1
    reached = 1  # bit t: whether t frames can be filled
    for _ in range(labels):
        reached = _moved(reached, durations) & inside
    blanks = [duration for duration in durations if duration > 0]
    while reached:
        reached = _moved(reached, blanks) & inside
        if reached >> frames:
            return True
    return False


def _moved(reached: int, durations: Sequence[int]) -> int:
    total = 0
    for duration in durations:
        total |= reached << duration
    return total


def load_transducer(config: ModelConfig, architecture: Any, options: dict[str, Any]) -> TransducerRecognizer:
    """The recogniser of a transducer's checkpoint; see `asr_finetune.models.kinds.Kind.load`.

    A new output layer (`model.new_head`) is a new decoder: prediction network, projection and output layer.
    """
    refuse_whisper_options(config, "transducer")
    _check_options(config, architecture)
    processor = _processor(config, architecture)
    if config.vocabulary == "characters":
        architecture.vocab_size = classes_needed(processor.tokenizer)
        set_blank(architecture, processor.tokenizer.pad_token_id)
    tdt = architecture.model_type in auto.MODEL_FOR_TDT_MAPPING_NAMES
    names = auto.MODEL_FOR_TDT_MAPPING_NAMES if tdt else auto.MODEL_FOR_RNNT_MAPPING_NAMES
    model_class = getattr(transformers, names[architecture.model_type])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a public seed of a new decoder's initialisation
        model, info = read(
            model_class,
            config,
            config=architecture,
            attn_implementation=attention(model_class),
            **LOAD,
        )
        check_weights(config.name, model, info, head=DECODER_PARTS, new_head=config.new_head)
        if config.new_head:
            renew_decoder(model)
    check_tokenizer(config.name, processor.tokenizer, architecture.vocab_size)
    check_blank(config.name, processor.tokenizer, architecture)
    recognizer = TransducerRecognizer(
        placed(model, config),
        processor,
        **options,
        new_head=config.new_head,
        vocabulary=config.vocabulary,
    )
    examine(recognizer)
    return recognizer


def renew_decoder(model: Any) -> None:
    """Initialise prediction network, projection and output layer anew, as torch initialises such layers."""
    for part in DECODER_PARTS:
        for module in model.get_submodule(part).modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()


def _check_options(config: ModelConfig, architecture: Any) -> None:
    if architecture.hidden_act not in ("relu", "tanh"):
        raise ConfigError(
            f"model.name={config.name!r}: its joint network has the activation {architecture.hidden_act!r}; the "
            "transducer loss has relu and tanh: use a model with one of these"
        )
    if config.target_lang is not None:
        raise ConfigError(
            f"model.target_lang={config.target_lang!r} is for CTC models with an adapter for each language (MMS): "
            "leave it null"
        )
    if config.shard:
        raise ConfigError(
            "model.shard=true: a transducer's loss reads the joint network's output layer outside of the model's "
            "forward, where weights in parts are not gathered: set it to false"
        )
    if config.new_head != (config.vocabulary in ("own", "characters")) or config.vocabulary == "words":
        raise ConfigError(
            f"model.new_head={config.new_head} with model.vocabulary={config.vocabulary}: a new decoder needs a "
            "vocabulary, and the old one must keep its own: set new_head true and vocabulary own (the checkpoint's) or "
            "characters, or neither"
        )
    if config.alphabet is not None and config.vocabulary != "characters":
        raise ConfigError(
            f"model.alphabet={config.alphabet!r} with model.vocabulary={config.vocabulary}: an alphabet is that of a "
            "new decoder: set new_head true and vocabulary characters, or leave it null"
        )


def _processor(config: ModelConfig, architecture: Any) -> Any:
    """The checkpoint's processor, or its feature extractor with a new tokenizer for characters."""
    if config.vocabulary != "characters":
        return read(transformers.AutoProcessor, config)
    extractor = read(transformers.AutoFeatureExtractor, config)
    tokenizer = ctc_tokenizer(read_alphabet(config.alphabet), "characters")
    return processor_class(architecture.model_type)(extractor, tokenizer)
