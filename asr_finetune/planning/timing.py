"""The time and memory of a run on this machine, measured on a few private micro-batches of noise."""

from __future__ import annotations

import warnings
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from asr_finetune.config.schema import Config
from asr_finetune.config.values import as_config_error
from asr_finetune.console import Reporter
from asr_finetune.data.corpus import Corpus
from asr_finetune.models.methods import apply_method
from asr_finetune.models.recognizer import Recognizer, to_device, total_parameters, trained_parameters
from asr_finetune.planning.workload import Speech, typical_speech
from asr_finetune.training.sampling import expected_utterances
from asr_finetune.training.setup import make_optimizer, prepare_blocks
from dpkernels import PrivacyEngine
from dpkernels.memory import measure_step

MICRO_BATCHES = 3


@dataclass(frozen=True)
class Probe:
    """The result of a short measurement on this machine. Bytes and seconds.

    Attributes:
        device: the device of the measurement.
        seconds_of_audio: length of the synthetic utterances that were timed.
        longest_seconds: length of those that memory was measured with.
        physical_batch_size: utterances in a micro-batch.
        seconds_per_example: forward and private backward, per utterance.
        seconds_per_step: noise and optimizer, once a logical step.
        steps: number of logical steps.
        utterances: expected number of utterances in a step.
        parameters: bytes of the weights.
        optimizer: bytes of the optimizer's state.
        sums: bytes of the float64 sums of clipped gradients.
        peak: highest memory with a micro-batch of the longest utterances: of the process (CPU), or allocated
            on the GPU.
        trained_parameters: number of trained values.
        total_parameters: number of all values.
    """

    device: str
    seconds_of_audio: float
    longest_seconds: float
    physical_batch_size: int
    seconds_per_example: float
    seconds_per_step: float
    steps: int
    utterances: float
    parameters: int
    optimizer: int
    sums: int
    peak: int
    trained_parameters: int
    total_parameters: int

    def total_seconds(self, devices: int = 1) -> float:
        """Seconds of all steps on so many devices like this one: each has its part of every step's utterances, and of
        the noise and the optimizer. Reading audio and making features, the self-check, evaluations, checkpoints, and
        with several devices the exchange of gradients are not included."""
        return self.steps * (self.utterances * self.seconds_per_example + self.seconds_per_step) / devices

    def sent_per_step(self, devices: int) -> float:
        """Bytes that each of several devices sends in a step: its sums but its own part of them, 8 bytes an entry, and
        its part of the parameters to each of the others, in float32."""
        return (devices - 1) / devices * (self.sums + 4 * self.trained_parameters)


@as_config_error()
def probe(
    config: Config, recognizer: Recognizer, corpus: Corpus | None = None, *, seconds: float | None = None
) -> Probe:
    """Measure the time and memory of a few private micro-batches of noise with this model.

    The audio is synthetic, as long as the training data's mean (for memory, as its longest); no recording is read.

    Args:
        config: method, batch sizes, optimizer. `privacy` may be incomplete; σ = 1 here.
        recognizer: the model; the method is applied to it.
        corpus: the source of the lengths; None: `seconds`.
        seconds: length of the utterances without a corpus; None: `workload.TYPICAL_SECONDS`, or the model's window if
            that is shorter.

    Raises:
        ConfigError: `seconds` is above the model's window.
        ValueError: the method or a layer cannot be trained.
    """
    speech = typical_speech(recognizer, corpus, seconds)
    apply_method(recognizer, config.method)
    model = recognizer.model.train()
    prepare_blocks(config.train, recognizer, Reporter(False))
    width = min(config.train.physical_batch_size, config.train.batch_size)
    device = next(model.parameters()).device
    optimizer = make_optimizer(config.train, model)
    dataset = _Synthetic(recognizer, speech, width)
    engine = PrivacyEngine()
    with closing(engine):
        # q = 1: the one logical batch is the whole set, so the number of micro-batches is known.
        _, private, loader = engine.make_private(
            module=model,
            optimizer=optimizer,
            data_loader=torch.utils.data.DataLoader(
                dataset, batch_size=len(dataset), collate_fn=recognizer.collate
            ),
            noise_multiplier=1.0,
            max_grad_norm=config.privacy.max_grad_norm,
            strategy=config.privacy.strategy,
            physical_batch_size=width,
            steps=1,
            lengths=dataset.order,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="no self_check")  # the data is noise
            losses = partial(_losses, recognizer)
            taken = measure_step(private, next(iter(loader)), losses, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # The first micro-batch is the longest's, the second warms up the ordinary length.
    per_example = float(np.median(taken.micro_batches[2:])) / width
    return Probe(
        device=str(device),
        seconds_of_audio=speech.mean,
        longest_seconds=speech.longest,
        physical_batch_size=width,
        seconds_per_example=per_example,
        seconds_per_step=taken.step,
        steps=config.train.steps,
        utterances=expected_utterances(config, corpus),
        parameters=sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        optimizer=taken.optimizer,
        sums=sum(8 * parameter.numel() for parameter in trained),
        peak=taken.peak,
        trained_parameters=trained_parameters(model),
        total_parameters=total_parameters(model),
    )


def _losses(recognizer: Recognizer, batch: dict[str, Any]) -> torch.Tensor:
    return recognizer.loss_per_example(recognizer.model, to_device(batch, recognizer.device))


class _Synthetic(torch.utils.data.Dataset[dict[str, Any]]):
    """A micro-batch of the longest utterances, then some of the mean length: noise, made-up transcripts."""

    def __init__(self, recognizer: Recognizer, speech: Speech, width: int) -> None:
        self._kinds = [speech.item(recognizer, seconds) for seconds in (speech.longest, speech.mean)]
        self._width = width
        # The loader sorts by these, longest first: the first micro-batch sets the peak memory.
        self.order = [2] * width + [1] * (width * (MICRO_BATCHES + 1))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self._kinds[0 if index < self._width else 1], "index": index}
