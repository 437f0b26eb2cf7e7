"""A private run's arguments, checked, and the constants that follow from them."""

import hashlib
import math
import time
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
    warn_of_generators,
)
from dpkernels.privacy.keywords import adaptive_options, clips_speakers
from dpkernels.privacy.sampling.canaries import CanaryDataset, check_one_process
from dpkernels.privacy.sampling.plan import Sampling, plan_sampling, speaker_ids
from dpkernels.privacy.step.adaptive import (
    AdaptiveClipping,
    AdaptiveLayers,
    AdaptiveRule,
    NoisyCount,
    noisy_count,
)
from dpkernels.privacy.step.clipping import (
    AUTOMATIC_STABILITY,
    ClipRule,
    PerLayerClipNorms,
    batch_bound,
    per_layer_clip_norms,
    sensitivity,
)


@dataclass(frozen=True, kw_only=True)
class RunArguments:
    """The arguments of `PrivacyEngine.make_private` that define a run, under the same names; its docstring has their
    meaning. Opacus's keywords that take one value only are not among them."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    data_loader: DataLoader
    noise_multiplier: float
    max_grad_norm: float | Sequence[float] | Mapping[str, float]
    clipping: str | AdaptiveClipping
    clipping_unit: str | None
    strategy: str
    memory_share: float | None
    physical_batch_size: int | None
    max_batch_size: int | None
    unit: str
    speakers: Sequence[Hashable] | None
    max_examples_per_speaker: int | None
    lengths: Sequence[int] | None
    max_padded_frames: int | None
    steps: int | None
    target_epsilon: float | None
    target_delta: float | None


@dataclass(frozen=True)
class Setup:
    """A run's arguments, and the public constants that follow from them.

    Attributes:
        arguments: the run's, with speakers as plain values.
        sampling: the sampled units and their probability.
        mechanism: the mechanism of each step, for the accountant.
        layers: clipping norms by parameter under "per_layer", else None.
        rule: how the norm of a whole gradient decides its factor (not under "per_layer"); of adaptive clipping, in the
            first step.
        count: the noisy counts of adaptive clipping, else None.
        norm: C, or √ΣC_l² by layers; the first step's under adaptive clipping.
        whole_units: whether the examples of a speaker are clipped together: the sensitivity is that of one gradient.
        bound: largest logical batch that the sensitivity is stated for, in examples.
        sensitivity: S of the sum to one unit, at this norm.
        physical_batch_size: largest micro-batch, in examples.
    """

    arguments: RunArguments
    sampling: Sampling
    mechanism: Mechanism
    layers: PerLayerClipNorms | None
    rule: ClipRule
    count: NoisyCount | None
    norm: float
    whole_units: bool
    bound: int
    sensitivity: float
    physical_batch_size: int


def resolve_setup(run: RunArguments, accountant: str, ranks: int = 1) -> Setup:
    """The setup of a run with these arguments.

    The model's layers change class (`swap`) and compute the same; nothing else is changed. Warns where σ = 0.

    Args:
        run: the arguments; `make_private` has checked strategy, clipping and Opacus's keywords.
        accountant: the engine's.
        ranks: number of processes. A micro-batch is by default this part of the expected batch size.

    Raises:
        ValueError, TypeError: as `make_private` does.
    """
    if run.speakers is not None:
        run = replace(run, speakers=speaker_ids(run.speakers))
    sampling = plan_sampling(
        run.data_loader,
        unit=run.unit,
        speakers=run.speakers,
        max_examples_per_speaker=run.max_examples_per_speaker,
        max_batch_size=run.max_batch_size,
    )
    mechanism = Mechanism(
        sampling.sample_rate,
        float(run.noise_multiplier),
        dataset_size=sampling.units if run.max_batch_size is not None else None,
        max_batch_size=run.max_batch_size,
    )
    check_accountant(accountant, truncated=mechanism.truncated)
    _check_target(run.target_epsilon, run.target_delta, sampling.units)
    whole_units = clips_speakers(run.clipping_unit, run.unit)
    together = sampling.per_unit if whole_units else 1
    physical = run.physical_batch_size
    if physical is None:
        physical = max(math.ceil(sampling.expected_batch_size / ranks), together)
    if physical < 1:
        raise ValueError(f"physical_batch_size must be >= 1, got {run.physical_batch_size}")
    if physical < together:
        raise ValueError(
            f"physical_batch_size={physical} is below max_examples_per_speaker={together}: a speaker's examples are "
            "clipped together, and so stand in one micro-batch. Raise the one, lower the other, or use "
            "clipping_unit='example', whose noise is max_examples_per_speaker times larger"
        )
    if run.steps is not None and (run.steps < 1 or run.steps != int(run.steps)):
        raise ValueError(f"steps must be a whole number >= 1, got {run.steps}")
    _check_lengths(run.lengths, run.max_padded_frames, len(run.data_loader.dataset))  # type: ignore[arg-type]

    check_one_process(run.data_loader.dataset, ranks)
    check_module(run.module)
    warn_of_generators(run.module)
    layers = None
    if run.strategy == "per_layer":
        layers = per_layer_clip_norms(run.max_grad_norm, trained_parameters(run.module))
    norm = float(run.max_grad_norm) if layers is None else layers.total  # type: ignore[arg-type]
    options, count = adaptive_options(run.clipping), None
    if options is not None:
        counts = 1 if layers is None else len(layers.of)
        count = noisy_count(options, run.noise_multiplier, sampling, whole_units=whole_units, counts=counts)
    swap(run.module)
    check_coverage(run.module)
    check_optimizer(run.optimizer, run.module)
    if run.noise_multiplier == 0:
        warnings.warn("noise_multiplier=0: nothing is private, ε = ∞", stacklevel=3)
    bound = batch_bound(
        sampling.units, sampling.sample_rate, per_unit=sampling.per_unit, capacity=sampling.max_batch_size
    )
    return Setup(
        arguments=run,
        sampling=sampling,
        mechanism=mechanism,
        layers=layers,
        rule=ClipRule(norm, AUTOMATIC_STABILITY if run.clipping == "automatic" else None),
        count=count,
        norm=norm,
        whole_units=whole_units,
        bound=bound,
        sensitivity=sensitivity(norm, bound, 1 if whole_units else sampling.per_unit, ranks),
        physical_batch_size=physical,
    )


def adaptive_norms(setup: Setup) -> AdaptiveRule | AdaptiveLayers | None:
    """The norms of a run whose clipping adapts, at their first values; else None."""
    if setup.count is None:
        return None
    if setup.layers is None:
        return AdaptiveRule(setup.count, setup.norm, setup.sensitivity)
    names = list(trained_parameters(setup.arguments.module))
    return AdaptiveLayers(setup.count, setup.layers, names, setup.sensitivity)


_OF_ONE_PROCESS = (
    "arguments",
    "layers",
    "physical_batch_size",
)  # a rank with less memory may take smaller ones


def run_identity(setup: Setup, accountant: str, fixed_key: bool) -> dict[str, Any]:
    """What must be the same in all processes of a run, by the name that an error shows."""
    run = setup.arguments
    return {
        **{name: value for name, value in vars(setup).items() if name not in _OF_ONE_PROCESS},
        **{name: getattr(run, name) for name in ("strategy", "steps", "target_epsilon", "target_delta")},
        **_clipping_settings(setup),
        "accountant": accountant,
        "a fixed noise_key": fixed_key,
        "optimizer": type(run.optimizer).__name__,
        **_orders(run),
        "data set": f"{type(run.data_loader.dataset).__name__} of {len(run.data_loader.dataset)} examples",  # type: ignore[arg-type]
        "lengths": digest_of(run.lengths),
        "speakers": digest_of(run.speakers),
        "versions": _versions(),
    }


def _orders(run: RunArguments) -> dict[str, Any]:
    """Parameters are exchanged, and an optimizer's state is saved, by position. A set of names, for example, is in
    another order in each process."""
    names = {id(parameter): name for name, parameter in run.module.named_parameters()}
    trained = [names[id(parameter)] for parameter in trained_parameters(run.module).values()]
    groups = [[names.get(id(p)) for p in group["params"]] for group in run.optimizer.param_groups]
    return {
        "order of trained parameters": digest_of(trained),
        "optimizer's parameter groups": digest_of(groups),
    }


def digest_of(values: Sequence[Any] | None) -> str:
    """A short digest of a list of public values."""
    return "none" if values is None else hashlib.sha256(repr(list(values)).encode()).hexdigest()[:16]


def named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Name and value of every parameter and buffer, and whether it is trained."""
    for name, parameter in module.named_parameters():
        yield f"parameter {name!r}", parameter, parameter.requires_grad
    for name, buffer in module.named_buffers():
        yield f"buffer {name!r}", buffer, False


