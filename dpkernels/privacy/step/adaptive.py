"""Adaptive clipping: norms follow a quantile, by noisy counts that each step releases beside the sums.

Flat clipping has one norm, C, and one count. Per-layer clipping has a norm C_p and a count for each of the K trained
parameters; the parameters of one record are clipped, and vote, together.

With ν_i the norm of what is clipped (an example, or a speaker) and γ the quantile, the count of a step and the next
step's C are

    count = (Σ_i (s(ν_i/C) − γ) + σ_b·N(0, 1)) / expected        s(r) = clamp((1 + w − r)/(2w), 0, 1), w = 1/8
    C     ← C·exp(−η·clamp(count, −1, 1)), within C₀·2^±30

s is 1 for a norm below 7/8·C and 0 for one above 9/8·C. A bit, which jumps at C, could be flipped by rounding alone:
one example more may change the shape of a micro-batch, and with it the last places of the other examples' norms. The
ramp changes by 4·δ where a norm changes by δ·C, as the sums do.

One unit adds at most Δ = per_unit·max(γ, 1 − γ)·√K to the K counts, and 1 (in units of S) to the sums: together a
vector of norm √(1/σ_g² + Δ²/σ_b²) in units of the noise. σ_g is chosen so that this is 1/σ, and a step is accounted as
the Gaussian mechanism with σ. C depends on what earlier steps released, and is public.

A layer that no example of a micro-batch used has no record, and so no votes; for that not to depend on the others, an
example whose gradient of a layer is exactly 0 has no vote there. (With flat clipping it counts as small.)

Source: Andrew et al. 2019, arXiv:1905.03871 (there γ = 1/2 is subtracted for every quantile, so Δ = 1/2, and s is a
bit); He et al. 2023, arXiv:2212.01539 (per layer).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpkernels import ops
from dpkernels.privacy.rng.streams import SecretStream, grid_of
from dpkernels.privacy.sampling.plan import Sampling
from dpkernels.privacy.step.clipping import ClipRule, PerLayerClipNorms

WIDTH = 2.0**-3
"""w: half the width of the ramp from 1 to 0, relative to C."""
UNIT = 2**30
"""s and γ are whole multiples of 1/UNIT: their sums are exact, so no order of addition and no rank changes them."""
RANGE = 2.0**30
"""C stays within this factor of where it started: the noise, which C scales, can never be rounded to 0."""
# The default noise on the count: a twentieth of the expected count, as the authors propose, but at least _LEAST·Δ·σ.
_SHARE = 20
_LEAST = 10
_LARGEST_SHARE = 1 - 2.0**-10  # of what a step spends: σ_g is then 32·σ, and hardly any signal is left
_UP = 1 + 2.0**-40  # more than the roundings of σ_g, which a share near its largest magnifies 2^10 times


@dataclass(frozen=True)
class AdaptiveClipping:
    """The options of clipping="adaptive", under Opacus's names: pass one to `make_private(clipping=...)`.

    Args:
        target_unclipped_quantile: γ in (0, 1), the share of gradients whose norm C is to lie above.
        clipbound_learning_rate: η in (0, 1]: a step multiplies C by e^η at most.
        unclipped_num_std: σ_b, the standard deviation of the noise on the count, in examples (or speakers, where these
            are clipped as speakers). None: the larger of a twentieth of the expected count, and of ten times Δ·σ, which
            costs half a per cent of noise on the sums. Larger values cost less, and let C wander more.

    Raises:
        ValueError: an option out of range.
        TypeError: an option that is not a number.
    """

    target_unclipped_quantile: float = 0.5
    clipbound_learning_rate: float = 0.2
    unclipped_num_std: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is None and name == "unclipped_num_std":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"AdaptiveClipping: {name}={value!r} must be a number")
        if not 1 / UNIT <= self.target_unclipped_quantile <= 1 - 1 / UNIT:
            raise ValueError(
                f"AdaptiveClipping: target_unclipped_quantile={self.target_unclipped_quantile} must lie between 0 and "
                "1; 0.5 clips about half of the gradients"
            )
        if not 0 < self.clipbound_learning_rate <= 1:
            raise ValueError(
                f"AdaptiveClipping: clipbound_learning_rate={self.clipbound_learning_rate} must lie in (0, 1]; 0.2 is "
                "usual"
            )
        std = self.unclipped_num_std
        if std is not None and not (math.isfinite(std) and std > 0):
            raise ValueError(f"AdaptiveClipping: unclipped_num_std={std} must be finite and > 0, or None")


@dataclass(frozen=True)
class NoisyCount:
    """The public constants of a run's counts.

    Attributes:
        quantile: γ, a multiple of 1/UNIT.
        learning_rate: η.
        expected: the divisor: the expected number of what is clipped in a logical batch. The true number is secret.
        noise: σ_b, the standard deviation of the noise on the count; 0 in a run without noise.
        sensitivity: Δ, the most that one unit adds to the counts, in L2.
        sums_noise_multiplier: σ_g, the noise on the sums over their sensitivity; above σ, since the counts spend, too.
        counts: K, the number of norms that adapt.
    """

    quantile: float
    learning_rate: float
    expected: float
    noise: float
    sensitivity: float
    sums_noise_multiplier: float
    counts: int = 1


def noisy_count(
    options: AdaptiveClipping,
    noise_multiplier: float,
    sampling: Sampling,
    *,
    whole_units: bool = False,
    counts: int = 1,
) -> NoisyCount:
    """The constants for a run whose steps are accounted with σ = `noise_multiplier`.

    Args:
        options: the quantile, the rate, and the noise on the count.
        noise_multiplier: σ of a whole step. σ_g = (σ⁻² − (Δ/σ_b)²)^(−1/2), rounded up.
        sampling: the run's. A speaker whose k examples are clipped apart adds k times as much as one example.
        whole_units: whether speakers are clipped as speakers, and so counted.
        counts: K, the number of norms that adapt.

    Raises:
        ValueError: a noise on the count that spends more than the whole step may.
    """
    quantile = round(options.target_unclipped_quantile * UNIT) / UNIT
    most = max(quantile, 1 - quantile) * (1 if whole_units else sampling.per_unit) * math.sqrt(counts)
    expected = sampling.sample_rate * sampling.units if whole_units else float(sampling.expected_batch_size)
    noise, sums = 0.0, 0.0
    if noise_multiplier > 0:
        given = options.unclipped_num_std
        noise = max(expected / _SHARE, _LEAST * most * noise_multiplier) if given is None else float(given)
        share = (most * noise_multiplier / noise) ** 2
        if share > _LARGEST_SHARE:
            least = most * noise_multiplier
            raise ValueError(
                f"AdaptiveClipping: unclipped_num_std={noise:g} must be well above {least:g}, which is "
                f"noise_multiplier={noise_multiplier} times the {most:g} that one unit adds to the count: the count "
                "alone would spend more than the step is accounted for. Raise it, or leave it out"
            )
        sums = noise_multiplier / math.sqrt(1 - share) * _UP
    return NoisyCount(quantile, options.clipbound_learning_rate, expected, noise, most, sums, counts)


def votes_of(norm_sq: Tensor, norm: float | Tensor, quantile: float) -> Tensor:
    """int64, of the squared norms' shape: UNIT·(s(ν_i/C) − γ), exactly. NOT PRIVATE.

    Each depends on one norm alone, and lies in [−γ·UNIT, (1 − γ)·UNIT], whatever the norm is: NaN and ∞ count as large.
    """
    ratio = norm_sq.sqrt() / norm
    ramp = ((1 + WIDTH - ratio) / (2 * WIDTH)).nan_to_num(nan=0.0).clamp(0.0, 1.0)
    return (ramp * UNIT).floor().to(torch.int64) - round(quantile * UNIT)


class AdaptiveNorms(ABC):
    """Norms that move from step to step; within a logical batch they are fixed.

    Args:
        count: the constants of the counts.
        norms: the first step's, public constants.
        sensitivity: S of the sums at these.

    Attributes:
        count: the constants.
        norms: those of the step at hand. Public: a function of what was released.
    """

    def __init__(self, count: NoisyCount, norms: Sequence[float], sensitivity: float) -> None:
        self.count = count
        self.norms = list(norms)
        self._start = list(norms)
        self._per_norm = sensitivity / self.total * _UP

    @property
    @abstractmethod
    def total(self) -> float:
        """C, the most that an example adds to the sums, of the step at hand."""

    @property
    def noise_scale(self) -> float:
        """Standard deviation of the noise on the sums: σ_g times their sensitivity at the present norms."""
        return self.count.sums_noise_multiplier * self._per_norm * self.total

    def following(self, votes: Sequence[int], stream: SecretStream, draw: int) -> list[float]:
        """The next step's norms, by counts with noise: this is a release, and takes place once for each step.

        Args:
            votes: by norm, of all examples of the logical batch, of all ranks.
            stream: the source of the noise.
            draw: the step's number in the stream.
        """
        counts = torch.tensor([each / UNIT for each in votes], dtype=torch.float64)
        ops.noise_sums(
            [counts],
            **stream.count_secrets(draw=draw),
            noise_scale=self.count.noise,
            grid=grid_of(self.count.noise),
            divisor=self.count.expected,
        )
        moves = counts.clamp(-1.0, 1.0).tolist()
        moved = [n * math.exp(-self.count.learning_rate * m) for n, m in zip(self.norms, moves, strict=True)]
        return [
            min(max(norm, start / RANGE), start * RANGE)
            for norm, start in zip(moved, self._start, strict=True)
        ]

    @abstractmethod
    def state(self) -> Any:
        """The present norms as plain values, for a checkpoint."""

    @abstractmethod
    def of_state(self, state: Any) -> list[float]:
        """The norms of a checkpoint's `state`. Raises ValueError unless a run from the first norms can come to them."""

    def _check(self, norms: Sequence[Any], state: Any) -> list[float]:
        if len(norms) != len(self._start) or not all(
            isinstance(norm, float) and start / RANGE <= norm <= start * RANGE
            for norm, start in zip(norms, self._start, strict=True)
        ):
            raise ValueError(
                f"load_state_dict: clip_norm={state!r} in the engine's state is nothing that this run of "
                "clipping='adaptive' comes to from its max_grad_norm: the checkpoint is of another run, or of another "
                "clipping. Continue with the arguments that wrote it"
            )
        return list(norms)


