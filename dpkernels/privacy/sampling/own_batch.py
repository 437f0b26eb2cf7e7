"""The self-check's own batch: examples of the data set together and each alone, as the loader's collate_fn makes them.

What the rest of a batch does to an example, padding above all, only collate_fn knows: a batch that was padded already
has no trace of it. So examples of unlike sizes are collated, a shorter one beside longer ones, and each alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from dpkernels.nn.batch.batch_axis import map_tensors, tensors_in
from dpkernels.privacy.rng.model_draws import same_draws, secret_seed
from dpkernels.privacy.sampling.rows import Rows, rows_of

_LOOKED_AT = 32
"""Examples that are read to find two of unlike sizes, where the sizes are not known."""


@dataclass(frozen=True)
class OwnBatch:
    """A batch of the data set's examples, and each of them alone. NOT PRIVATE.

    Attributes:
        batch: what collate_fn makes of them together.
        singles: what it makes of each, in the order of the batch's rows.
        rows: which parts of the batch have one row an example: known from the two.
        padded: whether one of them is larger in the batch than alone.
    """

    batch: Any
    singles: list[Any]
    rows: Rows
    padded: bool


def own_batch(
    dataset: Any,
    collate: Callable[[list[Any]], Any],
    *,
    lengths: Sequence[int] | np.ndarray | None = None,
    examples: int = 3,
) -> OwnBatch | str:
    """Examples of a data set as a batch and alone; or, in words, why collate_fn cannot be asked that.

    The examples are of unlike sizes where there are such: the order of rows is neither from the shortest to the longest
    nor the other way round, so that a model which sorts them shows.

    Args:
        dataset: map-style.
        collate: the loader's collate_fn.
        lengths: sizes of all examples, where known; else some examples are read and collated to find out.
        examples: how many, at least two.

    Raises:
        Whatever dataset and collate raise.
    """
    count = min(examples, len(dataset))
    if lengths is not None:
        order = np.argsort(np.asarray(lengths), kind="stable")
        items = _read(dataset, [int(order[place]) for place in _spread(len(order), count)])
    else:
        items = _unlike(dataset, collate, count)
    items = [*items[1:-1], items[0], items[-1]] if len(items) > 2 else items[::-1]
    batch, again = (_collated(collate, items) for _ in range(2))
    if not _equal(batch, again):
        return (
            "what padding does: collate_fn gives another batch for the same examples the second time, so that an "
            "example alone cannot be compared with it in a batch"
        )
    singles = [_collated(collate, [item]) for item in items]
    rows = rows_of(batch, len(items), singles=singles)
    places = rows.order_in(batch, singles)
    if places is None and _equal(_collated(collate, items[::-1]), rows.taken(batch, range(len(items))[::-1])):
        places = list(
            range(len(items))
        )  # what it pads or changes is no matter: its rows are in the order of the items
    if places is None:
        return (
            "what padding does: which row of the batch collate_fn makes of which example is not known, as it gives "
            "them in another order (does it sort?) and an example alone is not found in its row"
        )
    singles = [singles[place] for place in places]
    padded = any(size_of(single) * len(items) < size_of(batch) for single in singles)
    return OwnBatch(batch, singles, rows, padded)


def form_of(batch: Any) -> Any:
    """What a batch is made of: tensors with their number of dimensions, in dicts, tuples, lists and dataclasses."""
    if isinstance(batch, Tensor):
        return "Tensor", batch.dim(), batch.is_floating_point()
    if isinstance(batch, Mapping):
        return {key: form_of(value) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [form_of(value) for value in batch] if any(map(_holds_tensors, batch)) else "texts"
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {type(batch).__name__: form_of(vars(batch))}
    return type(batch).__name__


def on_devices_of(batch: Any, model_batch: Any) -> Any:
    """`batch`, each tensor on the device of its counterpart in `model_batch`, which has the same form."""
    devices = iter([tensor.device for _, tensor in tensors_in(model_batch)])
    return map_tensors(batch, lambda tensor: tensor.to(next(devices)))


def _holds_tensors(value: Any) -> bool:
    return next(tensors_in(value), None) is not None


def size_of(batch: Any) -> int:
    """Entries of all tensors of a batch."""
    return sum(tensor.numel() for _, tensor in tensors_in(batch))


def _spread(size: int, count: int) -> list[int]:
    """`count` different places of 0 ... size − 1, the first and the last among them."""
    return [math.floor(place) for place in np.linspace(0, size - 1, count)]


def _unlike(dataset: Any, collate: Callable[[list[Any]], Any], count: int) -> list[Any]:
    """`count` examples from the smallest to the largest of those that were looked at."""
    items = _read(dataset, _spread(len(dataset), min(len(dataset), max(_LOOKED_AT, count))))
    sizes = [size_of(_collated(collate, [item])) for item in items]
    order = sorted(range(len(items)), key=sizes.__getitem__)
    return [items[order[place]] for place in _spread(len(order), count)]


def _read(dataset: Any, places: list[int]) -> list[Any]:
    together = getattr(dataset, "__getitems__", None)  # as torch's own fetcher does
    return list(together(places)) if together else [dataset[place] for place in places]


def _collated(collate: Callable[[list[Any]], Any], items: list[Any]) -> Any:
    with same_draws(secret_seed()):  # and the run's own generators stay where they are
        return collate(items)


def _equal(a: Any, b: Any) -> bool:
    pairs = [(x, y) for (_, x), (_, y) in zip(tensors_in(a), tensors_in(b), strict=True)]
    return all(x.shape == y.shape and bool(((x == y) | (x.isnan() & y.isnan())).all()) for x, y in pairs)
