"""Clipping norms, of the whole gradient or of each layer, and the sensitivity of the sum."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpkernels import ops
from dpkernels.nn import Record, norms_sq
from dpkernels.privacy.guards.preconditions import some_of

# Relative to C. See rounding_slack for all three.
LEAST_SLACK = 2.0**-20
_PIECES = 2**9
_CANCELLATION = 2**17


def total_norm_sq(records: Sequence[Record], batch_size: int, device: torch.device) -> Tensor:
    """Σ over records of their squared norms: [B] float64, rounded up. A parameter without a record adds 0."""
    return add_up(norms_sq(records), batch_size, device)


def add_up(norms: Iterable[Tensor], batch_size: int, device: torch.device) -> Tensor:
    """Σ of [B] upper bounds: [B] float64, an upper bound itself.

    R additions in float64 lose at most R·2⁻⁵³ of the sum; the factor 1 + (R + 1)·2⁻⁵² more than compensates it.
    NaN and infinity stay.
    """
    total, count = torch.zeros(batch_size, dtype=torch.float64, device=device), 0
    for norm_sq in norms:
        total += norm_sq.to(device=device, dtype=torch.float64)
        count += 1
    return total * (1 + (count + 1) * 2.0**-52)


AUTOMATIC_STABILITY = 0.01
"""γ of automatic clipping, as its authors propose: a gradient of this norm is scaled to C/2."""


@dataclass(frozen=True)
class ClipRule:
    """How the norm of an example's whole gradient decides its factor; either way the example adds at most C.

    Attributes:
        norm: C.
        stability: None for flat clipping, min(1, C/‖g‖); γ for automatic clipping, C/(‖g‖ + γ).
    """

    norm: float
    stability: float | None = None

    def factors(self, norm_sq: Tensor) -> Tensor:
        """[B] float32 of squared norms [B], float64 and rounded up; c_i·‖g_i‖ ≤ C exactly."""
        if self.stability is None:
            return ops.clip_factors(norm_sq, self.norm)
        return ops.automatic_clip_factors(norm_sq, self.norm, self.stability)

    def votes(self, norm_sq: Tensor) -> None:
        """None: no count moves a constant C. (`adaptive.AdaptiveRule` has votes.)"""


@dataclass(frozen=True)
class PerLayerClipNorms:
    """The clipping norms of per-layer clipping: a public constant C_p for every trained parameter.

    The parameters of one record (LoRA's A and B, a tied weight) are clipped together, at √ΣC_p². For every grouping of
    parameters by layers, the sum of the groups' squared norms is ΣC_p² = total²: the sensitivity.

    Attributes:
        total: C = √ΣC_p², rounded up.
        of: C_p by parameter.
        given: C_p by name as the user gave them; None if each is C/√P.
    """

    total: float
    of: Mapping[nn.Parameter, float]
    given: Mapping[str, float] | None = None

    def together(self, parameters: Sequence[nn.Parameter]) -> float:
        """√Σ C_p² over these parameters, rounded down. Raises RuntimeError if one was frozen at make_private."""
        unknown = [tuple(p.shape) for p in parameters if p not in self.of]
        if unknown:
            raise RuntimeError(
                f"parameters of shapes {unknown} have no clipping norm: they were frozen at make_private. Unfreeze "
                "them before make_private"
            )
        if len(parameters) == 1:
            return self.of[parameters[0]]
        return math.sqrt(math.fsum(self.of[p] ** 2 for p in parameters)) * _DOWN


# Factors for a few float64 roundings, downwards and upwards.
_DOWN, _UP = 1 - 2.0**-50, 1 + 2.0**-50


def per_layer_clip_norms(max_grad_norm: Any, trained: Mapping[str, nn.Parameter]) -> PerLayerClipNorms:
    """The norms that `max_grad_norm` means under strategy="per_layer".

    Args:
        max_grad_norm: a number C gives C/√P to each of the P trained parameters. A sequence has one norm for each
            trained parameter, in the order of model.named_parameters(). A mapping has one for each by name.
        trained: the trained parameters by name.

    Raises:
        ValueError: names or a number of norms that do not match the trained parameters; a norm that is not finite
            or not above 0.
        TypeError: a norm that is not a number.
    """
    if not is_per_layer(max_grad_norm):
        total = check_norm(max_grad_norm)
        each = total / math.sqrt(len(trained)) * _DOWN
        return PerLayerClipNorms(total, dict.fromkeys(trained.values(), each))
    if not isinstance(max_grad_norm, Mapping):
        if len(max_grad_norm) != len(trained):
            raise ValueError(
                f"max_grad_norm has {len(max_grad_norm)} norms for {len(trained)} trained parameters; give one for "
                "each, in the order of model.named_parameters(), or a mapping by name, or one number for all"
            )
        max_grad_norm = dict(zip(trained, max_grad_norm, strict=True))
    missing, unknown = trained.keys() - max_grad_norm.keys(), max_grad_norm.keys() - trained.keys()
    if missing or unknown:
        raise ValueError(
            f"max_grad_norm must name every trained parameter and nothing else; missing: {some_of(missing)}; not "
            f"trained: {some_of(unknown)}"
        )
    given = {name: check_norm(max_grad_norm[name], f"max_grad_norm[{name!r}]") for name in trained}
    total = math.sqrt(math.fsum(norm**2 for norm in given.values())) * _UP
    return PerLayerClipNorms(total, {trained[name]: norm for name, norm in given.items()}, given)


def is_per_layer(max_grad_norm: Any) -> bool:
    """Whether `max_grad_norm` is a sequence or mapping of norms."""
    return isinstance(max_grad_norm, Mapping | Sequence) and not isinstance(max_grad_norm, str)


def check_norm(norm: Any, name: str = "max_grad_norm") -> float:
    """A clipping norm as a float. Raises TypeError unless it is a number, ValueError unless finite and > 0."""
    if isinstance(norm, bool) or not isinstance(norm, int | float):
        raise TypeError(f"{name}={norm!r} must be one number, the norm that a gradient is clipped to")
    if not (math.isfinite(norm) and norm > 0):
        raise ValueError(f"{name} must be finite and > 0, got {norm}")
    return float(norm)


def batch_bound(units: int, sample_rate: float, *, per_unit: int = 1, capacity: int | None = None) -> int:
    """A public bound on the number of examples in a logical batch.

    It is the smallest of the capacity, the data set's size and m = q·N + 30·√(q·N) + 500 units. Poisson sampling
    exceeds m with probability below e⁻⁴⁰⁰ (Chernoff: exp(−t²/(2(μ + t/3))), t = 30√μ + 500), less than any δ in
    float64 can distinguish from 0. The optimizer refuses a larger batch.
    """
    mean = units * sample_rate
    bound = min(units, math.ceil(mean + 30 * math.sqrt(mean) + 500))
    if capacity is not None:
        bound = min(bound, capacity)
    return bound * per_unit


def rounding_slack(examples: int, ranks: int = 1) -> float:
    """The slack s: one example more or less changes the float64 sum of clipped gradients by at most (1 + s)·C.

    The example's own contribution is at most C: clip_factors and the ops guarantee it. In addition, the example
    can change how the additions of the others round: each addition rounds by at most 2⁻⁵³ of the partial sum.

    A long example is added in pieces (of at least 64 frames, or a token of an embedding), at most P of them to
    an entry. The pieces may cancel, so one can be far above C. The ops' own rounding bounds limit its size:
    a norm is stated as at least e ≥ (2κ + 1)·2⁻²⁴·S, S = Σ_t ‖x_t‖‖g_t‖ (csrc/cpu/bounds.h), so that
    c·S ≤ C/(e/S) = K·C with K ≤ 2¹⁷ for two pieces of 64 frames or more (κ ≥ 66), and P·K ≤ 2²³
    for an embedding. (On a GPU only linear layers have pieces, of 32 accumulations of at least 16 frames, with
    κ = `triton_ops.bounds.sum_roundings` ≥ 66. Of other layers an example is added as one piece, at most C. Pairs of
    float32 numbers, for GPUs without float64 units, are covered too: `triton_ops.bounds` has the proof.) A partial
    sum is then below (n + K)·C, a sum of n·P additions lies within n·P·(n + K)·2⁻⁵³·C of the exact one, and two
    neighbouring sums differ by at most twice that more than exact sums do. The factor 2⁻⁵¹ instead of 2⁻⁵² leaves a
    factor of two for terms of second order. P = 2⁹ is 32,768 frames, or 512 equal tokens. R processes sum their
    examples apart, and the R sums are then added: n·P + R additions.

    Automatic clipping changes nothing of this: its factors, too, are at most C divided by the stated norm.
    Under per-layer clipping this holds in each layer with C_l in place of C, and √Σ(1 + s)²C_l² = (1 + s)·C.

    The bound holds for gradients of float32 and narrower; float64 models (for tests) have no such K. It does not
    count the rounding of the forward and backward: an example that changes the *shape* of a batch can change how
    those of the others (and gradients materialised there by batched products) round. docs/privacy.md has the
    measured size of this effect.
    """
    additions = examples * _PIECES + (ranks if ranks > 1 else 0)
    return max(LEAST_SLACK, additions * (examples + _CANCELLATION) * 2.0**-51)


def sensitivity(max_grad_norm: float, examples: int, per_unit: int = 1, ranks: int = 1) -> float:
    """L2 sensitivity of the sum to one unit: per_unit·C·(1 + rounding_slack)."""
    return per_unit * max_grad_norm * (1 + rounding_slack(examples, ranks))
