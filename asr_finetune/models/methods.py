"""The trained parameters: all, adapters, biases, or the output layer::

    full     every parameter that has a norm rule: not those under weight norm (Wav2Vec2's positions), and not those of
             modules that read the weights of layers in place of calling them (WavLM's attention)
    lora     PEFT's LoRA on the linear layers of attention and feed-forward (Whisper: q_proj and v_proj), or on any
             choice of linear layers and pointwise convolutions that `method.targets` names
    bitfit   the biases of linear and convolution layers; those of norms stay frozen
    dp_rp    LoRA whose factor A stays at its random start: half the trained parameters
    head     the output layer

A freshly initialised output layer is always trained as well, an old one if `method.train_head` is set.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import parametrize

import dpkernels.nn
from asr_finetune.config.schema import ADAPTER_METHODS, ConfigError, MethodConfig
from asr_finetune.models.architecture import HEADS
from asr_finetune.models.quiet import PEFT_ASKS_BY_AN_OLD_NAME, without_warnings
from asr_finetune.models.recognizer import (
    KindName,
    Recognizer,
    switch_off_shared_randomness,
    trained_parameters,
)
from dpkernels.precision import hold_frozen

# Whisper's sinusoids are constants; the embedding of the model's own masks is unused, since these are switched off.
_NEVER_TRAINED = ("encoder.embed_positions.weight", "masked_spec_embed")
# The names of linear layers of attention and feed-forward blocks. SEW-D's query_proj and key_proj also project relative
# positions, which examples share, so that they have no gradient of an example.
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "value_proj")
_CONFORMER_ATTENTION = ("linear_q", "linear_k", "linear_v", "linear_out")
_OF_EVERY_LAYER = ("full", "bitfit")
_FEED_FORWARD = ("intermediate_dense", "output_dense", "linear1", "linear2", "dense")
_DEFAULT_TARGETS: dict[KindName, tuple[str, ...]] = {
    "ctc": (*_ATTENTION, *_CONFORMER_ATTENTION, *_FEED_FORWARD),
    "transducer": (*_ATTENTION, *_CONFORMER_ATTENTION, *_FEED_FORWARD),
    "seq2seq": ("q_proj", "v_proj", "query", "value"),
}


def apply_method(recognizer: Recognizer, method: MethodConfig) -> None:
    """Choose the trained parameters, in place.

    This also freezes the statistics of batch norms, converts frozen parameters to the recogniser's dtype, and switches
    off LayerDrop and the model's own masks. Adapters are initialised from torch's generator: seed it (publicly)
    beforehand to repeat a run's start.

    Raises:
        ConfigError: the model does not have these layers or targets, or a method was applied before.
    """
    model = recognizer.base
    adapter = recognizer.model if recognizer.model is not model else None
    if adapter is not None:
        if any(parameter.requires_grad for name, parameter in adapter.named_parameters() if "lora_" in name):
            raise ConfigError(
                f"method.kind={method.kind}: {recognizer.name} has an adapter already, of a method that was applied to "
                "it; load it anew"
            )
        _check_same_adapter(recognizer, method)
    if method.layers == "decoder" and recognizer.kind == "ctc":
        raise ConfigError("method.layers=decoder: a CTC model has no decoder: use all or encoder")
    if method.train_head and recognizer.kind == "seq2seq":
        raise ConfigError(
            "method.train_head: a sequence-to-sequence model's (Whisper's) output layer is its token table, which it "
            "reads without adapters: leave it false"
        )
    with_head = recognizer.new_head or method.train_head
    switch_off_shared_randomness(model)
    dpkernels.nn.freeze_batch_norm(model)
    trainable = _within(recognizer, method.layers)
    model.requires_grad_(False)
    if method.kind == "full":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(trainable) and not name.endswith(_NEVER_TRAINED))
    elif adapter is not None:
        _train_adapter(adapter, method)
    elif method.kind in ADAPTER_METHODS:
        recognizer.model = _with_lora(recognizer, method, trainable, recognizer.heads if with_head else ())
    elif method.kind == "bitfit":
        _train_biases(model, trainable)
    else:
        _train(model, recognizer.heads)
    for name in _parametrised(model) + (_reading(recognizer) if method.kind in _OF_EVERY_LAYER else []):
        model.get_submodule(name).requires_grad_(False)
    if with_head and method.kind in _OF_EVERY_LAYER:
        _train(model, recognizer.heads)
    if recognizer.dtype is not torch.float32:
        hold_frozen(recognizer.model, recognizer.dtype)
    if trained_parameters(recognizer.model) == 0:
        raise ConfigError(
            f"method.kind={method.kind}, layers={method.layers}: nothing is trained in {recognizer.name}"
        )


def left_out(recognizer: Recognizer, method: MethodConfig) -> list[str]:
    """The parts that a method of every layer (full, bitfit) leaves as they are, each with the reason.

    Layers' numbers are written `*`. Nothing for other methods, which choose their layers by name.
    """
    if method.kind not in _OF_EVERY_LAYER:
        return []
    trainable, lines = _within(recognizer, method.layers), []
    for names, reason in (
        (_parametrised(recognizer.base), "its weight is computed from others, by weight norm for example"),
        (_reading(recognizer), "it reads the weights of its layers, and does not call them"),
    ):
        patterns = Counter(
            re.sub(r"[.]\d+(?=[.]|$)", ".*", name) for name in names if name.startswith(trainable)
        )
        lines += [
            f"{pattern}{f' ({count} modules)' if count > 1 else ''}: {reason}"
            for pattern, count in sorted(patterns.items())
        ]
    return lines


def _parametrised(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if parametrize.is_parametrized(module)]


def _reading(recognizer: Recognizer) -> list[str]:
    """The modules around layers that no forward calls: they read these layers' weights."""
    return sorted({name.rpartition(".")[0] for name in recognizer.unused_layers})


