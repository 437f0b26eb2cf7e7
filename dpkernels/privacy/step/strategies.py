"""Strategies: in which order the gradients of a micro-batch are measured, clipped and summed, and what is held.

| strategy | backwards | holds until it is done | clipping |
|---|---|---|---|
| bookkeeping, mixed | 1 | every record of the backward | flat |
| two_pass | 2 | the graph; [B] numbers a layer | flat |
| per_layer | 1 | nothing | each layer on its own |

Records of tied and reused parameters are held to the end of a backward in every strategy: they must be merged.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dpkernels import ops
from dpkernels.nn import Record, Tape, norms_sq
from dpkernels.privacy.step.clipping import PerLayerClipNorms, add_up, total_norm_sq

Add = Callable[[Sequence[Record], Tensor], None]
"""add(records, factors [B]): the weighted sums of the records into the logical batch's."""

Check = Callable[[], None]
"""Raises where the backward that is over reached a trained parameter past its layer's rule."""

REPEAT_TOLERANCE = 2.0**-6
"""How far a layer's norm may move between the two backwards, relative to the example's whole norm. Atomic additions on
a GPU move it by rounding; other dropout masks, or a forward that reads something new, by tens of per cent."""


class Clipped(NamedTuple):
    """What was done to each example of a micro-batch. NOT PRIVATE.

    norm_sq: [B] float64, of its whole gradient before clipping, rounded up. factors: [B] float32, the factor it was
    summed with, 0 where left out; clipped by layers, the smallest of its factors.
    """

    norm_sq: Tensor
    factors: Tensor


