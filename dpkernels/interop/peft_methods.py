"""PEFT's methods that have a norm rule, and the reasons why the others have none. docs/peft.md has the user's table."""

from __future__ import annotations

import importlib
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention as LoraMultiheadAttention
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from dpkernels.nn import original_class

# package of peft.tuners -> its layer classes whose parameters are shared vectors, and the ParameterDicts that hold them
SHARED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "ia3": (("Linear", "Conv2d", "Conv3d"), ("ia3_l",)),
    "vera": (("Linear",), ("vera_lambda_b", "vera_lambda_d")),
    "road": (("Linear",), ("road_theta", "road_alpha")),
    "beft": (("Linear",), ("beft_bias",)),
}
# package -> classes that need no rule: their parameters belong to layers that have rules
PLAIN: dict[str, tuple[str, ...]] = {
    "ln_tuning": ("LNTuningLayer",),
    "oft": ("Linear", "OFTRotationModule", "MultiplicativeDropoutLayer"),
    "prompt_tuning": ("PromptEmbedding",),
    "p_tuning": ("PromptEncoder",),
    "prefix_tuning": ("PrefixEncoder",),
    "trainable_tokens": ("TrainableTokensLayer",),
}
DORA = ("DoraLinearVariant", "DoraConv1dVariant", "DoraConv2dVariant", "DoraConv3dVariant")

_FULL_SIZE = (
    "its update is computed from a whole weight matrix, so a per-sample gradient is as large as the weight"
)
REASONS: dict[str, str] = {
    "adalora": "it chooses ranks by gradients that are not private, and its loss has a term outside of the examples",
    "adaption_prompt": "it reads the weights of the attention's projections without calling the layers",
    "boft": _FULL_SIZE,
    "cpt": "its loss, and its projection after each step, depend on the whole batch",
    "hra": _FULL_SIZE,
    "loha": _FULL_SIZE,
    "lokr": _FULL_SIZE,
    "multitask_prompt_tuning": "it selects its rank-one factors for each example by a task",
    "poly": "its router mixes adapters by the parameters of a task, which it selects for each example",
    "xlora": "its classifier scales adapters through hooks, in a second forward of the model",
}


def peft_class(package: str, name: str) -> Any:
    """The class `name` of peft.tuners.<package>; None if this version of PEFT does not have it."""
    for module in (f"peft.tuners.{package}.layer", f"peft.tuners.{package}.model"):
        try:
            layer_class = getattr(importlib.import_module(module), name, None)
        except ImportError:
            continue
        if layer_class is not None:
            return layer_class
    return None


def refusal(module: nn.Module) -> str | None:
    """Why no parameter below this PEFT layer can be trained privately, with the fix; None if they can be."""
    layer_class = original_class(module)
    parts = layer_class.__module__.split(".")
    if parts[:2] != ["peft", "tuners"] or len(parts) < 4:
        return None
    package = parts[2]
    if package == "lora":
        return _lora_refusal(module) if isinstance(module, LoraLayer) else None
    if isinstance(module, BaseTuner) and package != "xlora":
        return None  # it wraps the whole model
    known = PLAIN.get(package, ()) + SHARED.get(package, ((), ()))[0]
    if layer_class.__name__ not in known:
        if not any(p.requires_grad for p in module.parameters()):
            return None
        reason = REASONS.get(package, "no rule is written for its use of its parameters")
        name = f"{layer_class.__name__} ({package})"
        return f"PEFT's {name} has no norm rule: {reason}; use LoRA, DoRA or (IA)³, or freeze it"
    return _tokens_refusal(module) if isinstance(module, TrainableTokensLayer) else None


def _tokens_refusal(module: Any) -> str | None:
    base = module.get_base_layer()
    if module.tied_adapter is not None or not isinstance(base, nn.Embedding):
        return "PEFT's trainable tokens of tied weights have no norm rule; untie the output layer"
    return _base_refusal(module, "PEFT's trainable tokens") or _option_refusal(base)


def _lora_refusal(module: Any) -> str | None:
    names = {type(variant).__name__ for variant in module.lora_variant.values()}
    for name in sorted(names.difference(DORA)):
        return f"PEFT's {name} has no norm rule; use plain LoRA (or use_rslora=True)"
    if names:
        return _base_refusal(module, "PEFT's DoRA")
    base = module.get_base_layer()
    if isinstance(module, LoraMultiheadAttention | ParamWrapper):
        return f"PEFT's LoRA on {type(base).__name__} has no norm rule; leave it out of target_modules"
    return _option_refusal(base) if isinstance(base, nn.Embedding) else None


def _option_refusal(base: nn.Embedding) -> str | None:
    """Refuse options of the base embedding, since PEFT looks its adapters up with the same options."""
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(base, option):
            return f"{option}={getattr(base, option)} has no norm rule; build the embedding without it, or freeze it"
    return None


def _base_refusal(module: Any, method: str) -> str | None:
    """Refuse trained parameters of the base layer if `method` reads them itself, without the layer's rule."""
    if any(p.requires_grad for p in module.get_base_layer().parameters()):
        return f'{method} reads the base layer without its rule; freeze the base layer (bias="none", no training of it)'
    return None
