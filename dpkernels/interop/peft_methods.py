"""Which of PEFT's methods have a norm rule, and why the others have none. docs/peft.md is the table for users."""

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
# package -> classes that work as they are: their parameters are those of layers that have rules
PLAIN: dict[str, tuple[str, ...]] = {
    "ln_tuning": ("LNTuningLayer",),
    "oft": ("Linear", "OFTRotationModule", "MultiplicativeDropoutLayer"),
    "prompt_tuning": ("PromptEmbedding",),
    "p_tuning": ("PromptEncoder",),
    "prefix_tuning": ("PrefixEncoder",),
    "trainable_tokens": ("TrainableTokensLayer",),
}
DORA = ("DoraLinearVariant", "DoraConv1dVariant", "DoraConv2dVariant", "DoraConv3dVariant")

_WHOLE = (
    "its update is made of a whole weight matrix, of which a per-sample gradient is as large as the weight"
)
REASONS: dict[str, str] = {
    "adalora": "it chooses ranks by gradients that are not private, and its loss has a term that no example owns",
    "adaption_prompt": "it reads the attention's projections past their layers",
    "boft": _WHOLE,
    "cpt": "its loss and its projection after each step are the whole batch's",
    "hra": _WHOLE,
    "loha": _WHOLE,
    "lokr": _WHOLE,
    "multitask_prompt_tuning": "its rank-one factors are read as parameters of one task for each example",
    "poly": "its router mixes adapters by parameters of one task for each example",
    "xlora": "its classifier scales adapters through hooks, in a second forward of the model",
}


def peft_class(package: str, name: str) -> Any:
    """`name` of peft.tuners.<package>, None where this version of PEFT has none."""
    for module in (f"peft.tuners.{package}.layer", f"peft.tuners.{package}.model"):
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ImportError:
            continue
        if found is not None:
            return found
    return None


def refusal(module: nn.Module) -> str | None:
    """Why nothing below this layer of PEFT's can be trained privately, with the fix; None where it can be."""
    own = original_class(module)
    parts = own.__module__.split(".")
    if parts[:2] != ["peft", "tuners"] or len(parts) < 4:
        return None
    package = parts[2]
    if package == "lora":
        return _lora_refusal(module) if isinstance(module, LoraLayer) else None
    if isinstance(module, BaseTuner) and package != "xlora":
        return None  # around the whole model
    known = PLAIN.get(package, ()) + SHARED.get(package, ((), ()))[0]
    if own.__name__ not in known:
        if not any(p.requires_grad for p in module.parameters()):
            return None
        reason = REASONS.get(package, "no rule is written for how it uses its parameters")
        return f"PEFT's {own.__name__} ({package}) has no norm rule: {reason}; use LoRA, DoRA or (IA)³, or freeze it"
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
    """PEFT looks its adapters up with the embedding's own options."""
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(base, option):
            return f"{option}={getattr(base, option)} has no norm rule; build the embedding without, or freeze it"
    return None


def _base_refusal(module: Any, what: str) -> str | None:
    """Methods that read the base layer's parameters themselves, past its rule, need them frozen."""
    if any(p.requires_grad for p in module.get_base_layer().parameters()):
        return f'{what} reads the base layer past its rule, so that it has to be frozen: bias="none", no training of it'
    return None
