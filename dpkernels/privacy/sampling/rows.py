"""The rows of a batch of any form: which of its parts have one row for each example, and selecting other rows.

A tensor of n rows in a batch of n examples need not hold the examples: class weights [n], the means of n channels. A
tensor with 1 row in a batch of one example and n rows in a batch of n does. If only one batch size is known, the rows
are guessed from their number, and `Rows.guessed` is True.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Path = tuple[Any, ...]


@dataclass(frozen=True)
class Rows:
    """The parts of a batch that have one row for each example.

    Attributes:
        size: number of examples in the batch.
        axes: the axis of the rows by path within the batch; 0 for a list or tuple.
        guessed: whether the axes were found from one batch size only.
    """

    size: int
    axes: Mapping[Path, int]
    guessed: bool = False

    def changed(
        self,
        batch: Any,
        of_tensor: Callable[[Tensor, int], Tensor],
        of_list: Callable[[Sequence[Any]], list[Any]],
    ) -> Any:
        """The batch with other rows: `of_tensor(tensor, axis)` of every tensor that has rows, and `of_list(value)` of
        every list and tuple that has rows. Everything else is kept; containers are copied."""

        def change(path: Path, value: Any) -> Any:
            axis = self.axes.get(path)
            if axis is None:
                return _rebuilt(value, lambda key, part: change((*path, key), part))
            return of_tensor(value, axis) if isinstance(value, Tensor) else type(value)(of_list(value))

        return change((), batch)

    def taken(self, batch: Any, order: Sequence[int]) -> Any:
        """The batch with the rows `order`."""

        def of_tensor(rows: Tensor, axis: int) -> Tensor:
            return rows.index_select(axis, torch.tensor(order, device=rows.device))

        return self.changed(batch, of_tensor, lambda rows: [rows[row] for row in order])

    def order_in(self, batch: Any, singles: Sequence[Any]) -> list[int] | None:
        """For each row, the index of the one-example batch with its content: in each dimension the row begins or ends
        with the single's entries, and the rest is padding. None if they cannot be matched."""
        alone = [[(_part(single, path), axis) for path, axis in self.axes.items()] for single in singles]
        rows = [[_part(self.taken(batch, [row]), path) for path in self.axes] for row in range(len(singles))]
        fits = [
            {
                place
                for place, row in enumerate(rows)
                if all(_matches(a, b) for a, (b, _) in zip(row, parts, strict=True))
            }
            for parts in alone
        ]
        single_of: dict[int, int] = {}
        for single in sorted(range(len(singles)), key=lambda place: len(fits[place])):
            free = fits[single] - single_of.keys()
            if not free:
                return None
            single_of[single if single in free else min(free)] = single
        return [single_of[row] for row in range(len(singles))]


def rows_of(batch: Any, size: int, *, singles: Sequence[Any] | None = None, like: Rows | None = None) -> Rows:
    """The rows of a batch of `size` examples.

    singles: batches of one example each; with them the rows are found from two batch sizes.
    like: the rows of another batch of the same form, returned for this size.
    """
    if like is not None:
        return dataclasses.replace(like, size=size)
    axes: dict[Path, int] = {}
    _find_axes((), batch, size, singles or None, axes)
    return Rows(size, axes, guessed=not singles)


def _find_axes(path: Path, value: Any, size: int, alone: Sequence[Any] | None, axes: dict[Path, int]) -> None:
    """Add to `axes` the parts of `value` that have `size` rows, and 1 row in each of their counterparts in `alone`, the
    batches of one example. Without these (None), add the parts that have `size` rows in their first dimension."""
    if isinstance(value, Tensor):
        candidates = [
            axis
            for axis, length in enumerate(value.shape if alone is not None else value.shape[:1])
            if length == size and all(_length(single, value, axis) == 1 for single in alone or ())
        ]
        axes.update({path: candidates[0]} if candidates else {})
        return
    if isinstance(value, list | tuple) and len(value) == size and not hasattr(value, "_fields"):
        of_examples = all(_length(single, value, 0) == 1 for single in alone or ())
        if of_examples and (alone is not None or not any(isinstance(part, Tensor) for part in value)):
            axes[path] = 0
            return
    parts = None if alone is None else [dict(_parts(single)) for single in alone]
    for key, part in _parts(value):
        if parts is None or all(key in others for others in parts):
            below = None if parts is None else [others[key] for others in parts]
            _find_axes((*path, key), part, size, below, axes)


def _length(single: Any, value: Any, axis: int) -> int | None:
    """The length of `single`, the counterpart of `value`, along an axis; None if it is of another kind."""
    if isinstance(value, Tensor):
        return single.shape[axis] if isinstance(single, Tensor) and single.dim() == value.dim() else None
    return len(single) if isinstance(single, list | tuple) else None


def _parts(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return list(vars(value).items())
    return []


def _part(value: Any, path: Path) -> Any:
    for key in path:
        value = dict(_parts(value))[key]
    return value


def _rebuilt(value: Any, change: Callable[[Any, Any], Any]) -> Any:
    """A container with `change(key, part)` of each part; any other value unchanged."""
    parts = {key: change(key, part) for key, part in _parts(value)}
    if isinstance(value, Mapping):  # a UserDict keeps its class, for access by attribute
        return type(value)(parts) if isinstance(value, UserDict) else parts
    if isinstance(value, list | tuple):
        return type(value)(*parts.values()) if hasattr(value, "_fields") else type(value)(parts.values())
    if parts:
        value = copy.copy(value)
        for name, part in parts.items():
            object.__setattr__(value, name, part)
    return value


def _matches(row: Any, single: Any) -> bool:
    """Whether a row equals a single, padded at one end or not at all; True for values that cannot be compared."""
    if isinstance(row, list | tuple):
        return len(row) == len(single) and all(_matches(a, b) for a, b in zip(row, single, strict=True))
    if not isinstance(row, Tensor):
        return row == single if isinstance(row, str | int | float) else True
    if any(there < alone for there, alone in zip(row.shape, single.shape, strict=True)):
        return False
    starts = tuple(slice(0, length) for length in single.shape)
    ends = tuple(slice(there - alone, there) for there, alone in zip(row.shape, single.shape, strict=True))
    return any(
        bool(((row[at] == single) | (row[at] != row[at]) & (single != single)).all()) for at in (starts, ends)
    )
