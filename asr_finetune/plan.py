"""Planning: the noise that a target ε needs, and what a run would take on this machine."""

from __future__ import annotations

import math
import resource
import sys
import time
import warnings
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from asr_finetune.config import Config, ConfigError
from asr_finetune.sampling import expected_utterances
from dpkernels.privacy import Sampling
from dpkernels.privacy import epsilon as epsilon_of
from dpkernels.privacy import noise_multiplier as sigma_for

if TYPE_CHECKING:
    from asr_finetune.corpus import Corpus
    from asr_finetune.recognizer import Recognizer

CHECKPOINTS = (0.1, 0.25, 0.5, 0.75, 1.0)
# LibriSpeech's mean: what a probe without data assumes.
TYPICAL_SECONDS = 12.3
TYPICAL_LABELS_PER_SECOND = 4.0
MICRO_BATCHES = 3


@dataclass(frozen=True)
class Plan:
    """What a run would spend.

    Attributes:
        units: N, number of privacy units.
        unit: what one of them is.
        epsilon: what the noise spends, by `accountant`.
        target_epsilon: the target; None when σ was given.
        delta: δ.
        batch_size: expected logical batch, in utterances; of speakers, its bound.
        per_unit: most utterances of one unit in a step.
        steps: logical steps.
        max_batch_size: capacity of truncated Poisson sampling, or None.
        accountant: "pld" or "rdp".
        noise_multiplier: σ by it (the one to train with).
        noise_multiplier_other: σ by the other accountant for the same target; None with truncated sampling or when
            σ was given.
        sample_rate: q: of utterances batch_size / N, of speakers batch_size / (per_unit · N).
        epochs: expected times that each unit is drawn, q × steps.
        epsilon_at: (step, ε) on the way.
        epsilon_other: ε at the end with `noise_multiplier` by the other accountant; None with truncated sampling.
    """

    units: int
    unit: str
    epsilon: float
    target_epsilon: float | None
    delta: float
    batch_size: int
    per_unit: int
    steps: int
    max_batch_size: int | None
    accountant: str
    noise_multiplier: float
    noise_multiplier_other: float | None
    sample_rate: float
    epochs: float
    epsilon_at: list[tuple[int, float]]
    epsilon_other: float | None

    @property
    def other(self) -> str:
        """The other accountant."""
        return {"pld": "RDP", "rdp": "PLD"}[self.accountant]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def plan(
    sampling: Sampling,
    *,
    delta: float,
    steps: int,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    accountant: Literal["pld", "rdp"] = "pld",
) -> Plan:
    """σ for a target ε (or ε for a given σ), by PLD and by RDP.

    Args:
        sampling: who is drawn, with what probability: `sampling.sampling_of` a run, or `sampling.assumed_sampling`.
        delta: δ in (0, 1).
        steps: logical steps.
        epsilon: target ε; or
        noise_multiplier: σ > 0. Exactly one of the two.
        accountant: the one that a run is held to.

    Raises:
        ValueError: an argument out of range, named.
    """
    if (epsilon is None) == (noise_multiplier is None):
        raise ConfigError(
            f"plan: give exactly one of --epsilon and --noise-multiplier, got {epsilon} and "
            f"{noise_multiplier}"
        )
    if noise_multiplier is not None and not noise_multiplier > 0:
        raise ConfigError(
            f"plan: --noise-multiplier {noise_multiplier} must be above 0: without noise epsilon is infinite"
        )
    rate, capacity, count = sampling.sample_rate, sampling.max_batch_size, sampling.units
    sampled: dict[str, Any] = {"max_batch_size": capacity, "dataset_size": count}
    other: Literal["pld", "rdp"] = "rdp" if accountant == "pld" else "pld"
    sigma_other = None
    if noise_multiplier is not None:
        sigma = noise_multiplier
    else:
        assert epsilon is not None
        sigma = sigma_for(epsilon, delta, rate, steps, accountant=accountant, **sampled)
        if capacity is None:
            sigma_other = sigma_for(epsilon, delta, rate, steps, accountant=other, dataset_size=count)
    marks = sorted({max(1, round(share * steps)) for share in CHECKPOINTS})
    curve = epsilon_of(sigma, rate, marks, delta, accountant=accountant, **sampled)
    by_other = None
    if capacity is None:
        by_other = epsilon_of(sigma, rate, steps, delta, accountant=other, dataset_size=count)
    return Plan(
        units=count,
        unit=sampling.unit,
        epsilon=curve[-1],
        target_epsilon=epsilon,
        delta=delta,
        batch_size=sampling.expected_batch_size,
        per_unit=sampling.per_unit,
        steps=steps,
        max_batch_size=capacity,
        accountant=accountant,
        noise_multiplier=sigma,
        noise_multiplier_other=sigma_other,
        sample_rate=rate,
        epochs=rate * steps,
        epsilon_at=list(zip(marks, curve, strict=True)),
        epsilon_other=by_other,
    )


