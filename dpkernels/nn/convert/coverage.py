"""coverage(model): before any training, each trained parameter with its rule or its refusal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeGuard

from torch import nn

from dpkernels.nn.convert.attaching import uncovered
from dpkernels.nn.convert.swapping import swap
from dpkernels.nn.copying import original_class
from dpkernels.nn.layers.batch_norm import batch_norms_in_training
from dpkernels.nn.layers.expanded import ExpandingModule
from dpkernels.nn.recording.module import GhostModule


@dataclass(frozen=True)
class CoverageRow:
    """One trained parameter.

    Attributes:
        name: its qualified name, the first where it is tied.
        entries: how many numbers it holds.
        module_type: the class of the module that holds it, as the user knows it.
        rule: how its examples' gradients are bounded, by a ghost norm, or as a per-sample gradient of which size; None
            where it is refused.
        refusal: why nothing can bound them, with what to do about it; None where there is a rule.
    """

    name: str
    entries: int
    module_type: str
    rule: str | None
    refusal: str | None

    def __str__(self) -> str:
        return self.rule if self.rule is not None else f"REFUSED: {self.refusal}"


@dataclass(frozen=True)
class Coverage:
    """What `coverage` found; `str` of it is a table.

    Attributes:
        rows: the trained parameters, in the model's order.
        mixing: batch norms in training mode, or without statistics, which make_private refuses whether trained or not.
    """

    rows: tuple[CoverageRow, ...]
    mixing: tuple[str, ...]

    @property
    def refused(self) -> tuple[CoverageRow, ...]:
        """The rows without a rule."""
        return tuple(row for row in self.rows if row.refusal is not None)

    @property
    def complete(self) -> bool:
        """Whether all that is trained has a rule, and no batch norm mixes samples."""
        return bool(self.rows) and not self.refused and not self.mixing

    def __str__(self) -> str:
        cells = [("trained parameter", "entries", "rule")]
        cells += [(row.name, f"{row.entries:,}", str(row)) for row in self.rows]
        name, entries = (max(len(cell[column]) for cell in cells) for column in (0, 1))
        lines = [f"{a:<{name}}  {b:>{entries}}  {c}" for a, b, c in cells]
        lines.append(self._summary())
        lines += [f"{name}: batch norm in training mode mixes the samples of a batch" for name in self.mixing]
        if self.mixing:
            lines.append("dpkernels.fix(model) freezes the batch norms' statistics, or replaces them")
        return "\n".join(lines)

    def _summary(self) -> str:
        if not self.rows:
            return "no parameter is trained (requires_grad): there is nothing to make private"
        refused, total = self.refused, sum(row.entries for row in self.rows)
        covered = f"{len(self.rows) - len(refused)} of {len(self.rows)} trained parameters have a rule"
        held = sum(row.entries for row in refused)
        return (
            f"{covered}; {held:,} of {total:,} entries are refused"
            if refused
            else f"{covered} ({total:,} entries)"
        )


def coverage(model: nn.Module) -> Coverage:
    """How `make_private` would treat each trained parameter of `model`, which stays as it is: `print(coverage(model))`.

    A rule is said of the layer that `swap` would make: "Linear: ghost norm" keeps no per-sample gradient, "per-sample
    gradient (B × n entries)" keeps them, n numbers a sample, and "per-sample expansion" is for small parameters of any
    module. It needs no values: a model on the meta device will do. Layers may record less than is said, and
    `strategy="mixed"` may form gradients where that takes less memory.

    Args:
        model: any module, swapped or not, private or not. While it is looked at, its modules' classes are those of
            `swap`: let no other thread use it meanwhile.

    Returns:
        The table. Where `complete`, `make_private` finds a rule for all that is trained; only a forward shows whether a
        raw parameter is used in a way that can be expanded (`engine.self_check`).

    Raises:
        TypeError: for what is no module.
    """
    with _swapped(model):
        refusals = {item.name: item.reason for item in uncovered(model)}
        fused = {
            parameter: rule
            for module in model.modules()
            if isinstance(module, GhostModule)
            for parameter, rule in module.ghost_fused_rules().items()
        }
        held: dict[nn.Parameter, list[tuple[str, nn.Module, str]]] = {}
        for prefix, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    path = f"{prefix}.{name}" if prefix else name
                    held.setdefault(parameter, []).append((path, module, name))
        rows = [_row(parameter, holders, refusals, fused) for parameter, holders in held.items()]
        return Coverage(tuple(rows), tuple(batch_norms_in_training(model)))


def _row(
    parameter: nn.Parameter,
    holders: list[tuple[str, nn.Module, str]],
    refusals: dict[str, str],
    fused: dict[nn.Parameter, str],
) -> CoverageRow:
    path, module, _ = holders[0]
    refused = [place for place in holders if place[0] in refusals]
    rule = refusal = None
    if refused:
        refusal = refusals[refused[0][0]]
        module = refused[0][1]
        if refused[0][0] != path:
            refusal = f"as {refused[0][0]}: {refusal}"
    elif parameter in fused:
        rule = fused[parameter]
    else:
        said = [_rule(module, name, parameter) for _, module, name in holders if _has_rule(module, name)]
        rule = " + ".join(dict.fromkeys(said)) or _rule(module, holders[0][2], parameter)
    return CoverageRow(path, parameter.numel(), original_class(module).__name__, rule, refusal)


def _has_rule(module: nn.Module, name: str) -> bool:
    return _is_ghost(module) and name in module.ghost_covers


def _is_ghost(module: nn.Module) -> TypeGuard[GhostModule]:
    return isinstance(module, GhostModule) and not isinstance(module, ExpandingModule)


def _rule(module: nn.Module, name: str, parameter: nn.Parameter) -> str:
    kind, entries = original_class(module).__name__, f"(B × {parameter.numel():,} entries)"
    if not _is_ghost(module):
        return f"{kind}: per-sample expansion {entries}"
    if name in module.ghost_forms:
        return f"{kind}: per-sample gradient {entries}"
    return f"{kind}: ghost norm"


@contextmanager
def _swapped(model: nn.Module) -> Iterator[None]:
    """Within it the model's classes are those of `swap`, which changes nothing else."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"coverage: model must be a torch.nn.Module, got {type(model).__name__}")
    before = [(module, type(module)) for module in model.modules()]
    try:
        swap(model)
        yield
    finally:
        for module, kind in before:
            module.__class__ = kind