class Strategy(ABC):
    """Clips and sums one micro-batch; `tape` is the model's."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape

    @abstractmethod
    def backward(self, losses: Tensor, add: Add, check: Check) -> Clipped:
        """Back-propagate losses.sum() [B] and `add` what each example contributes.

        Raises whatever the backward, `add` and `check` do; the tape may then be open.
        """

    def _stream(self, losses: Tensor, take: Callable[[Record], None], *, again: bool = False) -> None:
        """One backward, every record handed to `take` as soon as it is complete.

        again: another backward over the same graph follows.
        """
        self.tape.open(losses.shape[0], sink=take)
        losses.sum().backward(retain_graph=again)
        for record in self.tape.close(again=again):
            take(record)


class BookKeeping(Strategy):
    """One backward that keeps its records until the norms are known.

    Source: Bu et al. 2023, arXiv:2210.00038 (book-keeping).
    """

    def __init__(self, tape: Tape, max_grad_norm: float) -> None:
        super().__init__(tape)
        self._max_grad_norm = max_grad_norm

    def backward(self, losses: Tensor, add: Add, check: Check) -> Clipped:
        """Norms, then factors, then sums."""
        batch_size = losses.shape[0]
        self.tape.open(batch_size)
        losses.sum().backward()
        records = self.tape.close()
        check()
        with torch.no_grad():
            norm_sq = total_norm_sq(records, batch_size, losses.device)
            factors = ops.clip_factors(norm_sq, self._max_grad_norm)
        add(records, factors)
        return Clipped(norm_sq, factors)


class TwoPass(Strategy):
    """A backward for the norms, then another of the same losses for the sums.

    The second backward back-propagates the unscaled sum again, and factors enter in the weighted sums: what scaling the
    losses by c_i would add is rounded, in half precision by far more than the norms' bounds allow for.

    **That the second backward repeats the first is not assumed.** Let n_il be the bound of the first backward on
    example i's norm in layer l, N_i² = Σ_l n_il², c_i ≤ C/N_i, and n'_il the bound of the second, of the very tensors
    that are summed. The layer is summed with c_i·min(1, n_il/n'_il), so the example adds at most
    √Σ_l (c_i·n_il)² = c_i·N_i ≤ C, whatever the second backward was. Where it has the same bits the factor is c_i.
    A second backward that differs by more than rounding sums another gradient than was measured: it is refused
    (`REPEAT_TOLERANCE`), for the sake of the training.

    Source: Goodfellow 2015, arXiv:1510.01799; Li et al. 2022, arXiv:2110.05679 (ghost clipping in two passes).
    """

    def __init__(self, tape: Tape, max_grad_norm: float) -> None:
        super().__init__(tape)
        self._max_grad_norm = max_grad_norm

    def backward(self, losses: Tensor, add: Add, check: Check) -> Clipped:
        """Norms, factors, then sums from a second backward.

        Raises RuntimeError where the second backward differs from the first by more than rounding.
        """
        batch_size, device = losses.shape[0], losses.device
        first: dict[tuple[nn.Parameter, ...], Tensor] = {}

        @torch.no_grad()
        def measure(record: Record) -> None:
            first[record.parameters] = _norm_sq(record, device)

        self._stream(losses, measure, again=True)
        check()
        with torch.no_grad():
            norm_sq = add_up(first.values(), batch_size, device)
            factors = ops.clip_factors(norm_sq, self._max_grad_norm)
            allowed = REPEAT_TOLERANCE * norm_sq.sqrt()
            moved = torch.zeros(batch_size, dtype=torch.bool, device=device)

        @torch.no_grad()
        def weigh(record: Record) -> None:
            again = _norm_sq(record, device)
            before = first.pop(record.parameters, torch.zeros_like(again))
            moved.logical_or_(~((again.sqrt() - before.sqrt()).abs() <= allowed))
            add([record], _within(factors, before, again))

        self._stream(losses, weigh)
        check()
        moved.logical_and_(factors > 0)  # one that is left out adds 0 in either case
        if first or int(moved.sum()):
            raise RuntimeError(
                "strategy='two_pass': the second backward of a micro-batch gave other gradients than the first. Its "
                "forward is recomputed with other random numbers (checkpoint with preserve_rng_state=False?), or "
                "reads something that changes. This logical batch is dropped: make the recomputation repeat the "
                "forward, or use strategy='bookkeeping'"
            )
        return Clipped(norm_sq, factors)


class PerLayer(Strategy):
    """One backward in which each record is clipped to its own norm and summed as soon as it is made.

    Example i adds min(1, C_l/‖g_il‖)·g_il in layer l, at most C_l in norm for whatever g_il, so at most √ΣC_l² = C in
    all. A layer where its norm is not finite gets exactly 0 of it, and the other layers what they get in any case: some
    were summed before that one was seen, and the bound needs no more.

    Source: McMahan et al. 2018, arXiv:1710.06963 (per-layer clipping); He et al. 2023, arXiv:2212.01539 (within the
    backward).
    """

    def __init__(self, tape: Tape, norms: PerLayerClipNorms) -> None:
        super().__init__(tape)
        self._norms = norms

    def backward(self, losses: Tensor, add: Add, check: Check) -> Clipped:
        """Norm, factor and sum, record by record."""
        batch_size, device = losses.shape[0], losses.device
        norms: list[Tensor] = []
        least = torch.ones(batch_size, device=device)

        @torch.no_grad()
        def clip(record: Record) -> None:
            norm_sq = _norm_sq(record, device)
            factors = ops.clip_factors(norm_sq, self._norms.together(record.parameters))
            add([record], factors)
            norms.append(norm_sq)
            torch.minimum(least, factors, out=least)

        self._stream(losses, clip)
        check()
        with torch.no_grad():
            return Clipped(add_up(norms, batch_size, device), least)


def strategy_of(name: str, tape: Tape, max_grad_norm: float, layers: PerLayerClipNorms | None) -> Strategy:
    """The strategy of a name that `keywords.check_strategy` accepts; `layers` for "per_layer" only."""
    if layers is not None:
        return PerLayer(tape, layers)
    return TwoPass(tape, max_grad_norm) if name == "two_pass" else BookKeeping(tape, max_grad_norm)


def _norm_sq(record: Record, device: torch.device) -> Tensor:
    """[B] float64, rounded up: what bounds what `add_weighted_sums` of this record adds."""
    (norm_sq,) = norms_sq([record])
    return norm_sq.to(device=device, dtype=torch.float64)


def _within(factors: Tensor, before: Tensor, again: Tensor) -> Tensor:
    """Factors f with f·√again <= factors·√before, and f <= factors; exactly `factors` where again <= before.

    factors: [B] float32. before, again: [B] float64, squared norms. [B] float32. 0 where `again` is not finite.
    """
    # Division, root and product are below one part in 2⁵⁰ together; to float32 it is rounded down, subnormals too.
    reduced = factors.double() * (before / again).sqrt() * (1 - 2.0**-50)
    exact = torch.where(again.isfinite(), reduced, 0.0)
    nearest = exact.float()
    capped = torch.where(nearest > exact, nearest.nextafter(torch.zeros_like(nearest)), nearest)
    return torch.where(again <= before, factors, torch.minimum(capped, factors))
