"""The model's own random draws during a check: dropout off, and one draw for every forward."""

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

_DROPOUTS = (
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "alpha_dropout",
    "feature_alpha_dropout",
)


_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def without_dropout(model: nn.Module, *, functional: bool) -> Iterator[None]:
    """The model's dropout layers in evaluation mode; where `functional`, `torch.nn.functional`'s dropouts and
    attention's drop nothing either.

    The functions are replaced where modules look them up, for all threads: a mode for torch functions would not be
    there where CUDA's backward computes a checkpointed block again. Compiled code would be compiled anew for it.
    One check at a time: two would take each other's functions for torch's own.
    """
    with _ONE_AT_A_TIME if functional else nullcontext():
        yield from _without_dropout(model, functional)


def _without_dropout(model: nn.Module, functional: bool) -> Iterator[None]:
    layers = [module for module in model.modules() if isinstance(module, _DropoutNd) and module.training]
    replaced = {name: getattr(F, name) for name in _DROPOUTS} if functional else {}
    attention = F.scaled_dot_product_attention
    for layer in layers:
        layer.training = False
    try:
        for name in replaced:
            setattr(F, name, _kept)
        if functional:
            F.scaled_dot_product_attention = _undropped(attention)
        yield
    finally:
        for name, function in replaced.items():
            setattr(F, name, function)
        F.scaled_dot_product_attention = attention
        for layer in layers:
            layer.training = True


def _kept(input: Tensor, *_: Any, **__: Any) -> Tensor:
    return input


def _undropped(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def with_all(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,  # by position in nn.MultiheadAttention
        **options: Any,
    ) -> Tensor:
        return attention(query, key, value, attn_mask, is_causal=is_causal, **options)

    return with_all


@contextmanager
def same_draws(seed: int) -> Iterator[None]:
    """torch's, numpy's and Python's global generators begin at `seed`, and go on afterwards where they were.

    Masks of dropout are drawn by shape, so batches of one shape get the same ones. The seed must be secret, as the
    generators' own is in a private run.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    numpys, pythons = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpys)
            random.setstate(pythons)


def generator_states() -> list[bytes]:
    """Of the global generators: torch's, the current GPU's, numpy's and Python's."""
    found = [torch.get_rng_state().numpy().tobytes(), repr(random.getstate()).encode()]
    _, numbers, place, *_ = np.random.get_state()
    found += [np.asarray(numbers).tobytes(), repr(place).encode()]
    if torch.cuda.is_initialized():
        found.append(torch.cuda.get_rng_state().numpy().tobytes())
    return found


def secret_seed() -> int:
    """64 bits from the operating system."""
    return int.from_bytes(os.urandom(8), "little")
