"""Losses [B] of the models of transformers, from their logits: one loss for each example.

transformers' own losses average over all targets of a batch. One more example then changes the weight of every other
one, so that no clipping norm bounds what it changes. Here each example is averaged over its own targets only.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.trainer_utils import unwrap_peft_model

from dpkernels.errors import UserError
from dpkernels.losses import IGNORED, cross_entropy_per_example, ctc_loss_per_example

logger = logging.getLogger("dpkernels")

# transformers' tables by kind. The first counts: Bart is in the table of masked models, too.
_TABLES = {
    "seq2seq": ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ"),
    "causal": ("CAUSAL_LM",),
    "masked": ("MASKED_LM",),
    "sequence": ("SEQUENCE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "IMAGE_CLASSIFICATION"),
    "token": ("TOKEN_CLASSIFICATION",),
    "ctc": ("CTC",),
}
_FIX = (
    "give compute_loss_per_example=, a function (model, inputs) -> losses [B] with one loss for each example"
)
_EXAMPLES_READ = 8
"""How many examples are read to find one whose loss the model itself can compute."""


class TrainerError(UserError, ValueError):
    """A Trainer's argument, data collator or loss cannot be private; the message has the reason and the fix."""


def losses_per_example(
    model: nn.Module, inputs: Mapping[str, Any], *, label_smoothing: float = 0.0
) -> Tensor:
    """The losses [B] of a batch with labels, from the model's logits, each averaged over the example's own targets.

    The kinds of models are those of transformers' AutoModelFor... tables: causal and masked language models,
    sequence-to-sequence models (Whisper, T5, BART), classifiers of sequences (texts, images, audio; also regression and
    several labels) and of tokens, and CTC. For a batch of one example the loss is the model's own.

    Args:
        model: of transformers, PEFT's adapters included.
        inputs: the model's arguments, `labels` among them: `[B, T]`, padded with −100; `[B]` or `[B, V]` for
            classifiers of sequences.
        label_smoothing: s of `dpkernels.losses.cross_entropy_per_example`.

    Raises:
        TrainerError: no loss is known for the model, the inputs have no labels, or smoothing for a loss without
            classes.
    """
    base = unwrap_peft_model(model)
    kind = _kind_of(base)
    if kind is None:
        raise TrainerError(
            f"model={type(base).__name__}: no loss for each example is known for this class (known: causal, masked and "
            f"sequence-to-sequence language models, classifiers of sequences and tokens, CTC); {_FIX}"
        )
    if inputs.get("labels") is None:
        raise TrainerError(
            f"the batch has no labels, but {sorted(inputs)}: add them in the data collator, or {_FIX}"
        )
    labels = inputs["labels"]
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    if kind == "seq2seq" and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = _decoder_inputs(base, labels)
    logits = model(**inputs).logits
    if kind == "ctc":
        _check_smoothing(label_smoothing, "CTC")
        return _ctc_losses(base, inputs, logits, labels)
    if kind == "sequence":
        return _classifier_losses(base, logits, labels, label_smoothing)
    if kind == "causal":
        # PEFT's virtual tokens stand before those of the batch, and have no labels.
        labels = F.pad(labels, (logits.shape[1] - labels.shape[1], 0), value=IGNORED)
        logits, labels = logits[:, :-1], labels[:, 1:]
    return cross_entropy_per_example(logits, labels, label_smoothing=label_smoothing)


def _kind_of(base: nn.Module) -> str | None:
    for kind, tables in _TABLES.items():
        for table in tables:
            for names in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").values():
                if type(base).__name__ in ([names] if isinstance(names, str) else names):
                    return kind
    return None


