"""Where the rows of a `datasets.Dataset` lie in memory: two rows at one place are one example, listed twice.

`concatenate_datasets([d, d])` copies nothing, and the table that it makes holds the chunks of `d` twice.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

Place = tuple[tuple[int, ...], int]
"""Addresses of a column's buffers, and the entry within them."""

Chunk = tuple[tuple[int, ...], int, int]
"""Addresses of a chunk's buffers, its first entry and its end."""


def chunks_repeat(dataset: Any) -> bool:
    """Whether chunks of a table share rows in every column whose memory is known."""
    columns = _columns(dataset)
    return bool(columns) and all(_overlap(column) for column in columns)


def rows_in_memory(dataset: Any) -> list[tuple[Place, ...]] | None:
    """The places of each row of a table, one for each column whose memory is known; None if there is none."""
    columns = _columns(dataset)
    if not columns:
        return None
    places = [
        [(addresses, row) for addresses, first, end in column for row in range(first, end)]
        for column in columns
    ]
    return list(zip(*places, strict=True))


def _columns(dataset: Any) -> list[list[Chunk]]:
    """The chunks of each column whose memory is known."""
    table: Any = getattr(dataset, "data", None)
    if not hasattr(table, "num_columns") or not hasattr(table, "column"):
        return []
    columns = []
    for number in range(table.num_columns):
        parts = [_parts(chunk) for chunk in table.column(number).chunks if len(chunk)]
        # chunks of one column have the same fields, unless a field has no memory of its own
        columns += [list(field) for field in zip(*parts, strict=True)] if len({*map(len, parts)}) == 1 else []
    return columns


def _parts(chunk: Any) -> list[Chunk]:
    """A chunk, or the parts of it that are a struct's fields.

    Nothing for types whose entries begin at an offset of their children (lists of a fixed size).
    """
    kind = str(chunk.type)
    if kind.startswith("struct<"):
        return [part for field in chunk.flatten() for part in _parts(field)]
    if chunk.type.num_fields and not kind.startswith(("list<", "large_list<")):
        return []
    addresses = tuple(
        buffer.address for buffer in chunk.buffers()[1:] if buffer is not None
    )  # not the nulls'
    return [(addresses, chunk.offset, chunk.offset + len(chunk))] if addresses else []


def _overlap(chunks: list[Chunk]) -> bool:
    return any(
        first == second and start < end for (first, _, end), (second, start, _) in pairwise(sorted(chunks))
    )
