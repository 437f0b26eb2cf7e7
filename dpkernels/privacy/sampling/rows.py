"""The examples of a batch in whatever form it has: which of its parts have one row an example, and other rows of them.

A tensor of n rows in a batch of n examples need not be the examples': class weights [n], the means of n channels. What
has 1 row in a batch of one example and n in one of n is. Where only one size is known, the size is all there is to go
by, and `Rows.guessed` says so.
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
    """The parts of a batch that have one row an example.

    Attributes:
        size: examples in the batch.
        axes: by path within the batch: of a tensor the axis of its rows, of a list or tuple 0.
        guessed: whether that is known from one batch size only.
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
        """The batch with other rows: `of_tensor(tensor, axis)` of every tensor that has rows, `of_list` of every list
        and tuple; everything else is kept, containers are copied."""

        def again(path: Path, value: Any) -> Any:
            axis = self.axes.get(path)
            if axis is None:
                return _rebuilt(value, lambda key, part: again((*path, key), part))
            return of_tensor(value, axis) if isinstance(value, Tensor) else type(value)(of_list(value))

        return again((), batch)

    def taken(self, batch: Any, order: Sequence[int]) -> Any:
        """The batch of the rows `order`."""

        def of_tensor(rows: Tensor, axis: int) -> Tensor:
            return rows.index_select(axis, torch.tensor(order, device=rows.device))

        return self.changed(batch, of_tensor, lambda rows: [rows[row] for row in order])

    def order_in(self, batch: Any, singles: Sequence[Any]) -> list[int] | None:
        """Which of the one-example batches each row is, by content: the single's begins or ends each dimension of the
        row, and the rest is padding. None where they cannot be matched."""
        alone = [[(_part(one, path), axis) for path, axis in self.axes.items()] for one in singles]
        rows = [[_part(self.taken(batch, [row]), path) for path in self.axes] for row in range(len(singles))]
        fits = [
            {
                place
                for place, row in enumerate(rows)
                if all(_holds(a, b) for a, (b, _) in zip(row, one, strict=True))
            }
            for one in alone
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

    singles: batches of one example each: known from two sizes.
    like: the rows of another batch of the same form.
    """
    if like is not None:
        return dataclasses.replace(like, size=size)
    axes: dict[Path, int] = {}
    _look((), batch, size, singles or None, axes)
    return Rows(size, axes, guessed=not singles)


def _look(path: Path, value: Any, size: int, alone: Sequence[Any] | None, axes: dict[Path, int]) -> None:
    """Note the axes of what has `size` rows, and 1 in each of `alone`, its counterparts in batches of one example;
    where there are none (None), of what has `size` rows in its first dimension."""
    if isinstance(value, Tensor):
        found = [
            axis
            for axis, length in enumerate(value.shape if alone is not None else value.shape[:1])
            if length == size and all(_length(one, value, axis) == 1 for one in alone or ())
        ]
        axes.update({path: found[0]} if found else {})
        return
    if isinstance(value, list | tuple) and len(value) == size and not hasattr(value, "_fields"):
        of_examples = all(_length(one, value, 0) == 1 for one in alone or ())
        if of_examples and (alone is not None or not any(isinstance(part, Tensor) for part in value)):
            axes[path] = 0
            return
    parts = None if alone is None else [dict(_parts(one)) for one in alone]
    for key, part in _parts(value):
        if parts is None or all(key in others for others in parts):
            below = None if parts is None else [others[key] for others in parts]
            _look((*path, key), part, size, below, axes)


def _length(one: Any, value: Any, axis: int) -> int | None:
    """Of the counterpart of `value` along an axis; None where it is of another kind."""
    if isinstance(value, Tensor):
        return one.shape[axis] if isinstance(one, Tensor) and one.dim() == value.dim() else None
    return len(one) if isinstance(one, list | tuple) else None


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
    """A container with `change(key, part)` of each part; anything else as it is."""
    parts = {key: change(key, part) for key, part in _parts(value)}
    if isinstance(value, Mapping):  # transformers' are read by attribute, too
        return type(value)(parts) if isinstance(value, UserDict) else parts
    if isinstance(value, list | tuple):
        return type(value)(*parts.values()) if hasattr(value, "_fields") else type(value)(parts.values())
    if parts:
        value = copy.copy(value)
        for name, part in parts.items():
            object.__setattr__(value, name, part)
    return value


def _holds(row: Any, single: Any) -> bool:
    """Whether a row is what a single is, padded at one end or not at all; True of what cannot be compared."""
    if isinstance(row, list | tuple):
        return len(row) == len(single) and all(_holds(a, b) for a, b in zip(row, single, strict=True))
    if not isinstance(row, Tensor):
        return row == single if isinstance(row, str | int | float) else True
    if any(there < alone for there, alone in zip(row.shape, single.shape, strict=True)):
        return False
    starts = tuple(slice(0, length) for length in single.shape)
    ends = tuple(slice(there - alone, there) for there, alone in zip(row.shape, single.shape, strict=True))
    return any(
        bool(((row[at] == single) | (row[at] != row[at]) & (single != single)).all()) for at in (starts, ends)
    )
