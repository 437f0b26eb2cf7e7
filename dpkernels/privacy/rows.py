"""The examples of a batch in whatever form it has: tensors, dicts, named tuples, tuples and lists, batch first."""

from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor


def rows_of(batch: Any) -> int | None:
    """Rows of the first tensor of a batch; None where it holds none."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else None
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    return next((rows for rows in map(rows_of, parts) if rows is not None), None)


def take_sample(batch: Any, sample: int, batch_size: int) -> Any:
    """The one-example batch at `sample`: what has batch_size rows is sliced, everything else kept."""
    return with_rows(batch, batch_size, lambda rows: rows[sample : sample + 1], lambda texts: [texts[sample]])


def with_rows(
    batch: Any,
    batch_size: int,
    of_tensor: Callable[[Tensor], Tensor],
    of_list: Callable[[Sequence[Any]], list[Any]],
) -> Any:
    """The batch with other rows: `of_tensor` of every tensor of batch_size rows, `of_list` of every such list (texts,
    one an example), everything else kept; dicts, named tuples, tuples and lists are gone through.
    """

    def again(value: Any) -> Any:
        return with_rows(value, batch_size, of_tensor, of_list)

    if isinstance(batch, Tensor):
        return of_tensor(batch) if batch.dim() and batch.shape[0] == batch_size else batch
    if isinstance(batch, dict) or hasattr(batch, "items"):
        made = {key: again(value) for key, value in batch.items()}
        return (
            type(batch)(made) if isinstance(batch, UserDict) else made
        )  # transformers': read by attribute, too
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(again, batch))
    if isinstance(batch, list | tuple):
        if len(batch) == batch_size and not any(isinstance(value, Tensor) for value in batch):
            return type(batch)(of_list(batch))
        return type(batch)([again(value) for value in batch])
    return batch
