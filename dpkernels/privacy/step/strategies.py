"""Strategies: the order in which a micro-batch's gradients are measured, clipped and summed, and the tensors held.

| strategy | backwards | holds until it ends | clipping |
|---|---|---|---|
| bookkeeping, mixed, auto | 1 | every record of the backward | of the whole gradient: flat, automatic or adaptive |
| two_pass | 2 | the graph; [B] numbers for each layer | the same |
| per_layer | 1 | nothing | each layer on its own, constant or adaptive |

Every strategy holds the records of tied and reused parameters to the end of a backward, since they must be merged.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dpkernels import ops
from dpkernels.nn import MEMORY_SHARE, Choice, Record, Tape, norms_sq
from dpkernels.nn.tensors import factors_within
from dpkernels.privacy.step.adaptive import AdaptiveLayers, AdaptiveRule
from dpkernels.privacy.step.clipping import ClipRule, PerLayerClipNorms, add_up, total_norm_sq

Add = Callable[[Sequence[Record], Tensor], None]
"""add(records, factors [B]) adds the weighted sums of the records to the logical batch's sums."""

Rule = ClipRule | AdaptiveRule
"""What turns the norm of an example's whole gradient into its factor."""

Check = Callable[[], None]
"""Raises if the last backward reached a trained parameter past its layer's rule."""

REPEAT_TOLERANCE = 2.0**-6
"""Largest accepted change of a layer's norm between the two backwards, relative to the example's whole norm. Atomic
additions on a GPU change it by rounding; other dropout masks, or changed inputs of the forward, by tens of per cent."""


class Clipped(NamedTuple):
    """Norms and clipping factors of what a micro-batch's gradients are clipped as, examples or speakers. NOT PRIVATE.

    norm_sq: [B] float64, the squared norm of the whole gradient before clipping, rounded up. factors: [B] float32,
    the factor in the sum, 0 for an example that was left out; under per-layer clipping, the smallest of its factors.
    votes: [K] int64, what the micro-batch adds to the counts that move the K norms of adaptive clipping, else None.
    """

    norm_sq: Tensor
    factors: Tensor
    votes: Tensor | None = None


class Strategy(ABC):
    """Clips and sums one micro-batch. `tape` is the model's.

    Where speakers are clipped as speakers, `unit` consecutive examples are one of them, and are clipped together: the
    records are those of the sums of their gradients (`Record.of_units`), and B is the number of speakers.
    """

    def __init__(self, tape: Tape) -> None:
        self.tape = tape

    @abstractmethod
    def backward(self, losses: Tensor, add: Add, check: Check, unit: int = 1) -> Clipped:
        """Back-propagate losses.sum() (losses: [B·unit]) and `add` the contribution of each example, or speaker.

        Raises the errors of the backward, `add` and `check`; the tape may then be open.
        """

    def _stream(
        self, losses: Tensor, take: Callable[[Record], None], unit: int, *, again: bool = False
    ) -> None:
        """Run one backward and pass every record to `take` as soon as it is complete.

        again: whether another backward over the same graph follows.
        """

        def of_unit(record: Record) -> None:
            take(_of_units(record, unit))

        self.tape.open(losses.shape[0], sink=of_unit, unit=unit)
        losses.sum().backward(retain_graph=again)
        for record in self.tape.close(again=again):
            of_unit(record)


class BookKeeping(Strategy):
    """One backward that keeps its records until the norms are known.

    Source: Bu et al. 2023, arXiv:2210.00038 (book-keeping).
    """

    def __init__(self, tape: Tape, rule: Rule) -> None:
        super().__init__(tape)
        self._rule = rule

    def backward(self, losses: Tensor, add: Add, check: Check, unit: int = 1) -> Clipped:
        """Compute norms, then factors, then sums."""
        batch_size = losses.shape[0] // unit
        self.tape.open(losses.shape[0], unit=unit)
        losses.sum().backward()
        records = [_of_units(record, unit) for record in self.tape.close()]
        check()
        with torch.no_grad():
            norm_sq = total_norm_sq(records, batch_size, losses.device)
            factors = self._rule.factors(norm_sq)
            votes = self._rule.votes(norm_sq)
        add(records, factors)
        return Clipped(norm_sq, factors, votes)


