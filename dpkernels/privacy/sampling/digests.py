"""Digests of a few examples, by which several processes find out whether they number one data set alike."""

import dataclasses
import hashlib
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

logger = logging.getLogger("dpkernels")

EXAMPLES = 8


def digests_of(dataset: Any) -> list[str]:
    """Digests of EXAMPLES examples spread over the data set, the first and the last among them.

    Two processes whose files are listed in another order would put one recording into a step twice, under two numbers.
    An example that is read differently twice (random augmentation) cannot be compared: its digest is "random", and the
    log says so.
    """
    size = len(dataset)
    places = sorted({math.floor(place) for place in np.linspace(0, size - 1, EXAMPLES)})
    once, again = ([_digest(dataset[place]) for place in places] for _ in range(2))
    digests = [first if first == second else "random" for first, second in zip(once, again, strict=True)]
    if "random" in digests:
        logger.info(
            "examples are read differently each time, so it was not checked that all processes number them alike: "
            "their order in the data set must be the same on every machine"
        )
    return digests


def _digest(example: Any) -> str:
    digest = hashlib.sha256()
    for part in _parts(example):
        digest.update(part)
    return digest.hexdigest()[:16]


def _parts(value: Any) -> Iterator[bytes]:
    """The content of an example's tensors, arrays, texts and numbers; of other objects their type alone."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield value.reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype}{value.shape}".encode()
        yield np.ascontiguousarray(value).tobytes()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield repr(key).encode()
            yield from _parts(item)
    elif isinstance(value, list | tuple):
        yield f"[{len(value)}".encode()
        for item in value:
            yield from _parts(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _parts(vars(value))
    elif isinstance(value, str | bytes | int | float | bool | type(None)):
        yield repr(value).encode()
    else:
        yield type(value).__name__.encode()
