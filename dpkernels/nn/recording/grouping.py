"""Many records in one call: their norms, and their weighted sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpkernels import ops
from dpkernels.nn.recording.records import Record, Share
from dpkernels.nn.recording.sharing import sharing_inputs


def norms_sq(records: Sequence[Record]) -> list[Tensor]:
    """Upper bounds [B] float32 whose sum is Σ over records of their squared norms.

    One for each device, of the records that can be asked together, and one for each of the others.
    """
    found: list[Tensor] = []
    shares: dict[torch.device, list[Share]] = {}
    asked = sharing_inputs(records)
    kinds = _sharing(asked, "norm_sq")
    for record in asked:
        share = record.share() if type(record) in kinds else None
        if share is None:
            found.append(record.norm_sq())
        else:
            shares.setdefault(share.g.device, []).append(share)
    for mine in shares.values():
        options = _lists([share.options | share.norm_options for share in mine])
        found.append(ops.total_norm_sq(*_layers(mine), **options))
    return found


def add_weighted_sums(
    records: Sequence[Record], factors: Tensor, sums: Mapping[nn.Parameter, Tensor]
) -> None:
    """`add_weighted_sum` of all records, those that can in one call a device.

    factors: [B] float32. sums: as for `Record.add_weighted_sum`.
    """
    shares: dict[torch.device, list[tuple[Share, tuple[Tensor, ...]]]] = {}
    seen: set[nn.Parameter] = set()
    kinds = _sharing(records, "add_weighted_sum")
    for record in records:
        share = record.share() if type(record) in kinds else None
        # Two layers of one call write at the same time: not to the same sum.
        again = not seen.isdisjoint(record.parameters)
        seen.update(record.parameters)
        if share is None or again:
            record.add_weighted_sum(factors.to(record.parameters[0].device), sums)
        else:
            outs = record.outs(sums)
            shares.setdefault(outs[0].device, []).append((share, outs))
    for device, mine in shares.items():
        options = _lists([share.options for share, _ in mine])
        outs = tuple(out for _, its in mine for out in its)
        ops.clip_and_noise(*_layers([share for share, _ in mine]), factors.to(device), outs, **options)


def _sharing(records: Sequence[Record], method: str) -> set[type[Record]]:
    """Those of the records' classes that take part in one call for many layers."""
    return {kind for kind in set(map(type, records)) if _shares(kind, method)}


def _shares(kind: type[Record], method: str) -> bool:
    """Whether `share` was written with this class's `method`: a subclass may have replaced only that one."""
    return _definer(kind, "share") is _definer(kind, method)


def _definer(kind: type, name: str) -> type:
    return next(c for c in kind.__mro__ if name in vars(c))


def _layers(shares: Sequence[Share]) -> tuple[list[Tensor], list[Tensor], list[str]]:
    return [s.x for s in shares], [s.g for s in shares], [s.kind for s in shares]


def _lists(options: Sequence[Mapping[str, object]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in options:
        for name, value in one.items():
            found.setdefault(name, []).append(value)
    return found