class TwoPass(Strategy):
    """A backward for the norms, then another of the same losses for the sums.

    The second backward back-propagates the unscaled sum again, and the factors enter in the weighted sums. Scaling the
    losses by c_i instead would add rounding, which in half precision is far above the norms' bounds.

    **The bound does not assume that the second backward repeats the first.** Let n_il be the first backward's bound on
    example i's norm in layer l, N_i² = Σ_l n_il², c_i ≤ C/N_i (either clip rule), and n'_il the second backward's
    bound, of the same tensors that are summed. The layer is summed with c_i·min(1, n_il/n'_il), so the example adds at
    most √Σ_l (c_i·n_il)² = c_i·N_i ≤ C for any second backward. If the two have the same bits the factor is c_i.
    A second backward that differs by more than rounding would sum a gradient that was not measured. It is refused
    (`REPEAT_TOLERANCE`) to protect the training result.

    Source: Goodfellow 2015, arXiv:1510.01799; Li et al. 2022, arXiv:2110.05679 (ghost clipping in two passes).
    """

    def __init__(self, tape: Tape, rule: Rule) -> None:
        super().__init__(tape)
        self._rule = rule

    def backward(self, losses: Tensor, add: Add, check: Check, unit: int = 1) -> Clipped:
        """Compute norms and factors, then the sums from a second backward.

        Raises RuntimeError if the second backward differs from the first by more than rounding.
        """
        batch_size, device = losses.shape[0] // unit, losses.device
        first: dict[tuple[nn.Parameter, ...], Tensor] = {}

        @torch.no_grad()
        def measure(record: Record) -> None:
            first[record.parameters] = _norm_sq(record, device)

        self._stream(losses, measure, unit, again=True)
        check()
        with torch.no_grad():
            norm_sq = add_up(first.values(), batch_size, device)
            factors, votes = self._rule.factors(norm_sq), self._rule.votes(norm_sq)
            allowed = REPEAT_TOLERANCE * norm_sq.sqrt()
            moved = torch.zeros(batch_size, dtype=torch.bool, device=device)

        @torch.no_grad()
        def weigh(record: Record) -> None:
            again = _norm_sq(record, device)
            before = first.pop(record.parameters, torch.zeros_like(again))
            moved.logical_or_(~((again.sqrt() - before.sqrt()).abs() <= allowed))
            add([record], factors_within(factors, before, again))

        self._stream(losses, weigh, unit)
        check()
        moved.logical_and_(factors > 0)  # an example with factor 0 adds 0 in either case
        if first or int(moved.sum()):
            raise RuntimeError(
                "strategy='two_pass': the second backward of a micro-batch gave other gradients than the first. The "
                "recomputed forward uses other random numbers (checkpoint with preserve_rng_state=False?), or "
                "reads values that change. This logical batch is dropped: make the recomputation repeat the "
                "forward, or use strategy='bookkeeping'"
            )
        return Clipped(norm_sq, factors, votes)


class PerLayer(Strategy):
    """One backward in which each record is clipped to its own norm and summed as soon as it is complete.

    Example i adds min(1, C_l/‖g_il‖)·g_il in layer l, at most C_l in norm for every g_il, so at most √ΣC_l² = C in
    all. It adds exactly 0 to a layer in which its norm is not finite; its contributions to the other layers stay. Some
    of these are summed before the non-finite norm is known, and the bound holds with them.

    Source: McMahan et al. 2018, arXiv:1710.06963 (per-layer clipping); He et al. 2023, arXiv:2212.01539 (within the
    backward).
    """

    def __init__(self, tape: Tape, norms: PerLayerClipNorms | AdaptiveLayers) -> None:
        super().__init__(tape)
        self._norms = norms

    def backward(self, losses: Tensor, add: Add, check: Check, unit: int = 1) -> Clipped:
        """Compute norm, factor and sum, record by record."""
        batch_size, device = losses.shape[0] // unit, losses.device
        adaptive = self._norms if isinstance(self._norms, AdaptiveLayers) else None
        limits = self._norms if isinstance(self._norms, PerLayerClipNorms) else self._norms.present
        parameters: list[tuple[nn.Parameter, ...]] = []
        norms: list[Tensor] = []
        least = torch.ones(batch_size, device=device)

        @torch.no_grad()
        def clip(record: Record) -> None:
            norm_sq = _norm_sq(record, device)
            factors = ops.clip_factors(norm_sq, limits.together(record.parameters))
            add([record], factors)
            parameters.append(record.parameters)
            norms.append(norm_sq)
            torch.minimum(least, factors, out=least)

        self._stream(losses, clip, unit)
        check()
        with torch.no_grad():
            votes = None if adaptive is None else adaptive.votes(parameters, norms, device)
            return Clipped(add_up(norms, batch_size, device), least, votes)


def strategy_of(name: str, tape: Tape, clipping: Rule | PerLayerClipNorms | AdaptiveLayers) -> Strategy:
    """The strategy of a name that `keywords.strategy_called` returns; norms by layer for "per_layer" only."""
    if isinstance(clipping, PerLayerClipNorms | AdaptiveLayers):
        return PerLayer(tape, clipping)
    return TwoPass(tape, clipping) if name == "two_pass" else BookKeeping(tape, clipping)


def choice_of(name: str, memory_share: float | None = None) -> Choice:
    """What the tape materialises in the backward under a strategy of that name; `memory_share`: of "auto"."""
    share = MEMORY_SHARE if memory_share is None else memory_share
    return Choice(mixed=name == "mixed", by_time=name == "auto", memory_share=share)


def _of_units(record: Record, unit: int) -> Record:
    return record if unit == 1 else record.of_units(unit)


def _norm_sq(record: Record, device: torch.device) -> Tensor:
    """[B] float64, rounded up: a bound on each example's part in `add_weighted_sums` of this record."""
    (norm_sq,) = norms_sq([record])
    return norm_sq.to(device=device, dtype=torch.float64)