def _check_same_adapter(recognizer: Recognizer, method: MethodConfig) -> None:
    """Check that the method is the one of the adapter that the recogniser was loaded with, which is trained on.

    Raises:
        ConfigError: it is not, or an adapter is no PEFT LoRA; the message has the fix.
    """
    (adapter,) = recognizer.model.peft_config.values()  # type: ignore[operator]
    kind, rank = str(adapter.peft_type).rpartition(".")[2].lower(), getattr(adapter, "r", None)
    given = {"rank": (method.rank, rank), "alpha": (method.alpha, getattr(adapter, "lora_alpha", None))}
    wrong = [
        f"method.{key}={value}, the adapter has {own}" for key, (value, own) in given.items() if value != own
    ]
    if kind != "lora" or method.kind not in ADAPTER_METHODS:
        wrong = [f"method.kind={method.kind}, the adapter is {kind}"]
    elif method.targets is not None or method.layers != "all":
        wrong.append("method.targets and method.layers: the adapter has its own")
    if wrong:
        raise ConfigError(
            f"model.name={recognizer.name!r} is an adapter, which is trained on as it is: {'; '.join(wrong)}. Set the "
            "method to the adapter's (targets null, layers all), or merge it first (`asr-finetune merge`)"
        )


def _train_adapter(adapted: nn.Module, method: MethodConfig) -> None:
    """Train an adapter's factors (of DP-RP the second one only), and the layers that were saved with it."""
    frozen = ("lora_A",) if method.kind == "dp_rp" else ()
    for name, parameter in adapted.named_parameters():
        if any(part in name for part in ("lora_", "modules_to_save")):
            parameter.requires_grad_(not any(part in name for part in frozen))


def _within(recognizer: Recognizer, layers: str) -> tuple[str, ...]:
    """Prefixes of the names of the parameters and modules that may be trained."""
    model = recognizer.base
    if layers == "all":
        return ("",)
    if recognizer.kind == "seq2seq":
        part = model.get_encoder() if layers == "encoder" else model.get_decoder()
        return tuple(f"{name}." for name, module in model.named_modules() if module is part)
    if recognizer.kind == "transducer":
        of_encoder = layers == "encoder"
        return tuple(f"{name}." for name, _ in model.named_children() if (name == "encoder") == of_encoder)
    return tuple(f"{name}." for name, _ in model.named_children() if name not in HEADS)