@dataclass(frozen=True)
class Probe:
    """What a short measurement on this machine says about a run. Bytes and seconds.

    Attributes:
        device: where it ran.
        seconds_of_audio: length of the synthetic utterances that were timed.
        longest_seconds: length of those that memory was measured with.
        physical_batch_size: utterances in a micro-batch.
        seconds_per_example: forward and private backward, per utterance.
        seconds_per_step: noise and optimizer, once a logical step.
        total_seconds: utterances in a step × steps × seconds_per_example + steps × seconds_per_step; without reading
            audio and making features, the self-check, evaluations and checkpoints.
        parameters: bytes of the weights.
        optimizer: bytes of the optimizer's state.
        sums: bytes of the float64 sums of clipped gradients.
        peak: highest memory with a micro-batch of the longest utterances: of the process (CPU), or allocated
            on the GPU.
        trained_parameters: how many.
        total_parameters: how many.
    """

    device: str
    seconds_of_audio: float
    longest_seconds: float
    physical_batch_size: int
    seconds_per_example: float
    seconds_per_step: float
    total_seconds: float
    parameters: int
    optimizer: int
    sums: int
    peak: int
    trained_parameters: int
    total_parameters: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def probe(
    config: Config, recognizer: Recognizer, corpus: Corpus | None = None, *, seconds: float | None = None
) -> Probe:
    """Time a few private micro-batches of noise with this model, and see how much memory they take.

    The audio is synthetic, as long as the training data's mean (memory: as its longest): nothing is read.

    Args:
        config: method, batch sizes, optimizer. `privacy` may be incomplete; σ = 1 here.
        recognizer: the model; the method is applied to it.
        corpus: where lengths are taken from; None: `seconds`.
        seconds: length of the utterances without a corpus; None: `TYPICAL_SECONDS`, or the model's whole window
            where that is shorter.

    Raises:
        ConfigError: `seconds` above the model's window.
        ValueError: a method or a layer that cannot be trained.
    """
    # Here: a plan without a model must not load transformers.
    from asr_finetune.methods import apply_method
    from asr_finetune.prepare import make_optimizer, prepare_blocks
    from asr_finetune.progress import Reporter
    from dpkernels import PrivacyEngine

    speech = typical_speech(recognizer, corpus, seconds)
    mean, longest = speech.mean, speech.longest
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
            return _measure(
                config,
                recognizer,
                device,
                private,
                loader,
                (mean, longest, width),
                expected_utterances(config, corpus),
            )


@dataclass(frozen=True)
class Speech:
    """What utterances to plan for: seconds of the mean and the longest one, labels in a second."""

    mean: float
    longest: float
    labels_per_second: float

    def item(self, recognizer: Recognizer, seconds: float) -> dict[str, torch.Tensor]:
        """Noise of that length and a made-up transcript, as an item for `Recognizer.collate`."""
        noise = np.random.default_rng(0).normal(size=max(round(seconds * recognizer.sampling_rate), 1))
        # Two classes in turn, neither of them padding or blank: which ones is of no matter to time or memory.
        pad = recognizer.base.config.pad_token_id
        first, second = [number for number in range(4) if number != pad][:2]
        labels = max(1, round(seconds * self.labels_per_second))
        text = torch.tensor([first, second] * labels)[:labels]
        return {**recognizer.encode_audio(0.1 * noise.astype(np.float32)), "labels": text}


