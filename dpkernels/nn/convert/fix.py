"""fix(model): replace what `make_private` would refuse, as Opacus's ModuleValidator.fix does for Opacus."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize, remove_weight_norm

from dpkernels.nn.convert.coverage import CoverageRow, coverage
from dpkernels.nn.layers.batch_norm import FrozenBatchNorm, freeze_batch_norm, freezing_refusal
from dpkernels.nn.recording.module import GhostModule

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_GROUPS = 32  # of Wu and He 2018, "Group Normalization"


@dataclass(frozen=True)
class Change:
    """One module that was changed.

    Attributes:
        name: its qualified name; empty for the model itself.
        was, now: what it was and what it is.
        effect: what computes otherwise than before, and what does not.
        new_parameters: whether it has other parameters than before, so that an optimizer has to be made after `fix`.
    """

    name: str
    was: str
    now: str
    effect: str
    new_parameters: bool = False

    def __str__(self) -> str:
        return f"{self.name or '(the model)'}: {self.was} -> {self.now}. {self.effect}"


@dataclass(frozen=True)
class FixReport:
    """What `fix` did; `str` of it is for people.

    Attributes:
        changes: the modules that were changed.
        refused: (name, reason) of what make_private would still refuse: trained parameters, and batch norms.
    """

    changes: tuple[Change, ...]
    refused: tuple[tuple[str, str], ...]

    @property
    def complete(self) -> bool:
        """Whether nothing is left that `coverage` would name."""
        return not self.refused

    def __str__(self) -> str:
        lines = [f"{len(self.changes)} modules changed" + (":" if self.changes else "")]
        lines += [f"  {change}" for change in self.changes]
        if any(change.new_parameters for change in self.changes):
            lines.append("  Make the optimizer now: parameters were replaced.")
        if self.refused:
            lines.append(f"{len(self.refused)} cannot be replaced:")
            lines += [f"  {name or '(the model)'}: {reason}" for name, reason in self.refused]
        return "\n".join(lines)


def fix(model: nn.Module, *, batch_norm: str = "freeze", num_groups: int | None = None) -> FixReport:
    """Replace what `make_private` would refuse, in place, and say what was done, what it changes and what is left.

    ==================================  =======================================  =======================================
    what                                becomes                                  what changes
    ==================================  =======================================  =======================================
    BatchNorm1d/2d/3d, subclasses       FrozenBatchNorm (`batch_norm="freeze"`)  training normalises as evaluation does
    … and SyncBatchNorm                 GroupNorm (`batch_norm="group"`)         function, in training and evaluation
    InstanceNorm, running statistics    InstanceNorm without                     evaluation normalises as training does
    Embedding(sparse=True)              sparse=False                             nothing: gradients are dense
    Embedding(scale_grad_by_freq=True)  scale_grad_by_freq=False                 gradients: the batch scaled them before
    weight_norm, in either form         the weight itself                        what is trained, not what is computed
    ==================================  =======================================  =======================================

    All else stays as it is: activations in place, for one, need no replacement. Weight and bias of norms are kept, as
    the parameters that they are. Call it before the optimizer is made.

    Args:
        model: the model, before `make_private`.
        batch_norm: "freeze" or "group".
        num_groups: of GroupNorm; None: the largest divisor of 32 that divides the channels, and half of it where a
            group of a BatchNorm1d would be one channel.

    Returns:
        The report. It raises for nothing that it cannot replace: see `FixReport.refused`; make_private refuses that.

    Raises:
        ValueError: another `batch_norm`; `num_groups` without batch_norm="group".
        RuntimeError: a model that is private already.
        TypeError: for what is no module.
    """
    if batch_norm not in ("freeze", "group"):
        raise ValueError(f'fix: batch_norm must be "freeze" or "group", got {batch_norm!r}')
    if num_groups is not None and batch_norm != "group":
        raise ValueError(f'fix: num_groups={num_groups} is for batch_norm="group"')
    if not isinstance(model, nn.Module):
        raise TypeError(f"fix: model must be a torch.nn.Module, got {type(model).__name__}")
    if any(isinstance(m, GhostModule) and m.ghost_tape is not None for m in model.modules()):
        raise RuntimeError(
            "fix: the model is private already; fix it before make_private, or detach it first"
        )

    refused: dict[str, str] = {}
    changes = list(_fix_norms(model, batch_norm, num_groups, refused))
    table = coverage(model)
    if table.refused:
        changes += _fix_layers(model, table.refused)
        table = coverage(model)
    for row in table.refused:
        held_by = row.name.rpartition(".")[0]
        if held_by not in refused:
            refused[row.name] = str(row.refusal)
    return FixReport(tuple(changes), tuple(refused.items()))


def _fix_norms(
    model: nn.Module, batch_norm: str, num_groups: int | None, refused: dict[str, str]
) -> Iterator[Change]:
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, _BatchNorm) and not isinstance(module, FrozenBatchNorm):
            replace = _freeze if batch_norm == "freeze" else _group
            reason = replace(module, num_groups)
            if reason is not None:
                refused[name] = f"{kind}: {reason}"
                continue
            now = f"GroupNorm({module.num_groups})" if batch_norm == "group" else type(module).__name__
            yield Change(name, kind, now, _EFFECTS[batch_norm] + _warning(module))
        elif isinstance(module, _InstanceNorm) and module.running_mean is not None:
            if type(module) not in _INSTANCE_NORMS:
                refused[name] = (
                    f"{kind}: running statistics of the data in a class of its own; replace it by nn.InstanceNorm*d"
                )
                continue
            for buffer in ("running_mean", "running_var", "num_batches_tracked"):
                module._buffers[buffer] = None
            module.track_running_stats = False
            effect = "In evaluation it normalises with the sample's own statistics, as in training."
            yield Change(
                name, f"{kind}(track_running_stats=True)", f"{kind}(track_running_stats=False)", effect
            )


_EFFECTS = {
    "freeze": "In training it normalises with its running statistics, which stay as they are; evaluation is as before.",
    "group": "The function changes: it normalises each sample by itself, in training and evaluation.",
}


def _freeze(module: Any, _num_groups: int | None) -> str | None:
    """Freeze a batch norm, or say why it cannot be."""
    reason = freezing_refusal(module)
    if reason is None:
        freeze_batch_norm(module)
    else:
        reason = f'{reason}, or fix it with batch_norm="group"'
    return reason


def _warning(module: nn.Module) -> str:
    seen = getattr(module, "num_batches_tracked", None)
    if seen is None or seen.is_meta or int(seen) > 0:
        return ""
    return (
        " It has seen no batch: its statistics are mean 0 and variance 1, so that it normalises nothing; load a "
        'checkpoint, or use batch_norm="group".'
    )


def _group(module: Any, num_groups: int | None) -> str | None:
    """Make a GroupNorm of a batch norm, in place, or say why it cannot be."""
    if type(module) not in _BATCH_NORMS:
        return "a class of its own, which may compute something else; replace it by nn.BatchNorm*d"
    channels = module.num_features
    groups = math.gcd(_GROUPS, channels) if num_groups is None else num_groups
    if num_groups is None and isinstance(module, nn.BatchNorm1d) and groups == channels:
        groups //= 2  # of [B,C] a group of one channel would be a constant
    if groups < 1 or channels % groups:
        return f"its {channels} channels do not make {max(groups, 2)} groups; replace it by a norm of your choice"
    for buffer in ("running_mean", "running_var", "num_batches_tracked"):
        del module._buffers[buffer]
    for attribute in ("num_features", "momentum", "track_running_stats", "process_group"):
        vars(module).pop(attribute, None)
    module.__class__ = nn.GroupNorm
    module.num_groups, module.num_channels = groups, channels
    return None


def _fix_layers(model: nn.Module, refused: tuple[CoverageRow, ...]) -> Iterator[Change]:
    """What of the modules that hold these parameters can be replaced."""
    holders = {row.name.rpartition(".")[0].partition(".parametrizations")[0] for row in refused}
    for name, module in model.named_modules():
        if name not in holders:
            continue
        if isinstance(module, nn.Embedding):
            yield from _fix_embedding(name, module)
        was = _remove_weight_norm(module)
        if was is not None:
            effect = (
                "It computes what it did; the weight itself is trained in place of its direction and length."
            )
            yield Change(name, f"{type(module).__name__} under {was}", type(module).__name__, effect, True)


def _fix_embedding(name: str, module: nn.Embedding) -> Iterator[Change]:
    if module.sparse:
        module.sparse = False
        yield Change(name, "Embedding(sparse=True)", "Embedding(sparse=False)", "It computes what it did.")
    if module.scale_grad_by_freq:
        module.scale_grad_by_freq = False
        effect = "It computes what it did; gradients are not divided by how often an id is in the batch."
        was, now = (f"Embedding(scale_grad_by_freq={given})" for given in (True, False))
        yield Change(name, was, now, effect)


def _remove_weight_norm(module: Any) -> str | None:
    """Take weight_norm off, in either of its forms; what it was, or None where there is none."""
    hooks = [h for h in module._forward_pre_hooks.values() if type(h).__name__ == "WeightNorm"]
    for hook in hooks:
        remove_weight_norm(module, hook.name)
    names = [
        name
        for name, parts in getattr(module, "parametrizations", {}).items()
        if [type(part).__name__ for part in parts] == ["_WeightNorm"]
    ]
    for name in names:
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return "weight_norm" if hooks or names else None
