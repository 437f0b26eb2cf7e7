"""Checks of the user's DataLoader: whether Poisson sampling can replace its batches."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)
from torch.utils.data.sampler import BatchSampler

from dpkernels.privacy.sampling.arrow_rows import chunks_repeat, rows_in_memory


def check_data_loader(data_loader: DataLoader) -> tuple[int, int]:
    """(N, expected batch size) of a DataLoader whose batches Poisson sampling can replace.

    Raises:
        TypeError: not a DataLoader.
        ValueError: an iterable dataset, a loader prepared by Accelerate, a custom sampler or batch sampler, drop_last,
            no batch size, or an empty dataset; each message has the reason and the fix.
    """
    if not isinstance(data_loader, DataLoader):
        kind = type(data_loader).__name__
        earlier = ", which an earlier make_private returned: give the DataLoader that it was made of"
        raise TypeError(
            f"data_loader must be a torch.utils.data.DataLoader, got {kind}{earlier if kind == 'DPDataLoader' else ''}"
        )
    if any(
        type(part).__module__.startswith("accelerate.") for part in (data_loader, data_loader.batch_sampler)
    ):
        raise ValueError(
            f"data_loader was prepared by Accelerate ({type(data_loader).__name__}), which deals out fixed batches to "
            "the processes: give the DataLoader as it was before Accelerator.prepare. The private loader draws from "
            "all examples, and gives each process its part of each draw"
        )
    if isinstance(data_loader.dataset, IterableDataset):
        raise ValueError(
            "data_loader: an IterableDataset cannot be Poisson-sampled (every example must be reachable by "
            "its index in every step); use a map-style dataset with __len__ and __getitem__"
        )
    if type(data_loader.batch_sampler) is not BatchSampler or data_loader.batch_size is None:
        raise ValueError(
            "data_loader: batch_sampler and batch_size=None are refused, since Poisson sampling draws the "
            "batches; give batch_size, which becomes the expected batch size"
        )
    if isinstance(data_loader.sampler, DistributedSampler):
        raise ValueError(
            "data_loader: sampler=DistributedSampler is refused: it deals a fixed part of the data set to each "
            "process, in batches of a fixed size, and ε accounts for draws from the whole of it. Leave sampler out: "
            "with several processes, each gets its part of every logical batch"
        )
    if type(data_loader.sampler) not in (RandomSampler, SequentialSampler) or getattr(
        data_loader.sampler, "replacement", False
    ):
        raise ValueError(
            f"data_loader: sampler={type(data_loader.sampler).__name__} is refused: it would change every "
            "example's probability of joining a step, which must be q = batch_size/N; leave sampler out"
        )
    if data_loader.drop_last:
        raise ValueError(
            "data_loader: drop_last=True has no meaning for Poisson-sampled batches; leave it out"
        )
    size = len(data_loader.dataset)  # type: ignore[arg-type]
    if size == 0:
        raise ValueError("data_loader: its dataset is empty; give a dataset with at least one example")
    if _may_repeat(data_loader.dataset):
        repeats = size - len(set(_sources(data_loader.dataset)))
        if repeats:
            raise ValueError(
                f"data_loader: {repeats} of its {size} examples are repetitions (the "
                f"{type(data_loader.dataset).__name__} lists them again): a repeated example would count several "
                "times in a step and once in ε. Keep each once, or use unit='speaker' with one id for its copies"
            )
    if data_loader.batch_size > size:
        raise ValueError(
            f"data_loader: batch_size={data_loader.batch_size} exceeds the dataset's {size} examples; it is "
            "the expected batch size, and the sampling rate batch_size/N must be <= 1"
        )
    return size, data_loader.batch_size


def _may_repeat(dataset: Any) -> bool:
    """Whether a data set lists examples of others, or of memory, so that repetitions can be seen."""
    if isinstance(dataset, Subset | ConcatDataset | list | tuple):
        return True
    return _chosen(dataset) is not None or chunks_repeat(dataset)


def _chosen(dataset: Any) -> list[int] | None:
    """The rows that a `datasets.Dataset` lists (`select`, `shuffle`, `interleave_datasets` choose them); else None."""
    indices: Any = getattr(dataset, "_indices", None)
    return indices.column(0).to_pylist() if hasattr(indices, "column") else None


def _sources(dataset: Any) -> Iterator[tuple[object, ...]]:
    """The source of each example: underlying data set and index, rows in memory, or the object in a list."""
    if isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from _sources(part)
    elif isinstance(dataset, Subset):
        inner = list(_sources(dataset.dataset))
        yield from (inner[index] for index in dataset.indices)
    elif type(dataset) is TensorDataset and all(t.numel() for t in dataset.tensors):
        # Two data sets may hold the same tensors, or overlapping slices of one tensor.
        rows = [(t.device, t.data_ptr(), t.stride(0) * t.element_size()) for t in dataset.tensors]
        for index in range(len(dataset)):
            yield tuple((device, start + index * step) for device, start, step in rows)
    elif isinstance(dataset, list | tuple):
        # Equal numbers and texts may be one object in two examples.
        plain = (int, float, complex, str, bytes, type(None))
        for index, item in enumerate(dataset):
            yield (id(dataset), index) if isinstance(item, plain) else ("object", id(item))
    elif (places := rows_in_memory(dataset)) is not None:
        chosen = _chosen(dataset)
        yield from places if chosen is None else (places[index] for index in chosen)
    elif (chosen := _chosen(dataset)) is not None:
        yield from ((id(dataset.data), index) for index in chosen)
    else:
        yield from ((id(dataset), index) for index in range(len(dataset)))
