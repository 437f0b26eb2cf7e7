"""Control of the model's own random draws during a check: without dropout, and with the same draws in every forward."""

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
    """Put the model's dropout layers into evaluation mode; with `functional`, also disable the dropouts of
    `torch.nn.functional` and of attention.

    The functions are replaced in `torch.nn.functional`, for all threads: a torch function mode would not be active in
    the thread in which CUDA's backward recomputes a checkpointed block, and would make compiled code compile again.
    Only one check runs at a time, since two would take each other's replacements for torch's functions.
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
            setattr(F, name, _identity)
        if functional:
            F.scaled_dot_product_attention = _without_attention_dropout(attention)
        yield
    finally:
        for name, function in replaced.items():
            setattr(F, name, function)
        F.scaled_dot_product_attention = attention
        for layer in layers:
            layer.training = True


def _identity(input: Tensor, *_: Any, **__: Any) -> Tensor:
    return input


def _without_attention_dropout(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def undropped(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,  # nn.MultiheadAttention gives it by position
        **options: Any,
    ) -> Tensor:
        return attention(query, key, value, attn_mask, is_causal=is_causal, **options)

    return undropped


@contextmanager
def same_draws(seed: int) -> Iterator[None]:
    """Seed torch's, numpy's and Python's global generators with `seed`, and restore their states at the end.

    Dropout masks depend on the shape only, so batches of one shape get the same masks. The seed must be secret, like
    the generators' own seeds in a private run: `SecretSeeds` does not report seeds set here.
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
    """States of the global generators: torch's, the current GPU's, numpy's and Python's."""
    states = [torch.get_rng_state().numpy().tobytes(), *foreign_generator_states()]
    if torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state().numpy().tobytes())
    return states


def foreign_generator_states() -> list[bytes]:
    """States of Python's and numpy's global generators."""
    _, numbers, place, *_ = np.random.get_state()
    return [repr(random.getstate()).encode(), np.asarray(numbers).tobytes(), repr(place).encode()]


class SecretSeeds:
    """Seeds torch's, numpy's and Python's global generators from the operating system, and detects other seeds.

    Dropout masks depend on an example's position in the batch. Under a known seed one more example shifts the masks of
    all the others, and changes the sum by far more than C. With secret masks, drawn independently of the data, the sum
    changes by at most C.

    Only torch's generators report their initial seed. numpy's and Python's do not, and may legitimately be in any
    state, so every call of `renew` seeds them again.
    """

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Seed all generators again from the operating system."""
        self._seed = secret_seed()
        torch.manual_seed(self._seed)
        np.random.seed(int.from_bytes(os.urandom(4), "little"))
        random.seed(os.urandom(32))

    def replaced(self) -> list[str]:
        """Names of torch's generators that were seeded since `renew`, except by a `same_draws` around this call."""
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
