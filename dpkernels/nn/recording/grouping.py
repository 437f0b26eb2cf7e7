"""Many records in one call: their norms, and their weighted sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from dpkernels import ops
from dpkernels.nn.recording.records import Record
from dpkernels.nn.recording.sharing import sharing_inputs
from dpkernels.ops.layers import GroupedLayer, from_columns


def norms_sq(records: Sequence[Record]) -> list[Tensor]:
    """Upper bounds [B] float32 whose sum is Σ over records of their squared norms.

    One for each device, of the records that can be asked together, and one for each of the others.
    """
    squares: list[Tensor] = []
    together: dict[torch.device, list[GroupedLayer]] = {}
    norm_records = sharing_inputs(records)
    kinds = _sharing(norm_records, "norm_sq")
    for record in norm_records:
        layer = record.share() if type(record) in kinds else None
        if layer is None:
            squares.append(record.norm_sq())
        else:
            together.setdefault(layer.tensors[0].device, []).append(layer)
    squares += [ops.total_norm_sq(layers) for layers in together.values()]
    return squares


def add_weighted_sums(
    records: Sequence[Record], factors: Tensor, sums: Mapping[nn.Parameter, Tensor]
) -> None:
    """`add_weighted_sum` of all records, those that can in one call a device.

    factors: [B] float32. sums: as for `Record.add_weighted_sum`.
    """
    together: dict[torch.device, list[GroupedLayer]] = {}
    seen: set[nn.Parameter] = set()
    kinds = _sharing(records, "add_weighted_sum")
    for record in records:
        layer = record.share() if type(record) in kinds else None
        # Two layers of one call write at the same time: not to the same sum.
        again = not seen.isdisjoint(record.parameters)
        seen.update(record.parameters)
        if layer is None or again:
            record.add_weighted_sum(factors.to(record.parameters[0].device), sums)
        else:
            layer = layer._replace(outs=record.outs(sums))
            together.setdefault(layer.outs[0].device, []).append(layer)
    for device, layers in together.items():
        ops.weighted_sums(layers, factors.to(device))


def share(
    kind: str,
    x: Tensor,
    g: Tensor,
    options: Mapping[str, Any] = MappingProxyType({}),
    norm_options: Mapping[str, Any] = MappingProxyType({}),
) -> GroupedLayer:
    """The grouped layer that `dpkernels.nn.Share`, its name until 0.1.0, describes: options by the names of columns."""
    columns = {name: [value] for name, value in {**options, **norm_options}.items()}
    return from_columns([x], [g], [kind], columns)[0]


def _sharing(records: Sequence[Record], method: str) -> set[type[Record]]:
    """Those of the records' classes that take part in one call for many layers."""
    return {kind for kind in set(map(type, records)) if _shares(kind, method)}


def _shares(kind: type[Record], method: str) -> bool:
    """Whether `share` was written with this class's `method`: a subclass may have replaced only that one."""
    return _definer(kind, "share") is _definer(kind, method)


def _definer(kind: type, name: str) -> type:
    return next(c for c in kind.__mro__ if name in vars(c))
