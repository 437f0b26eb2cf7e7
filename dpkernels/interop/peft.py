"""PEFT: GhostLoRALinear, PEFT's own LoRA layer with a private path.

It is a subclass of `peft.tuners.lora.Linear`, so saving, loading, merging, disabling and switching adapters
are PEFT's. PEFT's adapters are themselves nn.Linear (or convolutions) and are swapped like any other: that
alone is exact, and serves what the fused path does not (several active adapters, lora_bias, Conv1D bases,
LoRA on convolutions).
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention as LoraMultiheadAttention
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from dpkernels.nn import GhostLinear, GhostModule, register_refusal, register_swap
from dpkernels.nn.lora import ghost_lora


class GhostLoRALinear(GhostModule, LoraLinear):
    """`peft.tuners.lora.Linear` with the private path of `dpkernels.nn.lora`: made by `swap`.

    The fused path is taken for one active, unmerged, plain (or rank-stabilised) adapter over an nn.Linear;
    any other state runs PEFT's own forward over the swapped inner layers.
    """

    ghost_covers = ()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's."""
        adapter = None if args or kwargs else self._fused_adapter()
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        base: Any = self.base_layer
        a: Any = self.lora_A[adapter].weight
        b: Any = self.lora_B[adapter].weight
        if not self._ghost_active(base.weight, base.bias, a, b):
            return super().forward(x)
        dropout = self.lora_dropout[adapter]
        dropped = self.training and isinstance(dropout, nn.Dropout) and dropout.p > 0
        # PEFT casts before it drops.
        adapter_input = dropout(self._cast_input_dtype(x, a.dtype)) if dropped else None
        return ghost_lora(self, x, adapter_input, base.weight, base.bias, a, b, self.scaling[adapter])

    def _fused_adapter(self) -> str | None:
        """The adapter that the fused path may serve now, or None."""
        if self.ghost_tape is None or self.disable_adapters or self.merged:
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or active[0] in self.lora_variant or not self.cast_input_dtype_enabled:
            return None
        (name,) = active
        layers = (self.base_layer, self.lora_A[name], self.lora_B[name])
        plain = all(type(layer) in (nn.Linear, GhostLinear) and not _has_hooks(layer) for layer in layers)
        known = isinstance(self.lora_dropout[name], nn.Dropout | nn.Identity)
        return name if plain and known and self.lora_B[name].bias is None else None


def _has_hooks(module: nn.Module) -> bool:
    """Hooks on an inner layer only run when that layer is called, which the fused path does not do."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _refusal(module: nn.Module) -> str | None:
    if not isinstance(module, LoraLayer):
        return None
    if module.lora_variant:
        variant = type(next(iter(module.lora_variant.values()))).__name__
        return f"PEFT's {variant} has no norm rule; use plain LoRA (or use_rslora=True)"
    if isinstance(module, LoraMultiheadAttention | ParamWrapper):
        base = type(module.get_base_layer()).__name__
        return f"PEFT's LoRA on {base} has no norm rule; leave it out of target_modules"
    if len(module.lora_embedding_A) > 0:
        return "PEFT's LoRA on an embedding has no norm rule; leave it out of target_modules"
    return None


def register() -> None:
    """Make PEFT's layers known to `dpkernels.swap` and `dpkernels.nn.coverage`."""
    register_swap(LoraLinear, GhostLoRALinear)
    register_refusal(_refusal)