class AdaptiveRule(AdaptiveNorms):
    """Flat clipping to a C that adapts.

    Args:
        count: the constants.
        norm: C₀, the first step's C.
        sensitivity: S of the sums at C₀.
    """

    def __init__(self, count: NoisyCount, norm: float, sensitivity: float) -> None:
        super().__init__(count, [norm], sensitivity)

    @property
    def total(self) -> float:
        """C."""
        return self.norms[0]

    def factors(self, norm_sq: Tensor) -> Tensor:
        """[B] float32: those of flat clipping to the present C; see `ClipRule.factors`."""
        return ClipRule(self.total).factors(norm_sq)

    def votes(self, norm_sq: Tensor) -> Tensor:
        """[1] int64: `votes_of` the squared norms of a micro-batch's gradients [B], rounded up. NOT PRIVATE."""
        return votes_of(norm_sq, self.total, self.count.quantile).sum().view(1)

    def state(self) -> float:
        """C."""
        return self.total

    def of_state(self, state: Any) -> list[float]:
        """See `AdaptiveNorms.of_state`."""
        return self._check([state], state)


class AdaptiveLayers(AdaptiveNorms):
    """Per-layer clipping to norms that adapt: C_p of every trained parameter.

    Args:
        count: the constants; `counts` is the number of trained parameters.
        layers: the first step's norms.
        names: of the trained parameters, in the order of `layers.of`.
        sensitivity: S of the sums at these.
    """

    def __init__(
        self, count: NoisyCount, layers: PerLayerClipNorms, names: Sequence[str], sensitivity: float
    ) -> None:
        self._parameters = list(layers.of)
        self._names = list(names)
        self._place = {parameter: place for place, parameter in enumerate(self._parameters)}
        super().__init__(count, list(layers.of.values()), sensitivity)

    @property
    def present(self) -> PerLayerClipNorms:
        """The norms of the step at hand."""
        return PerLayerClipNorms(self.total, dict(zip(self._parameters, self.norms, strict=True)))

    @property
    def total(self) -> float:
        """√ΣC_p², rounded up."""
        return math.sqrt(math.fsum(norm**2 for norm in self.norms)) * _UP

    def votes(
        self, records: Sequence[Sequence[nn.Parameter]], norms_sq: Sequence[Tensor], device: torch.device
    ) -> Tensor:
        """[K] int64: the votes of a micro-batch, by the squared norms of its records' gradients. NOT PRIVATE.

        Args:
            records: the parameters of each, which are clipped together; each parameter is in one of them at most.
            norms_sq: [B] float64 each, rounded up, on `device`.
            device: of the result.
        """
        if not records:
            return torch.zeros(len(self._parameters), dtype=torch.int64, device=device)
        squares, present = torch.stack(list(norms_sq)), self.present
        limits = squares.new_tensor([present.together(parameters) for parameters in records])
        cast = votes_of(squares, limits.unsqueeze(1), self.count.quantile)
        by_record = torch.where(squares == 0, torch.zeros_like(cast), cast).sum(1)
        rows = [row for row, parameters in enumerate(records) for _ in parameters]
        places = [self._place[parameter] for parameters in records for parameter in parameters]
        votes = by_record.new_zeros(len(self._parameters))
        return votes.index_add(0, torch.tensor(places, device=votes.device), by_record[rows])

    def state(self) -> dict[str, float]:
        """C_p by the parameter's name."""
        return dict(zip(self._names, self.norms, strict=True))

    def of_state(self, state: Any) -> list[float]:
        """See `AdaptiveNorms.of_state`."""
        by_name = state if isinstance(state, Mapping) and state.keys() == set(self._names) else {}
        return self._check([by_name[name] for name in self._names if by_name], state)
