"""The self-check's batch: examples of the data set, collated by the loader's collate_fn together and each alone.

Only collate_fn shows how the rest of a batch changes an example, above all by padding: an already padded batch has no
trace of it. So examples of different sizes are collated, shorter ones beside longer ones, and each alone.
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

_MEASURED = 32
"""Number of examples that are read to find two of different sizes, if the sizes are not known."""


@dataclass(frozen=True)
class OwnBatch:
    """A batch of the data set's examples, and each of them alone. NOT PRIVATE.

    Attributes:
        batch: all examples, collated together.
        singles: each example, collated alone, in the order of the batch's rows.
        rows: the parts of the batch with one row for each example, found by comparing batch and singles.
        padded: whether an example is larger in the batch than alone.
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
    """Examples of a data set as a batch and alone; or the reason, as a sentence, why collate_fn cannot be checked.

    The examples have different sizes if there are any. Their rows are in neither ascending nor descending order of
    size, so that the check finds a model that sorts its rows.

    Args:
        dataset: map-style.
        collate: the loader's collate_fn.
        lengths: sizes of all examples, if known; else some examples are read and collated to measure them.
        examples: number of examples, at least two.

    Raises:
        Any error of dataset and collate.
    """
    count = min(examples, len(dataset))
    if lengths is not None:
        order = np.argsort(np.asarray(lengths), kind="stable")
        items = _read(dataset, [int(order[place]) for place in _spread(len(order), count)])
    else:
        items = _of_different_sizes(dataset, collate, count)
    items = [*items[1:-1], items[0], items[-1]] if len(items) > 2 else items[::-1]
    batch, repeated = (_collated(collate, items) for _ in range(2))
    if not _equal(batch, repeated):
        return (
            "the effect of padding: two calls of collate_fn return different batches for the same examples, so an "
            "example alone cannot be compared with the same example in a batch"
        )
    singles = [_collated(collate, [item]) for item in items]
    rows = rows_of(batch, len(items), singles=singles)
    places = rows.order_in(batch, singles)
    if places is None and _equal(_collated(collate, items[::-1]), rows.taken(batch, range(len(items))[::-1])):
        places = list(range(len(items)))  # the rows are in the order of the items, padded or changed
    if places is None:
        return (
            "the effect of padding: the rows of the batch cannot be matched to the examples, since collate_fn returns "
            "them in another order (does it sort?) and an example alone is not found in its row"
        )
    singles = [singles[place] for place in places]
    padded = any(size_of(single) * len(items) < size_of(batch) for single in singles)
    return OwnBatch(batch, singles, rows, padded)


def form_of(batch: Any) -> Any:
    """The structure of a batch: tensors with their number of dimensions, in dicts, tuples, lists and dataclasses."""
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
    """`batch` with each tensor on the device of its counterpart in `model_batch`, which has the same form."""
    devices = iter([tensor.device for _, tensor in tensors_in(model_batch)])
    return map_tensors(batch, lambda tensor: tensor.to(next(devices)))


def _holds_tensors(value: Any) -> bool:
    return next(tensors_in(value), None) is not None


def size_of(batch: Any) -> int:
    """Number of entries of all tensors of a batch."""
    return sum(tensor.numel() for _, tensor in tensors_in(batch))


def _spread(size: int, count: int) -> list[int]:
    """`count` different indices in 0 ... size − 1, the first and the last among them."""
    return [math.floor(place) for place in np.linspace(0, size - 1, count)]


def _of_different_sizes(dataset: Any, collate: Callable[[list[Any]], Any], count: int) -> list[Any]:
    """`count` of about `_MEASURED` examples spread over the data set, from the smallest to the largest."""
    items = _read(dataset, _spread(len(dataset), min(len(dataset), max(_MEASURED, count))))
    sizes = [size_of(_collated(collate, [item])) for item in items]
    order = sorted(range(len(items)), key=sizes.__getitem__)
    return [items[order[place]] for place in _spread(len(order), count)]


def _read(dataset: Any, places: list[int]) -> list[Any]:
    get_items = getattr(dataset, "__getitems__", None)  # torch's own fetcher does the same
    return list(get_items(places)) if get_items else [dataset[place] for place in places]


def _collated(collate: Callable[[list[Any]], Any], items: list[Any]) -> Any:
    with same_draws(secret_seed()):  # the global generators keep their states
        return collate(items)


def _equal(a: Any, b: Any) -> bool:
    pairs = [(x, y) for (_, x), (_, y) in zip(tensors_in(a), tensors_in(b), strict=True)]
    return all(x.shape == y.shape and bool(((x == y) | (x.isnan() & y.isnan())).all()) for x, y in pairs)
