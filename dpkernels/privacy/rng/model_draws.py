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
_CHECKS = threading.local()


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
    generators' own is in a private run, so that `SecretSeeds` says nothing of it.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    numpys, pythons = np.random.get_state(), random.getstate()
    within = getattr(_CHECKS, "depth", 0)
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        _CHECKS.depth = within + 1
        try:
            yield
        finally:
            _CHECKS.depth = within
            np.random.set_state(numpys)
            random.setstate(pythons)


def generator_states() -> list[bytes]:
    """Of the global generators: torch's, the current GPU's, numpy's and Python's."""
    found = [torch.get_rng_state().numpy().tobytes(), *foreign_generator_states()]
    if torch.cuda.is_initialized():
        found.append(torch.cuda.get_rng_state().numpy().tobytes())
    return found


def foreign_generator_states() -> list[bytes]:
    """Of Python's and numpy's global generators."""
    _, numbers, place, *_ = np.random.get_state()
    return [repr(random.getstate()).encode(), np.asarray(numbers).tobytes(), repr(place).encode()]


class SecretSeeds:
    """torch's, numpy's and Python's global generators, seeded from the operating system, and seen to stay so.

    Dropout masks are drawn by place in the batch: under a known seed one more example shifts the masks of all the
    others, and changes the sum by far more than C. Secret masks, drawn independently of the data, do not.

    torch's generators tell the seed that they began at. numpy's and Python's do not, and may have any state for good
    reasons: `renew` seeds them anew wherever it is called.
    """

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Seed all of them anew from the operating system."""
        self._seed = secret_seed()
        torch.manual_seed(self._seed)
        np.random.seed(int.from_bytes(os.urandom(4), "little"))
        random.seed(os.urandom(32))

    def replaced(self) -> list[str]:
        """Names of torch's generators that have been seeded since, other than by `same_draws` around this call."""
        if getattr(_CHECKS, "depth", 0):
            return []
        generators = {"torch's": torch.default_generator}
        if torch.cuda.is_initialized():
            generators |= {
                f"torch.cuda's (device {device})": generator
                for device, generator in enumerate(torch.cuda.default_generators)
            }
        return [name for name, generator in generators.items() if generator.initial_seed() != self._seed]


def secret_seed() -> int:
    """64 bits from the operating system."""
    return int.from_bytes(os.urandom(8), "little")
