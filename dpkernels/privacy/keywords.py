"""Keywords of Opacus's `make_private`: accepted where the meaning is the same here, refused with the reason
elsewhere."""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from dpkernels.deprecation import warn_renamed
from dpkernels.privacy.step.clipping import check_norm, is_per_layer

STRATEGIES = {
    "bookkeeping": "keeps x and g of every trained layer until the norms are known",
    "mixed": "keeps per-sample gradients instead, materialised in the backward, where they are at most half as large",
    "two_pass": "keeps no trained layer's x and g: one backward for the norms, a second for the sums",
    "per_layer": "clips each layer on its own within one backward and keeps nothing; not flat clipping",
}
"""Ways to hold what the weighted sums need, and what each does."""


class AccountantName(str):
    """The name that `engine.accountant` is; asked what Opacus's accountant is asked, it says where that is."""

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"engine.accountant is the name {str(self)!r} and has no {name!r}: call engine.get_epsilon(delta), and see "
            "engine.history for what was spent"
        )


OLD_STRATEGIES = {"keep_small": "mixed"}
"""Names that strategies had."""


def strategy_called(strategy: str) -> str:
    """The strategy of this name or old name.

    Raises:
        ValueError: there is none; the message names what is available.
    """
    if strategy in OLD_STRATEGIES:
        warn_renamed(f"strategy={strategy!r}", f"strategy={OLD_STRATEGIES[strategy]!r}", stacklevel=4)
        return OLD_STRATEGIES[strategy]
    if strategy not in STRATEGIES:
        raise ValueError(
            f"strategy={strategy!r} is not available; available: "
            f"{'; '.join(f'{name!r} ({what})' for name, what in STRATEGIES.items())}. Use a smaller "
            "physical_batch_size for less memory."
        )
    return strategy


def check_clipping(
    clipping: str, max_grad_norm: float | Sequence[float] | Mapping[str, float], strategy: str
) -> None:
    """Raise ValueError or TypeError for anything but flat clipping with one finite C > 0, and, under
    strategy="per_layer", per-layer clipping (whose norms `clipping.per_layer_clip_norms` checks)."""
    if clipping != "flat" and (clipping, strategy) != ("per_layer", "per_layer"):
        raise ValueError(
            f"clipping={clipping!r} is refused: per-layer clipping has sensitivity √ΣC_l² and is asked for by "
            "strategy='per_layer'; automatic and adaptive clipping spend budget of their own, which is not "
            "accounted here. Use clipping='flat'."
        )
    if strategy == "per_layer":
        return
    if is_per_layer(max_grad_norm):
        raise TypeError(
            f"max_grad_norm={max_grad_norm!r}: one number is expected with strategy={strategy!r}. Several mean "
            "per-layer clipping, whose sensitivity is √ΣC_l²: use strategy='per_layer' for that, or give the norm "
            "of the whole gradient."
        )
    check_norm(max_grad_norm)


def check_opacus_keywords(
    *,
    poisson_sampling: bool,
    noise_generator: Any,
    loss_reduction: str,
    criterion: Any,
    batch_first: bool,
    grad_sample_mode: str | None,
    wrap_model: bool,
    rand_on_empty: bool,
) -> None:
    """Raise ValueError, with reason and hint, for a keyword whose Opacus meaning does not hold here."""
    if not poisson_sampling:
        raise ValueError(
            "poisson_sampling=False is refused: shuffled batches are not Poisson-sampled, and ε for Poisson "
            "sampling would be wrong for them (honest accounting of shuffling needs about four times the "
            "noise). Leave it out: the returned loader samples for you; for batches of bounded size use "
            "max_batch_size (truncated Poisson)."
        )
    if noise_generator is not None:
        raise ValueError(
            "noise_generator is refused: torch's generators are not cryptographic and a seeded one lets its "
            "holder remove the noise. Leave it out; tests can fix the noise with "
            "PrivacyEngine(noise_key=...)."
        )
    if loss_reduction != "mean":
        raise ValueError(
            f"loss_reduction={loss_reduction!r} is refused: optimizer.backward takes unreduced losses [B], "
            "and the noised sum is always divided by the expected batch size ('mean'). For Opacus's 'sum', "
            "multiply the learning rate by the batch size."
        )
    if criterion is not None:
        raise ValueError(
            "criterion is refused: nothing wraps the loss here, and three objects are returned, not four. "
            "Compute losses of shape [B] (reduction='none') and call optimizer.backward(losses)."
        )
    if not batch_first:
        raise ValueError(
            "batch_first=False is refused: the layers take the first dimension of their input for the "
            "batch; transpose inside the model"
        )
    if grad_sample_mode not in (None, "ghost"):
        raise ValueError(
            f"grad_sample_mode={grad_sample_mode!r} is refused: norms are computed by ghost clipping, "
            "per-sample gradients are never materialised; leave it out"
        )
    if wrap_model:
        raise ValueError(
            "wrap_model=True is refused: the module is not wrapped, its layers change class in place, so "
            "names, hooks and state_dict stay as they are; leave it out"
        )
    if rand_on_empty:
        raise ValueError(
            "rand_on_empty=True is refused: an empty logical batch has no micro-batches, and step() adds "
            "its noise; leave it out"
        )
