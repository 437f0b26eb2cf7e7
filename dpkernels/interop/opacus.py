"""Opacus: norm samplers for its ghost clipping (`grad_sample_mode="ghost"`), made of this package's ops.

Opacus looks a layer's type up in a process-wide table each time its hooks run. A type found there gets its norms
from the function in the table; any other trained layer gets per-sample gradients, from a hand-written function or
from `torch.func`, whose norms are then taken. `register` puts functions of ours into that table. Norms are all that
changes: the clip factors, the second backward that sums the clipped gradients, the noise and the accounting stay
Opacus's. docs/opacus.md says what that means.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpkernels import ops
from dpkernels.nn.layers.conv import weight_record, zero_padding
from dpkernels.nn.tensors import accumulation_dtype, as_tokens, no_autocast

logger = logging.getLogger("dpkernels")

Sampler = Callable[[Any, list[Tensor], Tensor], dict[nn.Parameter, Tensor]]
"""(layer, [input [B,*]], gradient of the output [B,*]) -> {trained parameter: norms [B]}."""

_PARAMETERS = ["layer", "activations", "backprops"]
_KNOWN = "1.5.4 to 1.6.0"
_SLACK = 1.0 + 2.0**-40


def _norm(square: Tensor) -> Tensor:
    """√square as float64, rounded up: [B] float32 upper bounds of squares to [B] upper bounds of norms.

    float64, so that what Opacus makes of the norms is float64 too: the root of the sum of their squares and the
    factor. The slack covers this root's rounding and that of Opacus's total over up to some 10⁴ parameters, whose
    float64 sum of n squares is short by at most n·2⁻⁵³.
    """
    return square.double().sqrt() * _SLACK


def _samplers(weight: Callable[[Any, Tensor, Tensor], Tensor], channels_first: bool) -> Sampler:
    """The sampler of a layer with a weight, whose squared norms `weight(layer, x, g)` gives, and perhaps a bias."""

    def sample(layer: Any, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
        found, bias = {}, getattr(layer, "bias", None)
        with torch.no_grad(), no_autocast(backprops.device.type):
            if layer.weight is not None and layer.weight.requires_grad:
                found[layer.weight] = _norm(weight(layer, activations[0], backprops))
            if bias is not None and bias.requires_grad:
                rows = _channels_last(backprops) if channels_first else _rows(backprops, bias.dim())
                found[bias] = _norm(ops.bias_norm_sq(rows))
        return found

    return sample


def _channels_last(t: Tensor) -> Tensor:
    """[B,C,*] or [B,C] -> [B,T,C]."""
    return t.unsqueeze(1) if t.dim() == 2 else t.flatten(2).transpose(1, 2)


def _rows(t: Tensor, n: int) -> Tensor:
    """[B,*,n last sizes] -> [B,T,their product]."""
    return as_tokens(t.flatten(-n))


def _linear(layer: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    # g's dtype is the one that the layer computed in; under autocast its input may still be wider
    return ops.linear_norm_sq(as_tokens(x.to(g.dtype)), as_tokens(g))


def _embedding(layer: nn.Embedding, ids: Tensor, g: Tensor) -> Tensor:
    for name in ("max_norm", "scale_grad_by_freq"):
        if getattr(layer, name):
            raise NotImplementedError(
                f"nn.Embedding: {name}={getattr(layer, name)} lets one example change what another's gradient is; "
                "build it without, or freeze it"
            )
    ids = ids.long().unsqueeze(1) if ids.dim() == 1 else ids.long().flatten(1)
    return ops.embedding_norm_sq(ids, as_tokens(g), padding_idx=layer.padding_idx)


def _conv(layer: nn.Conv1d | nn.Conv2d, x: Tensor, g: Tensor) -> Tensor:
    x, padding = zero_padding(layer, x.to(g.dtype))
    return weight_record(layer, type(layer).__name__, x, g, padding).norm_sq()


def _normalised(normalise: Callable[[Any, Tensor], Tensor], channels_first: bool) -> Sampler:
    """The sampler of a layer y = x̂ ⊙ w + b; `normalise(layer, x)` gives x̂, in float32 for any narrower type."""

    def weight(layer: Any, x: Tensor, g: Tensor) -> Tensor:
        wide = accumulation_dtype(g)
        x_hat, g = normalise(layer, x.to(wide)), g.to(wide)
        as_sequence = _channels_last if channels_first else functools.partial(_rows, n=layer.weight.dim())
        return ops.layer_norm_norm_sq(as_sequence(x_hat), as_sequence(g))

    return _samplers(weight, channels_first)


SAMPLERS: Mapping[type[nn.Module], Sampler] = MappingProxyType(
    {
        nn.Linear: _samplers(_linear, channels_first=False),
        nn.Embedding: _samplers(_embedding, channels_first=False),
        nn.Conv1d: _samplers(_conv, channels_first=True),
        nn.Conv2d: _samplers(_conv, channels_first=True),
        nn.LayerNorm: _normalised(lambda m, x: F.layer_norm(x, m.normalized_shape, eps=m.eps), False),
        nn.RMSNorm: _normalised(lambda m, x: F.rms_norm(x, m.normalized_shape, eps=m.eps), False),
        nn.GroupNorm: _normalised(lambda m, x: F.group_norm(x, m.num_groups, eps=m.eps), True),
    }
)
"""Layer type (exactly that type, as Opacus looks it up) -> its norm sampler."""


@dataclass(frozen=True)
class Registration:
    """What one call of `register` installed; a context manager that takes it out again at the end.

    Attributes:
        replaced: layer type -> what gave its norms before, in words; only what this call changed.
    """

    replaced: Mapping[type[nn.Module], str]
    _before: Mapping[type[nn.Module], Sampler | None]
    _table: dict[type[nn.Module], Sampler]

    def unregister(self) -> None:
        """Put back what was there; a sampler that someone registered over ours since then is left, with a warning."""
        for layer, before in self._before.items():
            if self._table.get(layer) is not SAMPLERS[layer]:
                logger.warning(
                    "dpkernels.opacus: the norm sampler of %s is not ours any more; left", layer.__name__
                )
            elif before is None:
                del self._table[layer]
            else:
                self._table[layer] = before
        if self in _registrations:
            _registrations.remove(self)

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, *exception: object) -> None:
        self.unregister()

    def __str__(self) -> str:
        lines = [f"{layer.__name__}: instead of {before}" for layer, before in self.replaced.items()]
        return "\n".join(lines) or "nothing: dpkernels' norm samplers were registered already"


_registrations: list[Registration] = []


def register(layers: Iterable[type[nn.Module]] | None = None) -> Registration:
    """Have Opacus's ghost clipping take its per-sample norms from this package's ops, in this process, from now on.

    Of a layer with weight W and bias b, for sample i with input x_i [T,d] and output gradient g_i [T,p] as Opacus
    hands them over (a mean loss's already multiplied by B):

        nn.Linear     ‖Σ_t g_it x_itᵀ‖, ‖Σ_t g_it‖      `ops.linear_norm_sq`, `ops.bias_norm_sq`
        nn.Embedding  (Σ_v ‖Σ_{t: ids_it = v} g_it‖²)^½   `ops.embedding_norm_sq`; padding_idx counts 0
        nn.Conv1d, nn.Conv2d: depthwise conv1d `ops.depthwise_conv1d_norm_sq`, others a linear layer on windows
        nn.LayerNorm, nn.RMSNorm, nn.GroupNorm  ‖Σ_t x̂_it ⊙ g_it‖, ‖Σ_t g_it‖   `ops.layer_norm_norm_sq`

    Each is [B] float64, in units of the gradient, and not below the exact norm for the x and g (x̂ in float32) given;
    the one exception is a depthwise convolution with more than one filter a channel, or of images, whose gradients
    are materialised in float32. dtypes: bfloat16, float16, float32, float64; inputs of any number of dimensions with
    the batch first, or second under `batch_first=False`. Models made private before or after this call are served
    alike. A second call changes nothing.

    Args:
        layers: types among SAMPLERS to serve; None: all. A layer that is called twice in a forward is refused by
            Opacus where its type has a norm sampler, so leave out nn.LayerNorm and such where one is reused.

    Returns:
        The registration: `print` it to see what was replaced, `unregister()` or leave its `with` block to undo it.

    Raises:
        ImportError: Opacus is not installed.
        ValueError: a type that this package has no sampler for.
        RuntimeError: this Opacus keeps its norm samplers in another way.
        NotImplementedError: at the backward, an nn.Embedding with max_norm or scale_grad_by_freq.

    Source: Opacus's `register_norm_sampler`; Li et al. 2021, arXiv:2110.05679 (ghost clipping).
    """
    wanted = list(SAMPLERS) if layers is None else list(layers)
    for layer in wanted:
        if layer not in SAMPLERS:
            known = ", ".join(one.__name__ for one in SAMPLERS)
            raise ValueError(f"layers: given {layer}; there are samplers for exactly {known}")
    table, gradients = _tables()
    before = {layer: table.get(layer) for layer in wanted if table.get(layer) is not SAMPLERS[layer]}
    replaced = {layer: _in_words(sampler, gradients.get(layer)) for layer, sampler in before.items()}
    table.update({layer: SAMPLERS[layer] for layer in before})
    made = Registration(MappingProxyType(replaced), MappingProxyType(before), table)
    _registrations.append(made)
    return made


def unregister() -> None:
    """Undo every `register` of this process, the last first; without one it does nothing."""
    for made in reversed(list(_registrations)):
        made.unregister()


def _in_words(norms: Sampler | None, gradients: Sampler | None) -> str:
    if norms is not None:
        return f"the norms of {norms.__module__}.{norms.__qualname__}"
    if gradients is not None:
        return f"per-sample gradients, computed by {gradients.__module__}.{gradients.__qualname__}"
    return "per-sample gradients, computed by torch.func"


def _tables() -> tuple[dict[type[nn.Module], Sampler], Mapping[type[nn.Module], Sampler]]:
    """Opacus's norm samplers (the table itself) and grad samplers."""
    try:
        opacus = importlib.import_module("opacus")
    except ModuleNotFoundError as error:
        if error.name != "opacus":
            raise
        raise ImportError(
            "dpkernels.opacus.register: Opacus is not installed; pip install 'opacus>=1.5.4', or train with "
            "dpkernels.PrivacyEngine, which does not need it",
            name="opacus",
        ) from error
    holder = getattr(
        importlib.import_module("opacus.grad_sample"), "GradSampleModuleFastGradientClipping", None
    )
    table: Any = getattr(holder, "NORM_SAMPLERS", None)
    gradients: Any = getattr(holder, "GRAD_SAMPLERS", None)
    problem = ""
    if holder is None:
        problem = "opacus.grad_sample has no GradSampleModuleFastGradientClipping"
    elif not isinstance(table, dict) or not isinstance(gradients, Mapping):
        problem = "its NORM_SAMPLERS and GRAD_SAMPLERS are not both dicts"
    elif nn.Linear not in table:
        problem = "its NORM_SAMPLERS has no nn.Linear"
    elif table[nn.Linear] is not SAMPLERS[nn.Linear]:
        given = list(inspect.signature(table[nn.Linear]).parameters)
        if given != _PARAMETERS:
            problem = f"its norm samplers take ({', '.join(given)}), not ({', '.join(_PARAMETERS)})"
    if problem:
        version = getattr(opacus, "__version__", "of unknown version")
        raise RuntimeError(
            f"dpkernels.opacus.register: given Opacus {version}: {problem}; versions {_KNOWN} are known to fit: "
            f"pip install 'opacus=={_KNOWN.rpartition(' ')[2]}', or train with "
            "dpkernels.PrivacyEngine"
        )
    return table, gradients