def _train(model: nn.Module, parts: Sequence[str]) -> None:
    for part in parts:
        model.get_submodule(part).requires_grad_(True)


def _train_biases(model: nn.Module, trainable: tuple[str, ...]) -> None:
    for name, module in model.named_modules():
        layer = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
        if layer and name.startswith(trainable) and module.bias is not None:
            module.bias.requires_grad_(True)
        if isinstance(module, nn.RNNBase) and name.startswith(trainable):
            for key, parameter in module.named_parameters():
                parameter.requires_grad_(key.startswith("bias"))


def _with_lora(
    recognizer: Recognizer, method: MethodConfig, trainable: tuple[str, ...], heads: Sequence[str]
) -> nn.Module:
    import peft

    model = recognizer.base
    targets = method.targets or _DEFAULT_TARGETS[recognizer.kind]
    chosen = _adapted(model, targets, trainable)
    unused = (recognizer.unused_layers | recognizer.read_layers).intersection(chosen)
    if unused and method.targets:
        raise ConfigError(
            f"method.targets={targets}: {min(unused)} is not called in the model's forward, which reads its weight, so "
            "that LoRA would change nothing: leave it out, or set targets to null"
        )
    chosen = [name for name in chosen if name not in unused]
    if not chosen:
        known = sorted(
            {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if _adaptable(module)}
        )
        raise ConfigError(
            f"method.targets={targets} with method.layers={method.layers}: no linear layer or pointwise "
            f"convolution of {recognizer.name} has a name with these endings; there: {', '.join(known)}"
        )
    new = next((name for name in chosen if name.startswith(tuple(heads))), None)
    if new is not None:
        raise ConfigError(
            f"method.targets={targets}: {new} is the output layer, which is trained without LoRA: leave it out"
        )
    configuration = peft.LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,  # type: ignore[arg-type]
        lora_dropout=method.dropout,
        target_modules=chosen,
        modules_to_save=list(heads) or None,
    )
    try:
        with without_warnings(PEFT_ASKS_BY_AN_OLD_NAME):
            adapted = peft.get_peft_model(model, configuration)
    except NotImplementedError as error:  # raised by transformers where PEFT asks for a model's embeddings
        raise ConfigError(
            f"method.kind={method.kind}: PEFT adds no adapters to {type(model).__name__}, and would load none: set it "
            f"to bitfit, head or full; transformers says: {str(error).splitlines()[0]}"
        ) from error
    base = str(getattr(model, "name_or_path", "") or "")
    if base and Path(base).is_dir():  # a relative path would be valid in the present working directory only
        configuration.base_model_name_or_path = str(Path(base).resolve())
    if method.kind == "dp_rp":
        for name, parameter in adapted.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
    return adapted


def _adapted(model: nn.Module, targets: Sequence[str], trainable: tuple[str, ...]) -> list[str]:
    """Names of the layers that get LoRA adapters.

    Raises:
        ConfigError: one of them is a convolution that LoRA does not support.
    """
    chosen = []
    for name, module in model.named_modules():
        matches = any(name == end or name.endswith(f".{end}") for end in targets)
        if not matches or not name.startswith(trainable):
            continue
        if _adaptable(module):
            chosen.append(name)
        elif isinstance(module, nn.Conv1d | nn.Conv2d):
            # Depthwise: PEFT needs a rank that the groups divide, and a channel has too few taps to gain from LoRA.
            # Parakeet's head: PEFT builds adapters with the layer's own class, whose arguments differ.
            raise ConfigError(
                f"method.targets={list(targets)}: {name} ({module}) is neither a linear layer nor a pointwise "
                "convolution (kernel 1, stride 1, groups 1), the layers that LoRA supports here: leave it out, or "
                "train it by method.kind=full, or as a new output layer"
            )
    return chosen


def _adaptable(module: nn.Module) -> bool:
    """Whether a layer can get LoRA: it is linear, or a convolution that is linear on the transposed layout."""
    if type(module) is nn.Conv1d:
        return module.kernel_size == module.stride == (1,) and module.groups == 1 and module.padding == (0,)
    return isinstance(module, nn.Linear)
