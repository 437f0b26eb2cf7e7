"""Digests of a few examples, by which several processes find out whether they number one data set alike."""

import dataclasses
import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dpkernels.privacy.rng.model_draws import same_draws

logger = logging.getLogger("dpkernels")

EXAMPLES = 8


def digests_of(dataset: Any) -> list[str]:
    """Digests of EXAMPLES examples spread over the data set, the first and the last among them.

    Two processes whose files are listed in another order would put one recording into a step twice, under two numbers.
    All processes read under one seed, so that augmentation by the global generators is the same. What is still read
    differently twice cannot be compared; the rest of the example is, its label for instance, and the log says so.
    """
    size = len(dataset)
    places = sorted({math.floor(place) for place in np.linspace(0, size - 1, EXAMPLES)})
    once, again = (_read(dataset, places) for _ in range(2))
    if once != again:
        logger.info(
            "examples are read differently each time, so it was not checked on all of their content that all processes "
            "number them alike: their order in the data set must be the same on every machine"
        )
    return list(map(_digest, once, again))


def _read(dataset: Any, places: Sequence[int]) -> list[list[tuple[bytes, bytes]]]:
    with same_draws(0):
        return [list(_parts(dataset[place])) for place in places]


def _digest(once: Sequence[tuple[bytes, bytes]], again: Sequence[tuple[bytes, bytes]]) -> str:
    """The digest of what two readings of an example have in common."""
    if len(once) != len(again):
        return "random"
    digest = hashlib.sha256()
    for part, second in zip(once, again, strict=True):
        for item in part if part == second else (b"random",):
            digest.update(hashlib.sha256(item).digest())
    return digest.hexdigest()[:16]


def _parts(value: Any) -> Iterator[tuple[bytes, bytes]]:
    """Form and content of an example's tensors, arrays, texts and numbers; of other objects the type alone."""
    if isinstance(value, torch.Tensor) and value.layout == torch.strided:
        value = value.detach().cpu().contiguous()
        form = f"{value.dtype}{tuple(value.shape)}"
        yield form.encode(), value.reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        yield f"{value.dtype}{value.shape}".encode(), np.ascontiguousarray(value).tobytes()
    elif isinstance(value, np.ndarray):  # of objects: its bytes are addresses
        yield from _parts(value.tolist())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield repr(key).encode(), b""
            yield from _parts(item)
    elif isinstance(value, list | tuple):
        yield f"[{len(value)}".encode(), b""
        for item in value:
            yield from _parts(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _parts({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    elif isinstance(value, str | bytes | int | float | bool | type(None)):
        yield b"", repr(value).encode()
    else:
        yield type(value).__name__.encode(), b""
