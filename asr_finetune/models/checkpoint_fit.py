"""What must hold of a checkpoint before anything is computed with it: its weights are there, its tokenizer fits.

Whatever transformers or PEFT do not find in a file they initialise at random, with a warning. Such a weight would be
used for every utterance and, where it is frozen, saved nowhere: two loads would be two models. A tokenizer with more
tokens than the output layer has classes gives labels that no class stands for. Both are refused here, by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import peft
from torch import nn

from asr_finetune.config.schema import ConfigError

_SHOWN = 3
# Never read here: the model's own masks and its batch norms' training mode are switched off.
_UNUSED = ("masked_spec_embed", "num_batches_tracked")
_STATISTICS = ("running_mean", "running_var")
_NEW_HEAD = (
    "set model.new_head=true and model.vocabulary=own (its tokenizer's tokens) or characters: the new output layer is "
    "then trained along with any method, and saved"
)


def check_weights(
    name: str, model: nn.Module, info: Mapping[str, Any], *, head: str, new_head: bool, constants: str = ""
) -> None:
    """Whether every weight that the model computes with came from the checkpoint.

    Args:
        name: of the checkpoint.
        model: as transformers loaded it.
        info: transformers' `output_loading_info`.
        head: name of the output layer.
        new_head: the output layer is to be a new one.
        constants: ending of a parameter that transformers computes where it is not there, or "".

    Raises:
        ConfigError: weights are missing, or of another shape than the configuration says.
    """
    parameters = {key for key, _ in model.named_parameters()}

    def matters(key: str) -> bool:
        # Buffers but for statistics are constants that the model's constructor computes.
        kept = key in parameters or key.endswith(_STATISTICS)
        return kept and not key.endswith(_UNUSED) and not (new_head and key.startswith(f"{head}."))

    missing = {key for key in info["missing_keys"] if matters(key)}
    missing = {key for key in missing if not (constants and key.endswith(constants))}
    shapes = {
        key: (tuple(found), tuple(wanted)) for key, found, wanted in info["mismatched_keys"] if matters(key)
    }
    faults = []
    if missing:
        faults.append(f"it has no weights for {_some(missing)}")
    if shapes:
        first = min(shapes)
        faults.append(
            f"{_some(shapes)} has the shape {list(shapes[first][0])} where its configuration wants "
            f"{list(shapes[first][1])}"
        )
    if not faults:
        return
    of_the_head = all(key.startswith(f"{head}.") for key in missing | shapes.keys())
    fix = (
        _NEW_HEAD if of_the_head and head != "proj_out" else "give a complete checkpoint of this architecture"
    )
    raise ConfigError(
        f"model.name={name!r}: {' and '.join(faults)}; transformers would start them at random: {fix}"
    )


def classes_needed(tokenizer: Any) -> int:
    """The least number of classes with which every token that a text can hold has one.

    The tokens that begin and end a sentence are in no label here, and may lie beyond.
    """
    unlabelled = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    unlabelled -= {tokenizer.unk_token_id, tokenizer.pad_token_id, _delimiter(tokenizer)}
    return 1 + max(id for id in tokenizer.get_vocab().values() if id not in unlabelled)


def check_tokenizer(name: str, tokenizer: Any, classes: int, *, fix: str = _NEW_HEAD) -> None:
    """Whether every token that a text can hold has a class.

    Args:
        name: of the checkpoint.
        tokenizer: its tokenizer.
        classes: of the output layer.
        fix: what to do where there are too few.

    Raises:
        ConfigError: the tokenizer has tokens beyond the classes; the message names them.
    """
    needed = classes_needed(tokenizer)
    if needed > classes:
        beyond = [token for token, id in tokenizer.get_vocab().items() if classes <= id < needed]
        raise ConfigError(
            f"model.name={name!r}: its tokenizer has tokens up to {needed - 1}, but its output layer has {classes} "
            f"classes: none for {_some(map(repr, beyond))}; give the tokenizer that it was trained with, or {fix}"
        )


def check_blank(name: str, tokenizer: Any, classes: int, blank: int | None) -> None:
    """Whether the CTC blank, the configuration's padding token, is a class, and no token of a text.

    Raises:
        ConfigError: it is not.
    """
    stands = f"model.name={name!r}: pad_token_id={blank} in its config.json is to be the CTC blank, but "
    if blank is None or not 0 <= blank < classes:
        raise ConfigError(
            f"{stands}the output layer has the classes 0 to {classes - 1}: set it to the class of the blank"
        )
    if blank != tokenizer.pad_token_id and blank in tokenizer.get_vocab().values():
        raise ConfigError(
            f"{stands}its tokenizer has {tokenizer.convert_ids_to_tokens(blank)!r} there and the padding "
            f"{tokenizer.pad_token!r} at {tokenizer.pad_token_id}: make them agree"
        )


def check_adapter(model: Any, folder: Path) -> None:
    """Whether a loaded adapter's file has every weight that PEFT put into the model, and no other.

    Raises:
        ConfigError: it has not; the message names the weights.
    """
    # PEFT would take a new output layer for resized token embeddings, which a CTC model has none of.
    expected = peft.get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    found = peft.load_peft_weights(str(folder), device="cpu").keys()
    missing, unknown = expected - found, found - expected
    if missing or unknown:
        faults = [f"lacks {_some(missing)}"] if missing else []
        faults += [f"has {_some(unknown)}, which the model has no place for"] if unknown else []
        raise ConfigError(
            f"adapter {folder}: its file {' and '.join(faults)}; PEFT would go on without: give the whole adapter, and "
            "the base model that it was trained on"
        )


def _delimiter(tokenizer: Any) -> int | None:
    return getattr(tokenizer, "word_delimiter_token_id", None)


def _some(names: Iterable[str]) -> str:
    """The first of some names, and how many more there are."""
    listed = sorted(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more