def _decoder_inputs(base: Any, labels: Tensor) -> Tensor:
    """The labels, one to the right, behind the decoder's first token."""
    if hasattr(base, "prepare_decoder_input_ids_from_labels"):
        ids: Tensor = base.prepare_decoder_input_ids_from_labels(labels=labels)
        return ids
    first = torch.full_like(labels[:, :1], base.config.decoder_start_token_id)
    shifted = torch.cat([first, labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == IGNORED, base.config.pad_token_id)


def _classifier_losses(base: Any, logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """The three losses of transformers' classifiers of sequences, by `config.problem_type` or as they guess it."""
    problem, classes = base.config.problem_type, base.config.num_labels
    if problem is None:
        whole = not labels.is_floating_point() and labels.dim() < 2
        problem = (
            "regression"
            if classes == 1
            else "single_label_classification"
            if whole
            else "multi_label_classification"
        )
    if problem == "single_label_classification":
        return cross_entropy_per_example(logits, labels, label_smoothing=label_smoothing)
    _check_smoothing(label_smoothing, problem)
    targets = labels.reshape(logits.shape).to(torch.float32)
    entries = (
        (logits.float() - targets).square()
        if problem == "regression"
        else F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none")
    )
    return entries.mean(dim=1)


def _ctc_losses(base: Any, inputs: Mapping[str, Any], logits: Tensor, labels: Tensor) -> Tensor:
    config, mask = base.config, inputs.get("attention_mask")
    frames = torch.full_like(labels[:, 0], logits.shape[1])
    if mask is not None:
        name = "_get_subsampling_output_length"
        of_encoder = getattr(base, name, None) or base._get_feat_extract_output_lengths
        frames = of_encoder(mask.sum(dim=-1)).long()
    # transformers takes every negative label for padding.
    losses = ctc_loss_per_example(
        logits, frames, labels.masked_fill(labels < 0, IGNORED), int(config.pad_token_id)
    )
    if getattr(config, "ctc_loss_reduction", "sum") == "mean":
        losses = losses / (labels >= 0).sum(dim=1).clamp(min=1)
    return losses


def _check_smoothing(label_smoothing: float, loss: str) -> None:
    if label_smoothing:
        raise TrainerError(
            f"label_smoothing_factor={label_smoothing} has no meaning for the loss {loss}: leave it out"
        )


def check_losses(model: nn.Module, losses_of: Any, batches_of: Any, *, own: bool) -> None:
    """Check that a data collator and a loss have one row for each example, and that a known loss is the model's.

    Args:
        model: the model, which is in evaluation mode within the check.
        losses_of: (model, batch) -> losses.
        batches_of: number of examples and first example -> a collated batch, or None beyond the data set.
        own: whether to compare the loss of one example with the loss that the model itself computes. The model may add
            terms (a router's), or shift labels in another way, that `losses_per_example` does not know.

    Raises:
        TrainerError: another number of losses than examples, or another loss than the model's.
    """
    training = model.training
    try:
        with torch.no_grad():
            model.eval()
            pair = batches_of(2, 0)
            losses = losses_of(model, pair)
            if not isinstance(losses, Tensor) or losses.shape != (2,):
                shape = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
                raise TrainerError(
                    f"the loss of a batch of 2 examples has shape {shape}, not [2]: a data_collator must return one "
                    "row for each example (no packing or flattening: pad instead), and compute_loss_per_example one "
                    "loss for each row, not their mean"
                )
            if own:
                _check_own_loss(model, losses_of, batches_of)
    finally:
        model.train(training)


def _check_own_loss(model: nn.Module, losses_of: Any, batches_of: Any) -> None:
    for first in range(_EXAMPLES_READ):
        batch = batches_of(1, first)
        if batch is None:
            break
        theirs, ours = float(model(**batch).loss), float(losses_of(model, batch))
        if not (math.isfinite(theirs) and math.isfinite(ours)):  # without targets the model's mean is NaN
            continue
        half = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
        if not math.isclose(theirs, ours, rel_tol=3e-2 if half else 1e-3, abs_tol=1e-4):
            raise TrainerError(
                f"model={type(unwrap_peft_model(model)).__name__}: for one example the model computes another loss "
                "than losses_per_example does. It adds a term, shifts its labels in another way, or divides by "
                f"another count; {_FIX}"
            )
        return
    logger.warning(
        "losses_per_example could not be compared with the model's own loss: none of the first %d examples has a "
        "finite one. Are their labels all -100?",
        _EXAMPLES_READ,
    )
