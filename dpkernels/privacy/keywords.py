"""Strategy and clipping names, and Opacus's keywords: accepted if they mean the same here, else refused with the
reason."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from dpkernels.deprecation import OLD_STRATEGIES, warn_renamed
from dpkernels.privacy.step.adaptive import AdaptiveClipping
from dpkernels.privacy.step.clipping import check_norm, is_per_layer

STRATEGIES = {
    "bookkeeping": "keeps x and g of every trained layer until the norms are known",
    "mixed": "keeps per-sample gradients instead, materialised in the backward, where they are at most half as large",
    "auto": "keeps x and g of a layer, or materialises its per-sample gradients, whichever takes less time",
    "two_pass": "keeps no trained layer's x and g: one backward for the norms, a second for the sums",
    "per_layer": "clips each layer on its own within one backward and keeps nothing; not flat clipping",
}
"""Strategies by name: the tensors that each holds until the weighted sums."""


class AccountantName(str):
    """The value of `engine.accountant`. Attributes of Opacus's accountant raise an error that names the replacement."""

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"engine.accountant is the name {str(self)!r} and has no {name!r}: call engine.get_epsilon(delta); "
            "engine.history has the steps spent"
        )


def strategy_called(strategy: str) -> str:
    """The present name of a strategy.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if strategy in OLD_STRATEGIES:
        warn_renamed(f"strategy={strategy!r}", f"strategy={OLD_STRATEGIES[strategy]!r}", stacklevel=4)
        return OLD_STRATEGIES[strategy]
    if strategy not in STRATEGIES:
        raise ValueError(
            f"strategy={strategy!r} is not available; available: "
            f"{'; '.join(f'{name!r} ({summary})' for name, summary in STRATEGIES.items())}. Use a smaller "
            "physical_batch_size for less memory."
        )
    return strategy


def adaptive_options(clipping: str | AdaptiveClipping) -> AdaptiveClipping | None:
    """The options of adaptive clipping; None for every other clipping."""
    if isinstance(clipping, AdaptiveClipping):
        return clipping
    return AdaptiveClipping() if clipping == "adaptive" else None


def check_clipping(
    clipping: str | AdaptiveClipping,
    max_grad_norm: float | Sequence[float] | Mapping[str, float],
    strategy: str,
) -> None:
    """Raise ValueError or TypeError unless clipping is flat, automatic or adaptive with one finite C > 0, or by layers
    under strategy="per_layer" (`clipping.per_layer_clip_norms` checks its norms)."""
    if (clipping, strategy) == ("automatic", "per_layer"):
        raise ValueError(
            "clipping='automatic' with strategy='per_layer' is refused: its factor comes from the norm of the whole "
            "gradient, which strategy='per_layer' never knows. Use another strategy, or clipping='flat'."
        )
    adaptive = adaptive_options(clipping) is not None
    known = (
        adaptive or clipping in ("flat", "automatic") or (clipping, strategy) == ("per_layer", "per_layer")
    )
    if not known:
        raise ValueError(
            f"clipping={clipping!r} is refused: per-layer clipping has sensitivity √ΣC_l² and needs "
            "strategy='per_layer'. Use clipping='flat', 'automatic' or 'adaptive'."
        )
    if strategy == "per_layer":
        return
    if is_per_layer(max_grad_norm):
        raise TypeError(
            f"max_grad_norm={max_grad_norm!r}: strategy={strategy!r} takes one number. Several norms mean "
            "per-layer clipping, whose sensitivity is √ΣC_l²: use strategy='per_layer' for it, or give the norm "
            "of the whole gradient."
        )
    check_norm(max_grad_norm)


def check_memory_share(memory_share: float | None, strategy: str) -> None:
    """Raise ValueError unless memory_share is None, or a finite number >= 0 for strategy="auto"."""
    if memory_share is None:
        return
    if strategy != "auto":
        raise ValueError(
            f"memory_share={memory_share!r} with strategy={strategy!r}: it limits what strategy='auto' materialises; "
            "use that strategy, or leave memory_share out"
        )
    if not 0 <= memory_share < math.inf:
        raise ValueError(
            f"memory_share={memory_share!r}: expected a finite number of at least 0; 0.25 lets the records take a "
            "quarter more memory than book-keeping's"
        )


def clips_speakers(clipping_unit: str | None, unit: str) -> bool:
    """Whether a speaker's examples are clipped together (by default each example is clipped by itself).

    Raises:
        ValueError: an unknown unit, or speakers where examples are the protected unit.
    """
    if clipping_unit not in (None, "example", "speaker"):
        raise ValueError(f"clipping_unit={clipping_unit!r}: expected 'example' or 'speaker'")
    if clipping_unit == "speaker" and unit != "speaker":
        raise ValueError(
            f"clipping_unit='speaker' with unit={unit!r}: only where speakers are sampled are their examples in one "
            "batch; use unit='speaker', or leave clipping_unit out"
        )
    return clipping_unit == "speaker"


class Refusal(NamedTuple):
    """The values of one of Opacus's keywords that mean the same here, and the message for every other value.

    accepts: whether a value is accepted. message: reason and hint; "{value!r}" stands for the value given.
    """

    accepts: Callable[[Any], bool]
    message: str


REFUSALS = {
    "secure_mode": Refusal(
        bool,
        "secure_mode=False is refused: noise always comes from a cryptographic generator here, at no cost that "
        "a weaker one would spare; leave the argument out",
    ),
    "poisson_sampling": Refusal(
        bool,
        "poisson_sampling=False is refused: shuffled batches are not Poisson-sampled, and ε for Poisson "
        "sampling would be wrong for them (honest accounting of shuffling needs about four times the "
        "noise). Leave it out: the returned loader samples for you; for batches of bounded size use "
        "max_batch_size (truncated Poisson).",
    ),
    "noise_generator": Refusal(
        lambda value: value is None,
        "noise_generator is refused: torch's generators are not cryptographic and a seeded one lets its "
        "holder remove the noise. Leave it out; tests can fix the noise with "
        "PrivacyEngine(noise_key=...).",
    ),
    "loss_reduction": Refusal(
        lambda value: value == "mean",
        "loss_reduction={value!r} is refused: optimizer.backward takes unreduced losses [B], "
        "and the noised sum is always divided by the expected batch size ('mean'). For Opacus's 'sum', "
        "multiply the learning rate by the batch size.",
    ),
    "criterion": Refusal(
        lambda value: value is None,
        "criterion is refused: nothing wraps the loss here, and three objects are returned, not four. "
        "Compute losses of shape [B] (reduction='none') and call optimizer.backward(losses).",
    ),
    "batch_first": Refusal(
        bool,
        "batch_first=False is refused: the layers take the first dimension of their input for the "
        "batch; transpose inside the model",
    ),
    "grad_sample_mode": Refusal(
        lambda value: value in (None, "ghost"),
        "grad_sample_mode={value!r} is refused: norms are computed by ghost clipping, "
        "per-sample gradients are never materialised; leave it out",
    ),
    "wrap_model": Refusal(
        lambda value: not value,
        "wrap_model=True is refused: the module is not wrapped, its layers change class in place, so "
        "names, hooks and state_dict stay as they are; leave it out",
    ),
    "rand_on_empty": Refusal(
        lambda value: not value,
        "rand_on_empty=True is refused: an empty logical batch has no micro-batches, and step() adds "
        "its noise; leave it out",
    ),
}
"""Keywords of Opacus that are accepted for compatibility and take one meaning only."""


def check_opacus_keywords(**keywords: Any) -> None:
    """Raise ValueError, with reason and hint, for a keyword whose Opacus meaning does not hold here."""
    for name, value in keywords.items():
        if not REFUSALS[name].accepts(value):
            raise ValueError(REFUSALS[name].message.format(value=value))