def run_settings(setup: Setup, processes: int) -> dict[str, Any]:
    """Entries of the ledger's run line beside the mechanism: public constants, the date, versions."""
    audited = setup.arguments.data_loader.dataset
    return {
        **({"processes": processes} if processes > 1 else {}),
        **({"canaries": audited.canaries} if isinstance(audited, CanaryDataset) else {}),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "max_grad_norm": setup.norm,
        **_clipping_settings(setup),
        "clipping_unit": "speaker" if setup.whole_units else "example",
        "strategy": setup.arguments.strategy,
        "sensitivity": setup.sensitivity,
        "max_examples_per_unit": setup.sampling.per_unit,
        "expected_batch_size": setup.sampling.expected_batch_size,
        "trained_parameters": sum(p.numel() for p in trained_parameters(setup.arguments.module).values()),
        "versions": _versions(),
    }


def _check_target(target_epsilon: float | None, target_delta: float | None, units: int) -> None:
    if target_epsilon is not None and target_delta is None:
        raise ValueError(
            f"target_epsilon={target_epsilon} needs target_delta, got None: an ε has no meaning without its δ; "
            f"give one well below 1/N = {1 / units:.3g}"
        )
    if target_epsilon is not None and not target_epsilon > 0:
        raise ValueError(f"target_epsilon must be > 0, got {target_epsilon}")
    if target_delta is not None:
        check_delta(target_delta, units)


