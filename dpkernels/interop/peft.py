"""PEFT: GhostPeftLoRALinear, PEFT's own LoRA layer with a private path, and the registration of all PEFT methods.

It is a subclass of `peft.tuners.lora.Linear`, so saving, loading, merging, disabling and switching adapters
are PEFT's. PEFT's adapters are themselves nn.Linear (or convolutions), and `swap` converts them like any other. That
alone is exact, and covers the cases without a fused path (several active adapters, lora_bias, Conv1D bases, LoRA on
convolutions).
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import dora
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import Tensor, nn

from dpkernels.interop import peft_methods
from dpkernels.interop.peft_embedding import GhostPeftLoRAEmbedding, GhostPeftTrainableTokens
from dpkernels.interop.peft_parameters import (
    GhostDora,
    GhostParameterDict,
    SharedParameterDict,
    SharedPeftLayer,
)
from dpkernels.nn import GhostLinear, GhostModule, register_child_swap, register_refusal, register_swap
from dpkernels.nn.layers.lora import ghost_lora


class GhostPeftLoRALinear(GhostModule, LoraLinear):
    """`peft.tuners.lora.Linear` with the private path of `dpkernels.nn.layers.lora`; `swap` creates it.

    It is no `dpkernels.GhostLoRALinear`, though it computes the same. That is an nn.Linear with one adapter: its
    `lora_A` is a parameter and its `scaling` a number. PEFT has one of each for every adapter, by name, around a
    `base_layer`. Code written for either would misread the other. Both are GhostModules.

    One active, unmerged, plain (or rank-stabilised) adapter over an nn.Linear takes the fused path.
    Any other state runs PEFT's own forward over the swapped inner layers.
    """

    ghost_covers = ()
    ghost_in_graph = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's."""
        fused = None if args or kwargs else self._fused()
        if fused is None:
            return super().forward(x, *args, **kwargs)
        base, lora_a, lora_b, dropout, scaling = fused
        # Not by attribute: nn.Module looks its modules and parameters up last, which takes half a microsecond each.
        of_base, a, b = base._parameters, lora_a._parameters["weight"], lora_b._parameters["weight"]
        weight, bias = of_base["weight"], of_base["bias"]
        if not self._ghost_active(weight, bias, a, b):
            return super().forward(x)
        dropped = type(dropout) is nn.Dropout and dropout.training and dropout.p > 0
        # PEFT casts before dropout.
        adapter_input = dropout(self._cast_input_dtype(x, a.dtype)) if dropped else None
        return ghost_lora(self, x, adapter_input, weight, bias, a, b, scaling)

    def ghost_fused_rules(self) -> dict[nn.Parameter, str]:
        """The rule of A and B, if the fused path applies now."""
        parts = self._fusable_parts()
        return {} if parts is None else dict.fromkeys((parts[1].weight, parts[2].weight), "LoRA: ghost norm")

    def _fused(self) -> tuple[Any, Any, Any, Any, float] | None:
        """Base, A, B, dropout and scaling of the adapter for which the fused path applies now, or None.

        Called in every forward, since adapters can be switched and hooks added between forwards.
        """
        return None if self.ghost_tape is None else self._fusable_parts()

    def _fusable_parts(self) -> tuple[Any, Any, Any, Any, float] | None:
        if self.disable_adapters or self.merged:
            return None
        children: Any = self._modules
        active = [name for name in self.active_adapters if name in children["lora_A"]._modules]
        if len(active) != 1 or active[0] in self.lora_variant or not self.cast_input_dtype_enabled:
            return None
        (name,) = active
        base, a, b = (
            children["base_layer"],
            children["lora_A"]._modules[name],
            children["lora_B"]._modules[name],
        )
        dropout = children["lora_dropout"]._modules[name]
        plain = _are_plain(base, a, b) and b._parameters["bias"] is None
        plain = plain and type(dropout) in _DROPOUTS and not _has_hooks(dropout)
        return (base, a, b, dropout, self.scaling[name]) if plain else None


_DROPOUTS = (nn.Dropout, nn.Identity)


def _are_plain(*layers: nn.Module) -> bool:
    """Whether they are linear layers with their own parameters and without hooks, which the fused path would skip."""
    return all(
        type(layer) in (nn.Linear, GhostLinear)
        and layer._parameters.keys() >= {"weight", "bias"}
        and not _has_hooks(layer)
        for layer in layers
    )


def _has_hooks(layer: nn.Module) -> bool:
    return bool(
        layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    )


def _register_shared() -> None:
    for package, (names, dictionaries) in peft_methods.SHARED.items():
        for name in names:
            layer = peft_methods.peft_class(package, name)
            if layer is None or (layer, package) in _SHARING:
                continue
            body = {
                "__module__": f"{__name__}.{package}",
                "__doc__": f"PEFT's {package} layer {name}, private.",
            }
            _SHARING[layer, package] = type(f"Ghost{name}", (SharedPeftLayer, layer), body)
            for dictionary in dictionaries:
                register_child_swap(layer, dictionary, nn.ParameterDict, SharedParameterDict)
            register_swap(layer, _SHARING[layer, package])


def _register_dora() -> None:
    for name in ("DoraLinearLayer", "DoraConv1dLayer", "DoraConv2dLayer", "DoraConv3dLayer"):
        layer = getattr(dora, name, None)
        if layer is not None and layer not in _DORA:
            body = {"__module__": __name__, "__doc__": GhostDora.__doc__}
            _DORA[layer] = type(f"Ghost{name}", (GhostDora, layer), body)
            register_swap(layer, _DORA[layer])


_SHARING: dict[tuple[type, str], type[nn.Module]] = {}
_DORA: dict[type, type[nn.Module]] = {}


def register() -> None:
    """Register the rules and refusals for PEFT's layers with `dpkernels.swap` and `dpkernels.nn.uncovered`."""
    register_swap(LoraLinear, GhostPeftLoRALinear)
    register_swap(LoraEmbedding, GhostPeftLoRAEmbedding)
    for dictionary in ("lora_embedding_A", "lora_embedding_B"):
        register_child_swap(LoraEmbedding, dictionary, nn.ParameterDict, GhostParameterDict)
    register_swap(TrainableTokensLayer, GhostPeftTrainableTokens)
    register_child_swap(TrainableTokensLayer, "trainable_tokens_delta", nn.ParameterDict, GhostParameterDict)
    _register_shared()
    _register_dora()
    register_refusal(peft_methods.refusal)
