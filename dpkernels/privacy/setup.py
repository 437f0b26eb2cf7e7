"""A private run as make_private was asked for it: checked, and worked out to the constants it rests on."""

import time
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from dpkernels.nn import swap
from dpkernels.privacy.accounting.accountant import Mechanism, check_accountant, check_delta
from dpkernels.privacy.guards.preconditions import (
    check_coverage,
    check_module,
    check_optimizer,
    trained_parameters,
)
from dpkernels.privacy.sampling.plan import Sampling, plan_sampling, speaker_ids
from dpkernels.privacy.step.clipping import PerLayerClipNorms, batch_bound, per_layer_clip_norms, sensitivity


@dataclass(frozen=True)
class Setup:
    """The public constants of a run, and what its loader is told.

    Attributes:
        sampling: who is sampled, with what probability.
        mechanism: what each step is to the accountant.
        strategy: how a micro-batch is clipped and summed, by name.
        layers: clipping norms by parameter under "per_layer", else None.
        norm: C, or √ΣC_l² by layers.
        bound: largest logical batch that the sensitivity is stated for, in examples.
        sensitivity: S of the sum to one unit.
        physical_batch_size, physical_frames: largest micro-batch.
        speakers: the speaker of every example, as plain values; None where examples are sampled.
        lengths: sizes of all examples, or None.
        steps: total steps, or None.
        target_epsilon, target_delta: what step() does not pass, or None.
    """

    sampling: Sampling
    mechanism: Mechanism
    strategy: str
    layers: PerLayerClipNorms | None
    norm: float
    bound: int
    sensitivity: float
    physical_batch_size: int
    physical_frames: int | None
    speakers: Sequence[Hashable] | None
    lengths: Sequence[int] | None
    steps: int | None
    target_epsilon: float | None
    target_delta: float | None


def resolve_setup(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    data_loader: DataLoader,
    *,
    accountant: str,
    noise_multiplier: float,
    max_grad_norm: float | Sequence[float] | Mapping[str, float],
    strategy: str,
    physical_batch_size: int | None,
    max_batch_size: int | None,
    unit: str,
    speakers: Sequence[Hashable] | None,
    max_examples_per_speaker: int | None,
    lengths: Sequence[int] | None,
    physical_frames: int | None,
    steps: int | None,
    target_epsilon: float | None,
    target_delta: float | None,
) -> Setup:
    """The setup that these arguments of `PrivacyEngine.make_private` ask for.

    Nothing is touched but the model, whose layers change class (`swap`): they compute what they did. Warns where
    σ = 0.

    Args:
        accountant: the engine's.
        Others: as in `make_private`, which has checked its strategy, its clipping and Opacus's keywords.

    Raises:
        ValueError, TypeError: as `make_private` does.
    """
    if speakers is not None:
        speakers = speaker_ids(speakers)
    sampling = plan_sampling(
        data_loader,
        unit=unit,
        speakers=speakers,
        max_examples_per_speaker=max_examples_per_speaker,
        max_batch_size=max_batch_size,
    )
    mechanism = Mechanism(
        sampling.sample_rate,
        float(noise_multiplier),
        dataset_size=sampling.units if max_batch_size is not None else None,
        max_batch_size=max_batch_size,
    )
    check_accountant(accountant, truncated=mechanism.truncated)
    _check_target(target_epsilon, target_delta, sampling.units)
    physical = sampling.expected_batch_size if physical_batch_size is None else physical_batch_size
    if physical < 1:
        raise ValueError(f"physical_batch_size must be >= 1, got {physical_batch_size}")
    if steps is not None and (steps < 1 or steps != int(steps)):
        raise ValueError(f"steps must be a whole number >= 1, got {steps}")
    _check_lengths(lengths, physical_frames, len(data_loader.dataset))  # type: ignore[arg-type]

    check_module(module)
    layers = (
        per_layer_clip_norms(max_grad_norm, trained_parameters(module)) if strategy == "per_layer" else None
    )
    norm = float(max_grad_norm) if layers is None else layers.total  # type: ignore[arg-type]
    swap(module)
    check_coverage(module)
    check_optimizer(optimizer, module)
    if noise_multiplier == 0:
        warnings.warn("noise_multiplier=0: nothing is private, ε = ∞", stacklevel=3)
    bound = batch_bound(
        sampling.units, sampling.sample_rate, per_unit=sampling.per_unit, capacity=sampling.max_batch_size
    )
    return Setup(
        sampling=sampling,
        mechanism=mechanism,
        strategy=strategy,
        layers=layers,
        norm=norm,
        bound=bound,
        sensitivity=sensitivity(norm, bound, sampling.per_unit),
        physical_batch_size=physical,
        physical_frames=physical_frames,
        speakers=speakers,
        lengths=lengths,
        steps=steps,
        target_epsilon=target_epsilon,
        target_delta=target_delta,
    )


def run_settings(setup: Setup, module: nn.Module) -> dict[str, Any]:
    """What the ledger's run line says beside the mechanism: public constants, the date, versions."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "max_grad_norm": setup.norm,
        **_clipping_settings(setup.layers),
        "sensitivity": setup.sensitivity,
        "max_examples_per_unit": setup.sampling.per_unit,
        "expected_batch_size": setup.sampling.expected_batch_size,
        "trained_parameters": sum(p.numel() for p in trained_parameters(module).values()),
        "versions": _versions(),
    }


def _check_target(target_epsilon: float | None, target_delta: float | None, units: int) -> None:
    if target_epsilon is not None and target_delta is None:
        raise ValueError(
            f"target_epsilon={target_epsilon} needs target_delta, got None: an ε says nothing without its δ; "
            f"give one well below 1/N = {1 / units:.3g}"
        )
    if target_epsilon is not None and not target_epsilon > 0:
        raise ValueError(f"target_epsilon must be > 0, got {target_epsilon}")
    if target_delta is not None:
        check_delta(target_delta, units)


def _check_lengths(lengths: Sequence[int] | None, physical_frames: int | None, examples: int) -> None:
    if lengths is not None and len(lengths) != examples:
        raise ValueError(
            f"lengths must hold one size for each of the {examples} examples, got {len(lengths)}"
        )
    if physical_frames is not None and (lengths is None or physical_frames < 1):
        raise ValueError(f"physical_frames={physical_frames} must be >= 1, and needs lengths")


def _clipping_settings(layers: PerLayerClipNorms | None) -> dict[str, Any]:
    if layers is None:
        return {"clipping": "flat"}
    return {
        "clipping": "per_layer",
        "per_layer_clip_norms": "uniform" if layers.given is None else dict(layers.given),
    }


def _versions() -> dict[str, str]:
    names = ("torch", "dp-accounting", "numpy")
    from dpkernels import __version__  # here, since the package imports this module

    return {"dpkernels": __version__, **{name: metadata.version(name) for name in names}}
