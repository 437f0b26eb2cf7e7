"""The optimizer's state under several ranks: each holds the part of it that belongs to the pieces that it steps."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dpkernels.privacy.ranks.exchange import Exchange
from dpkernels.privacy.ranks.group import Ranks
from dpkernels.privacy.ranks.pieces import Piece


@dataclass(frozen=True)
class Span:
    """The entries of one trained parameter that a process steps: pieces that follow one another.

    place: the parameter's position among the trained ones.
    """

    place: int
    pieces: tuple[Piece, ...]

    @property
    def _whole(self) -> Piece:
        first, last = self.pieces[0], self.pieces[-1]
        return Piece(first.index, self.place, first.start, last.stop)

    def of(self, tensor: Tensor) -> Tensor:
        """These entries of a tensor of the parameter's shape: the tensor itself if they are all, else a flat view."""
        return self._whole.of(tensor)

    def cut(self, part: Tensor) -> list[Tensor]:
        """The pieces of a tensor of these entries (what `of` returns), as views."""
        if len(self.pieces) == 1:
            return [part]
        start = self.pieces[0].start
        return [Piece(p.index, p.place, p.start - start, p.stop - start).of(part) for p in self.pieces]


def spans(pieces: Iterable[Piece]) -> list[Span]:
    """The spans of a process's pieces, which follow one another."""
    by_place: dict[int, list[Piece]] = {}
    for piece in pieces:
        by_place.setdefault(piece.place, []).append(piece)
    return [Span(place, tuple(these)) for place, these in by_place.items()]


class StateShards:
    """This rank's part of the optimizer's state, by parameter, in torch's names; floats are float32.

    Args:
        ranks: the processes.
        exchange: how they exchange pieces.
        trained: the trained parameters.
        owned: the spans that this rank steps.

    Attributes:
        by_parameter: the state of each owned parameter's span, in the layout of `optimizer.state`.
    """

    def __init__(
        self, ranks: Ranks, exchange: Exchange, trained: Sequence[nn.Parameter], owned: Sequence[Span]
    ) -> None:
        self._ranks = ranks
        self._exchange = exchange
        self._trained = trained
        self._owned = owned
        self.by_parameter: defaultdict[nn.Parameter, dict[str, Any]] = defaultdict(dict)

    def take_from(self, optimizer: Optimizer) -> None:
        """Move this rank's part of the optimizer's whole state here, and free the whole."""
        if not any(parameter in optimizer.state for parameter in self._trained):
            return
        self.by_parameter.clear()
        for span in self._owned:
            parameter = self._trained[span.place]
            whole = optimizer.state.get(parameter, {})
            self.by_parameter[parameter] = {
                name: span.of(value.float().contiguous()).clone()
                if _is_entrywise(value, parameter)
                else value
                for name, value in whole.items()
            }
        for parameter in self._trained:
            optimizer.state.pop(parameter, None)

    def give_back(self, optimizer: Optimizer) -> None:
        """Move the state back into the optimizer, whole, on every rank. A collective operation."""
        whole = self.whole()
        self.by_parameter.clear()
        for parameter, state in whole.items():
            optimizer.state[parameter] = state

    @torch.no_grad()
    def whole(self) -> dict[nn.Parameter, dict[str, Any]]:
        """The whole state of every trained parameter that has one, on every rank. A collective operation."""
        mine: dict[int, dict[str, Any]] = {}
        for span in self._owned:
            state = self.by_parameter.get(self._trained[span.place], {})
            if state:
                mine[span.place] = {
                    name: None if _is_entrywise(value, span.of(self._trained[span.place])) else _sent(value)
                    for name, value in state.items()
                }
        kept: dict[int, dict[str, Any]] = {}
        for of_rank in self._ranks.gathered(mine):
            kept |= of_rank
        states: dict[nn.Parameter, dict[str, Any]] = {
            parameter: {name: _received(value, parameter) for name, value in kept[place].items()}
            for place, parameter in enumerate(self._trained)
            if place in kept
        }
        for name in sorted({n for state in kept.values() for n, value in state.items() if value is None}):
            wholes = [torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for p in self._trained]
            for span in self._owned:
                part = self.by_parameter.get(self._trained[span.place], {}).get(name)
                if part is not None:
                    span.of(wholes[span.place]).copy_(part)
            self._exchange.to_all(wholes)
            for parameter, value in zip(self._trained, wholes, strict=True):
                if name in states.get(parameter, {}):
                    states[parameter][name] = value
        return states


@dataclass(frozen=True)
class _OnDevice:
    """A counter that torch keeps on its parameter's device: another rank's device has another number."""

    counter: Tensor


def _sent(value: Any) -> Any:
    """A state without entries, for another rank."""
    return _OnDevice(value.cpu()) if isinstance(value, Tensor) and value.device.type != "cpu" else value


def _received(value: Any, parameter: Tensor) -> Any:
    return value.counter.to(parameter.device) if isinstance(value, _OnDevice) else value


def _is_entrywise(value: Any, of: Tensor) -> bool:
    """Whether a state has an entry for each of a tensor's. torch's counters are tensors without a dimension."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == of.shape
