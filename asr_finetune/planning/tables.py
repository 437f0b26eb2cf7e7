"""A plan as tables for the screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from asr_finetune.console import duration
from dpkernels.privacy import NoisePlan, NoisyCount
from dpkernels.rounding import shown_epsilon, shown_sigma

if TYPE_CHECKING:  # they load transformers, which a plan without a model does not need
    from asr_finetune.planning.memory import Fit, MemoryPlan
    from asr_finetune.planning.timing import Probe


def plan_table(plan: NoisePlan, count: NoisyCount | None = None) -> Table:
    """The noise, the sampling, and ε over the steps; of adaptive clipping, how sums and count share the noise."""
    target = "" if plan.target_epsilon is None else f"target {plan.target_epsilon:g}, "
    table = Table(
        title=f"ε: {target}spends {shown_epsilon(plan.epsilon)} at δ = {plan.delta:g}",
        show_header=False,
        title_justify="left",
    )
    table.add_row(f"noise multiplier σ ({plan.accountant.upper()})", shown_sigma(plan.noise_multiplier))
    if plan.noise_multiplier_other is not None:
        table.add_row(f"  by {plan.other} it would be", shown_sigma(plan.noise_multiplier_other))
    if plan.epsilon_other is not None:
        table.add_row(f"  ε of this σ by {plan.other}", shown_epsilon(plan.epsilon_other))
    if count is not None:
        table.add_row(
            "  of it on the sums, beside the count that moves C",
            f"{shown_sigma(count.sums_noise_multiplier)}; {count.noise:.4g} on the count",
        )
    sampling = (
        "Poisson" if plan.max_batch_size is None else f"truncated Poisson, at most {plan.max_batch_size:,}"
    )
    drawn = f"{plan.batch_size:,} of {plan.units:,} {plan.unit}s"
    if plan.unit == "speaker":
        drawn = (
            f"of {plan.units:,} speakers; at most {plan.per_unit:,} utterances of each in a step, at most "
            f"{plan.batch_size:,} expected in all"
        )
    table.add_row("sampling", f"{sampling}; rate {plan.sample_rate:.5f} ({drawn})")
    table.add_row("steps", f"{plan.steps:,}: each {plan.unit} is drawn {plan.epochs:.1f} times on average")
    for step, value in plan.epsilon_at:
        table.add_row(f"  ε after step {step:,}", shown_epsilon(value))
    return table


def probe_table(measured: Probe, devices: int = 1) -> Table:
    """Time and memory, and the parts of a run that they do not include; with several devices, theirs as calculated."""
    table = Table(title="measured on this machine, synthetic audio", show_header=False, title_justify="left")
    for row in describe_probe(measured) + (describe_several(measured, devices) if devices > 1 else []):
        table.add_row(*row)
    return table


def describe_probe(measured: Probe) -> list[tuple[str, str]]:
    """(what, value) rows for the screen."""
    return [
        ("device", measured.device),
        ("trained parameters", f"{measured.trained_parameters:,} of {measured.total_parameters:,}"),
        (
            "time per utterance",
            f"{1000 * measured.seconds_per_example:.1f} ms at {measured.seconds_of_audio:.1f} s of audio",
        ),
        ("time per step, noise and optimizer", duration(measured.seconds_per_step)),
        ("time in all", duration(measured.total_seconds())),
        ("  not included", "reading audio and making features, self-check, evaluations, checkpoints"),
        ("weights", size(measured.parameters)),
        ("optimizer state", size(measured.optimizer)),
        ("float64 sums", size(measured.sums)),
        (
            "peak memory",
            f"{size(measured.peak)} with {measured.physical_batch_size} utterances of "
            f"{measured.longest_seconds:.1f} s",
        ),
    ]


def describe_several(measured: Probe, devices: int) -> list[tuple[str, str]]:
    """(what, value) rows for a run under torchrun on several devices like the one measured."""
    return [
        (f"on {devices} of these, calculated: time in all", duration(measured.total_seconds(devices))),
        (
            "  not included either",
            f"the exchange of gradients: each sends {size(measured.sent_per_step(devices))} a step",
        ),
        ("  optimizer state of each", size(measured.optimizer / devices)),
        (
            "  utterances of each in a step",
            f"{measured.utterances / devices:,.0f} of {measured.utterances:,.0f}",
        ),
    ]


def memory_table(plan: MemoryPlan) -> Table:
    """The largest micro-batch of each strategy, and of the chosen one for shorter utterances."""
    table = Table(
        title=f"largest micro-batch within {plan.margin:.0%} of {size(plan.memory)}, estimated",
        title_justify="left",
    )
    for name in ("strategy", "utterances of", "micro-batch", "peak", "  weights", "  of the micro-batch"):
        table.add_column(name)
    for fit in plan.fits:
        table.add_row(*_fit_row(fit), style="bold" if fit is plan.chosen else "")
    for fit in plan.shorter:
        table.add_row(*_fit_row(fit))
    table.caption = "nothing fits" if plan.chosen is None else _advice(plan.chosen)
    return table


def _fit_row(fit: Fit) -> list[str]:
    name = fit.strategy + (", checkpointing" if fit.checkpointing else "")
    if fit.peak is None:
        return [name, f"{fit.seconds:.1f} s", "none fits", "", "", ""]
    parts = (fit.peak.total, fit.peak.weights, fit.peak.micro_batch)
    return [name, f"{fit.seconds:.1f} s", str(fit.size), *map(size, parts)]


def _advice(chosen: Fit) -> str:
    checkpointing = str(chosen.checkpointing).lower()
    return (
        f"privacy.strategy={chosen.strategy} train.physical_batch_size={chosen.size} "
        f"train.checkpointing={checkpointing}"
    )


def size(count: float) -> str:
    """A number of bytes as text with a unit."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