def _check_lengths(lengths: Sequence[int] | None, max_padded_frames: int | None, examples: int) -> None:
    if lengths is not None and len(lengths) != examples:
        raise ValueError(
            f"lengths must hold one size for each of the {examples} examples, got {len(lengths)}"
        )
    if lengths is not None and not all(map(math.isfinite, lengths)):
        place = next(place for place, length in enumerate(lengths) if not math.isfinite(length))
        raise ValueError(
            f"lengths[{place}] is {lengths[place]}: expected finite sizes; measure or drop that example"
        )
    if max_padded_frames is not None and (lengths is None or max_padded_frames < 1):
        raise ValueError(f"max_padded_frames={max_padded_frames} must be >= 1, and needs lengths")


def _clipping_settings(setup: Setup) -> dict[str, Any]:
    count = {} if setup.count is None else {"noisy_count": asdict(setup.count)}
    if setup.layers is not None:
        given = setup.layers.given
        norms = "uniform" if given is None else dict(given)
        return {"clipping": "per_layer", "per_layer_clip_norms": norms, **count}
    if setup.count is not None:
        return {"clipping": "adaptive", **count}
    if setup.rule.stability is not None:
        return {"clipping": "automatic", "stability": setup.rule.stability}
    return {"clipping": "flat"}


def _versions() -> dict[str, str]:
    names = ("torch", "dp-accounting", "numpy")
    from dpkernels import __version__  # here, since the package imports this module

    return {"dpkernels": __version__, **{name: metadata.version(name) for name in names}}
