"""A warning where torch's gradient clipping is called on a private model: it changes nothing, and returns 0.

A private model's gradients are clipped example by example within `optimizer.backward`, and the noised sum exists within
`optimizer.step` only. Between the two, where scripts call `clip_grad_norm_`, there is no `.grad`.

torch has no hook for these calls. So its functions are replaced when a model is first made private: the part of
`clip_grad_norm_` that scales gradients, which every way to import it calls, and `clip_grad_value_`. For every other
model they do what they did.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad
from torch.utils.weak import WeakIdKeyDictionary

# where a function is found, its name, and the stacklevel of a warning at its caller
_REPLACED = (
    (clip_grad, "_clip_grads_with_norm_", 4),
    (clip_grad, "clip_grad_value_", 2),
    (torch.nn.utils, "clip_grad_value_", 2),
)
_SHOWN = {"_clip_grads_with_norm_": "clip_grad_norm_"}

# trained parameter -> its private model
_MODEL_OF: WeakIdKeyDictionary = WeakIdKeyDictionary()
_WARNED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def watch_clipping(model: nn.Module, trained: Iterable[nn.Parameter]) -> None:
    """Warn, once, when torch's gradient clipping is called on these parameters of a private model."""
    reference = weakref.ref(model)
    for parameter in trained:
        _MODEL_OF[parameter] = reference
    _WARNED.discard(model)
    for place, name, depth in _REPLACED:
        function = getattr(place, name, None)
        if function is not None and not hasattr(function, "_dpkernels_replaced"):
            setattr(place, name, _noticing(function, _SHOWN.get(name, name), depth))


def _noticing(function: Callable[..., Any], name: str, depth: int) -> Callable[..., Any]:
    @functools.wraps(function)
    def noticed(parameters: Tensor | Iterable[Tensor], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(parameters, *args, **kwargs)
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        private = _private_model(parameters)
        if private is not None and private not in _WARNED:
            _WARNED.add(private)
            warnings.warn(_MESSAGE.format(name=name, model=type(private).__name__), stacklevel=depth)
        if private is not None and all(parameter.grad is None for parameter in parameters):
            return None  # torch's clip_grad_value_ would raise an error about an empty list
        return function(parameters, *args, **kwargs)

    noticed._dpkernels_replaced = True  # type: ignore[attr-defined]
    return noticed


_MESSAGE = (
    "{name} on the parameters of a private model ({model}) changes nothing, and what it returns is the norm of no "
    "gradient: optimizer.backward clips each example's gradient to max_grad_norm, and the noised gradient exists "
    "within optimizer.step() only. Leave the call out, and set make_private's max_grad_norm"
)


def _private_model(parameters: Iterable[Tensor]) -> nn.Module | None:
    """The model of one of these parameters, if that model is private now."""
    for parameter in parameters:
        reference = _MODEL_OF.get(parameter)
        model = None if reference is None else reference()
        if model is not None:
            attached = any(getattr(module, "ghost_tape", None) is not None for module in model.modules())
            return model if attached else None
    return None