def typical_speech(recognizer: Recognizer, corpus: Corpus | None, seconds: float | None = None) -> Speech:
    """The lengths of a corpus; without one, `seconds`, or `TYPICAL_SECONDS` or the model's window where shorter.

    Raises:
        ConfigError: `seconds` above the model's window.
    """
    window = float(getattr(recognizer, "window_seconds", math.inf))
    if seconds is not None and seconds > window:
        raise ConfigError(
            f"plan: --seconds {seconds:g} is longer than the model's window of {window:g} s: lower it, or raise "
            "model.window_seconds"
        )
    seconds = min(TYPICAL_SECONDS, window) if seconds is None else seconds
    if corpus is None:
        return Speech(seconds, seconds, TYPICAL_LABELS_PER_SECOND)
    lengths = [utterance.seconds for utterance in corpus.utterances]
    longest = float(np.max(lengths))
    text = max((utterance.text for utterance in corpus.utterances), key=len)
    return Speech(float(np.mean(lengths)), longest, len(recognizer.encode_text(text)) / longest)


def _measure(
    config: Config,
    recognizer: Recognizer,
    device: torch.device,
    private: Any,
    loader: Any,
    sizes: tuple[float, float, int],
    utterances: float,
) -> Probe:
    from asr_finetune.recognizer import to_device

    mean, longest, width = sizes
    model, times = recognizer.model, []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for logical_batch in loader:
        for batch in logical_batch:
            began = _clock(device)
            private.backward(recognizer.loss_per_example(model, to_device(batch, device)))
            times.append(_clock(device) - began)
        began = _clock(device)
        private.step()
        step = _clock(device) - began
        private.zero_grad()
    # The first micro-batch is the longest's, the second warms up the ordinary length.
    per_example = float(np.median(times[2:])) / width
    total = config.train.steps * (utterances * per_example + step)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Probe(
        device=str(device),
        seconds_of_audio=mean,
        longest_seconds=longest,
        physical_batch_size=width,
        seconds_per_example=per_example,
        seconds_per_step=step,
        total_seconds=total,
        parameters=sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        optimizer=_state_bytes(private.state),
        sums=sum(8 * parameter.numel() for parameter in trained),
        peak=_peak_bytes(device),
        trained_parameters=sum(parameter.numel() for parameter in trained),
        total_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


class _Synthetic(torch.utils.data.Dataset[dict[str, Any]]):
    """A micro-batch of the longest utterances, then some of the mean length: noise, made-up transcripts."""

    def __init__(self, recognizer: Recognizer, speech: Speech, width: int) -> None:
        self._kinds = [speech.item(recognizer, seconds) for seconds in (speech.longest, speech.mean)]
        self._width = width
        # The loader sorts by these, longest first: the first micro-batch is the one that memory is measured
        # with.
        self.order = [2] * width + [1] * (width * (MICRO_BATCHES + 1))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self._kinds[0 if index < self._width else 1], "index": index}


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _state_bytes(state: Any) -> int:
    tensors = (
        value for entry in state.values() for value in entry.values() if isinstance(value, torch.Tensor)
    )
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: KiB on Linux
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def subject(config: Config) -> tuple[Recognizer, Corpus]:
    """The recogniser and the training data of a configuration, without what the recogniser cannot take.

    Raises:
        ValueError, FileNotFoundError: a model or data that cannot be read.
    """
    from asr_finetune.models import load_recognizer
    from asr_finetune.sources import load_corpus

    recognizer = load_recognizer(config.model)
    corpus = load_corpus(config.data.train, split=config.data.train_split, data=config.data)
    return recognizer, corpus.fit(recognizer)
