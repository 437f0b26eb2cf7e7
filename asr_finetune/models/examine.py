"""Measurements on a loaded model, with noise in place of speech: output lengths, the effect of padding, unused layers.

They replace a list of model types. A model whose output lengths are not those that it states is refused. A model whose
outputs for an utterance depend on the padding behind it gets batches of equal lengths only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from asr_finetune.config.values import ConfigError
from asr_finetune.models.inputs import noise
from asr_finetune.models.recognizer import Recognizer, to_device
from dpkernels.precision import arithmetic

# Odd and even numbers of frames, which models that pool frames in pairs treat differently.
SECONDS = (0.70, 0.72, 0.79, 1.50)
# Float32's rounding is below 1e-5 of a frame's norm here. Padding that is not masked changes the frames next to it by
# 1e-2 and more. What is smaller is left to the self-check before training, which compares gradients.
_CHANGED = 1e-3


@torch.no_grad()
def examine(recognizer: Recognizer) -> None:
    """Set `equal_lengths_only` and `unused_layers` of a recogniser as it was loaded.

    Raises:
        ConfigError: the outputs have other lengths than the model states.
    """
    rate = recognizer.sampling_rate
    items = [recognizer.encode_audio(noise(round(seconds * rate))) for seconds in SECONDS]
    with arithmetic(torch.float32, recognizer.device):
        alone = [_outputs(recognizer, [item])[0] for item in items]
        together = _outputs(recognizer, items)
    labelled = {**items[0], "labels": torch.zeros(1, dtype=torch.int64)}
    with _calls(recognizer.base) as called:
        recognizer.loss_per_example(recognizer.model, recognizer.collate([labelled]))
    layers = {name for name, module in recognizer.base.named_modules() if _is_layer(module)}
    recognizer.unused_layers = frozenset(layers - called) - recognizer.read_layers
    if any(_difference(padded, own) > _CHANGED for padded, own in zip(together, alone, strict=True)):
        recognizer.equal_lengths_only = _reason(recognizer)


def _outputs(recognizer: Recognizer, items: list[dict[str, Tensor]]) -> list[Tensor]:
    """The outputs [T, ...] of each utterance's own frames."""
    batch = to_device(recognizer.collate(items), recognizer.device)
    outputs, lengths = recognizer.outputs(recognizer.model, batch)
    if int(lengths.max()) != outputs.shape[1]:
        raise ConfigError(
            f"model.name={recognizer.name!r}: {type(recognizer.base).__name__} gives {outputs.shape[1]} frames, and "
            f"states {int(lengths.max())} for this length: losses would miss frames or read padding; use another model"
        )
    return [row[:length] for row, length in zip(outputs, lengths.tolist(), strict=True)]


def _difference(outputs: Tensor, expected: Tensor) -> float:
    """The largest change of a frame, relative to the root mean square of the frames' norms."""
    scale = expected.flatten(1).norm(dim=1).square().mean().sqrt()
    return float((outputs - expected).flatten(1).norm(dim=1).max() / scale)


def _reason(recognizer: Recognizer) -> str:
    if getattr(recognizer.base.config, "feat_extract_norm", "") == "group":
        return 'feat_extract_norm="group" normalises over the padded length'
    return f"padding changes what {type(recognizer.base).__name__} computes of an utterance"


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)


@contextmanager
def _calls(model: nn.Module) -> Iterator[set[str]]:
    """The names of the layers that are called within it."""
    called: set[str] = set()
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if _is_layer(module):
                hook = module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
                stack.callback(hook.remove)
        yield called
