"""GhostLSTM, GhostGRU and GhostRNN: torch's recurrent layers, whose weights are linear records over all steps.

Source: torch.nn.LSTM, GRU and RNN, whose documentation has the formulas and the layout of the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from dpkernels.nn.layers.recurrent_gates import Back, Gates, Steps, gru_gates, lstm_gates, rnn_gates
from dpkernels.nn.recording.module import GhostModule
from dpkernels.nn.recording.records import BiasRecord, LinearRecord, Record
from dpkernels.nn.tensors import (
    accumulation_dtype,
    as_rows,
    autocast_dtype,
    maybe_cast,
    no_autocast,
    sum_over_time,
)

_FUSED: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "LSTM": torch.lstm,
    "GRU": torch.gru,
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
}


class _Recurrent(GhostModule):
    """Mixin: the private forward of a torch.nn.RNNBase, layer by layer."""

    ghost_in_graph = True
    ghost_reads_output = True

    @property
    def ghost_covers(self) -> tuple[str, ...]:  # type: ignore[override]
        """All parameters of torch's class: weight_ih_l0, weight_hh_l0, bias_ih_l0, ..."""
        assert isinstance(self, nn.RNNBase)
        return tuple(self._flat_weights_names)

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As torch's: input [T,B,d], [B,T,d] with batch_first, or a PackedSequence; hx [layers·directions, B, P].

        A private forward raises ValueError for an input without a batch.
        """
        assert isinstance(self, nn.RNNBase)
        if not self._ghost_active(*(getattr(self, name) for name in self._flat_weights_names)):
            return super().forward(input, hx)  # type: ignore[misc]
        packed = input if isinstance(input, PackedSequence) else None
        data = input if packed is None else packed.data
        batch_sizes = None if packed is None else packed.batch_sizes
        if packed is None and data.dim() != 3:
            raise ValueError(
                f"{self.ghost_label()!r}: its input has shape {list(data.shape)}, without a batch dimension, so its "
                "gradient cannot be split by example; give it 3 dimensions, "
                f"{'[B, T, d]' if self.batch_first else '[T, B, d]'}"
            )
        if hx is None:
            hx = data.new_zeros(self.get_expected_hidden_size(data, batch_sizes))
            if isinstance(self, nn.LSTM):
                hx = hx, data.new_zeros(self.get_expected_cell_size(data, batch_sizes))
        elif packed is not None:
            hx = self.permute_hidden(hx, packed.sorted_indices)
        self.check_forward_args(data, hx, batch_sizes)
        if packed is None and self.batch_first:
            data = data.transpose(0, 1)
        layout = _Layout(batch_sizes, *((None, None) if packed is None else packed[2:]))
        out, states = self._private_layers(data, layout, (hx,) if isinstance(hx, Tensor) else tuple(hx))
        hidden: Any = states[0] if isinstance(hx, Tensor) else states
        if packed is not None:
            return PackedSequence(out, *packed[1:]), self.permute_hidden(hidden, packed.unsorted_indices)
        return (out.transpose(0, 1) if self.batch_first else out), hidden

    def ghost_result(self, tensors: list[Tensor]) -> Any:
        """Output and last state, which of an LSTM is a pair."""
        return tensors[0], tensors[1] if len(tensors) == 2 else (tensors[1], tensors[2])

    def ghost_shapes(self, tensors: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As GhostModule's; torch's own forward would be traced step by step."""
        assert isinstance(self, nn.RNNBase)
        x = args[0] if args else kwargs["input"]
        directions = 2 if self.bidirectional else 1
        width = self.proj_size or self.hidden_size
        y = x.new_empty((*x.shape[:-1], directions * width), dtype=autocast_dtype(x) or x.dtype)
        batch = x.shape[0 if self.batch_first else 1]
        widths = (width, self.hidden_size) if isinstance(self, nn.LSTM) else (width,)
        return y, tuple(y.new_empty((self.num_layers * directions, batch, n)) for n in widths)

    def _private_layers(
        self, data: Tensor, layout: _Layout, states: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        assert isinstance(self, nn.RNNBase)
        directions = 2 if self.bidirectional else 1
        names, last = self._flat_weights_names, []
        per_layer = len(names) // self.num_layers
        for index in range(self.num_layers):
            first = [state[index * directions : (index + 1) * directions] for state in states]
            weights = [getattr(self, name) for name in names[index * per_layer : (index + 1) * per_layer]]
            data, *ends = _Layer.apply(
                data, first[0], first[1] if len(first) > 1 else None, layout, self, *weights
            )
            last.append(ends)
            if self.dropout and self.training and index + 1 < self.num_layers:
                data = layout.dropout(data, self.dropout)
        return data, tuple(torch.cat(ends) for ends in zip(*last, strict=True))


class GhostLSTM(_Recurrent, nn.LSTM):
    """nn.LSTM: same constructor (projections too), same state_dict, same results.

    Privately: let α_t [B, 4H] be the gradient of a_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh. W_ih is recorded as a
    linear layer of x_t and α_t, and W_hh of h_{t-1} and α_t, each over all steps at once. The biases are recorded by
    Σ_t α_t, and W_hr as a linear layer of o_t ⊙ tanh(c_t). No sample's gradient is materialised. A padded step of a
    PackedSequence adds nothing, and row i of the records is example i even if the sequence was sorted. Each dropout
    mask belongs to an example and a step; a place in the packed rows would depend on the lengths of other examples.
    dtypes are nn.LSTM's, autocast included. A private forward raises ValueError for an input without a batch.
    """


class GhostGRU(_Recurrent, nn.GRU):
    """nn.GRU: same constructor, same state_dict, same results.

    Privately as GhostLSTM, with gradients of the gates [B, 3H]. The gradient of W_hh h_{t-1} + b_hh contains the factor
    r_t in the part of the new gate, since the reset gate is applied after the product.
    """


class GhostRNN(_Recurrent, nn.RNN):
    """nn.RNN, tanh or relu: same constructor, same state_dict, same results. Privately as GhostLSTM, α_t [B, H]."""


@dataclass(frozen=True)
class _Layout:
    """Layout of the data: [T,B,n] if `batch_sizes` is None, else the rows of a PackedSequence."""

    batch_sizes: Tensor | None
    sorted_indices: Tensor | None
    unsorted_indices: Tensor | None

    def sizes(self, data: Tensor) -> list[int]:
        """Rows of each step."""
        return [data.shape[1]] * data.shape[0] if self.batch_sizes is None else self.batch_sizes.tolist()

    def dropout(self, data: Tensor, p: float) -> Tensor:
        """Dropout with a mask per example and step: in a packed batch it does not depend on the others' lengths."""
        if self.batch_sizes is None:
            return F.dropout(data, p)
        sizes = self.batch_sizes.tolist()
        mask = F.dropout(data.new_ones(len(sizes), sizes[0], data.shape[1]), p)
        if self.sorted_indices is not None:
            mask = mask.index_select(1, self.sorted_indices)
        return data * torch.cat([step[:n] for step, n in zip(mask, sizes, strict=True)])

    def by_sample(self, rows: Tensor, steps: int, batch: int) -> Tensor:
        """Rows [N,n] as [B,T,n], with example i at index i and zeros at padding."""
        if self.batch_sizes is None:
            return rows.view(steps, batch, rows.shape[1]).transpose(0, 1).contiguous()
        packed = PackedSequence(rows, self.batch_sizes, self.sorted_indices, self.unsorted_indices)
        return pad_packed_sequence(packed, batch_first=True)[0]


class _Parts(NamedTuple):
    """One value for each parameter of a direction; None for a parameter that it does not have."""

    w_ih: Any
    w_hh: Any
    b_ih: Any = None
    b_hh: Any = None
    w_hr: Any = None


def _parts(values: Sequence[Any], bias: bool) -> _Parts:
    """Assign a direction's values, given in the order of torch's flat weights."""
    w_ih, w_hh, *rest = values
    b_ih, b_hh = (rest.pop(0), rest.pop(0)) if bias else (None, None)
    return _Parts(w_ih, w_hh, b_ih, b_hh, rest[0] if rest else None)


class _Layer(torch.autograd.Function):
    """One layer in all its directions. weights: for each direction W_ih, W_hh, b_ih, b_hh, W_hr, those that exist."""

    @staticmethod
    def forward(
        ctx: Any,
        data: Tensor,
        h: Tensor,
        c: Tensor | None,
        layout: _Layout,
        layer: _Recurrent,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        assert isinstance(layer, nn.RNNBase)
        ctx.set_materialize_grads(False)
        ctx.tape, ctx.label, ctx.mode, ctx.layout = layer.ghost_tape, layer.ghost_label(), layer.mode, layout
        ctx.weights, ctx.bias, ctx.directions = weights, layer.bias, 2 if layer.bidirectional else 1
        ctx.dtype = autocast_dtype(data) or data.dtype
        sizes = () if layout.batch_sizes is None else (layout.batch_sizes,)
        options = (layer.bias, 1, 0.0, layer.training, layer.bidirectional)
        batch_first = (False,) if layout.batch_sizes is None else ()
        # Without autocast's cache: see `maybe_cast`. Not detached: torch's products of detached tensors round in
        # another order.
        with _no_autocast_cache(data.device.type):
            state = h if c is None else (h, c)
            out, *last = _FUSED[layer.mode](data, *sizes, state, weights, *options, *batch_first)
        ctx.save_for_backward(data, h, c, out, *weights)
        return out, *last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, *dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        data, h, c, out, *weights = ctx.saved_tensors
        needs_data, needs_h, needs_c, _, _, *needs = ctx.needs_input_grad
        count, sizes = len(weights) // ctx.directions, ctx.layout.sizes(data)
        with no_autocast(data.device.type):
            x = as_rows(data).to(ctx.dtype)
            states, douts = (_by_direction(t, ctx.directions) for t in (out, dout))
            by_sample = partial(ctx.layout.by_sample, steps=len(sizes), batch=h.shape[1])
            inputs = by_sample(x) if any(needs) else None
            dx: Tensor | None = None
            dh, dc = torch.empty_like(h), None if c is None else torch.empty_like(c)
            for k in range(ctx.directions):
                w, parameters, needed = (
                    _parts(values[k * count : (k + 1) * count], ctx.bias)
                    for values in (weights, ctx.weights, needs)
                )
                steps = Steps(sizes, reverse=k == 1)
                before = steps.before(states[k], h[k].to(out.dtype)).to(ctx.dtype)
                back = Back(
                    douts[k], *(_start(last, first, k) for last, first in zip(dlast, (h, c), strict=False))
                )
                gates = _gates(ctx.mode, steps, x, before, states[k], None if c is None else c[k], w, back)
                gates = gates.to(ctx.dtype)
                if needs_data:
                    part = gates.ih @ w.w_ih.to(ctx.dtype)
                    dx = part if dx is None else dx.add_(part)
                dh[k] = back.h
                if dc is not None and back.c is not None:
                    dc[k] = back.c
                if inputs is not None:
                    for record in _records(ctx.label, parameters, needed, inputs, before, gates, by_sample):
                        ctx.tape.add(record)
        dx = None if dx is None else dx.view_as(data).to(data.dtype)
        return dx, dh if needs_h else None, dc if needs_c else None, *(None,) * (2 + len(weights))


def _no_autocast_cache(device_type: str) -> AbstractContextManager[object]:
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, torch.get_autocast_dtype(device_type), cache_enabled=False)


def _by_direction(t: Tensor | None, directions: int) -> Sequence[Any]:
    """[T,B,directions·P], or its rows, as one [N,P] per direction."""
    return (None,) * directions if t is None else as_rows(t).chunk(directions, 1)


def _start(last: Tensor | None, first: Tensor, direction: int) -> Tensor:
    """The gradient of a direction's last state [B,n], as a tensor to write to."""
    start = torch.zeros(first.shape[1:], dtype=accumulation_dtype(first), device=first.device)
    return start if last is None else start.copy_(last[direction])


def _gates(
    mode: str, steps: Steps, x: Tensor, before: Tensor, h: Tensor, c: Tensor | None, w: _Parts, back: Back
) -> Gates:
    """The gradients of a direction's gates. The gates are recomputed in x's dtype, as in torch."""
    wide = accumulation_dtype(x)
    w_hh = w.w_hh.to(wide)
    if mode.startswith("RNN"):
        return rnn_gates(steps, h.to(wide), w_hh, back, relu=mode == "RNN_RELU")
    ih = F.linear(x, *(maybe_cast(t, x.dtype) for t in (w.w_ih, w.b_ih)))
    if mode == "GRU":
        hh = F.linear(before, *(maybe_cast(t, x.dtype) for t in (w.w_hh, w.b_hh)))
        return gru_gates(steps, ih.to(wide), hh.to(wide), before.to(wide), w_hh, back)
    assert c is not None
    gates = ih.addmm_(before, w.w_hh.to(x.dtype).t())
    if w.b_hh is not None:
        gates += w.b_hh.to(x.dtype)
    w_hr = None if w.w_hr is None else w.w_hr.to(wide)
    return lstm_gates(steps, gates.to(wide), c.to(wide), w_hh, w_hr, back)


def _records(
    label: str,
    parameters: _Parts,
    needed: _Parts,
    inputs: Tensor,
    before: Tensor,
    gates: Gates,
    by_sample: Callable[[Tensor], Tensor],
) -> Iterator[Record]:
    """Records of a direction's trained parameters. inputs: x [B,T,d]; before: the rows of h_{t-1}."""
    ih = by_sample(gates.ih)
    hh = ih if gates.hh is gates.ih else by_sample(gates.hh)
    if needed.w_ih:
        yield LinearRecord(label, parameters.w_ih, inputs, ih)
    if needed.w_hh:
        yield LinearRecord(label, parameters.w_hh, by_sample(before), hh)
    if needed.b_ih:
        yield BiasRecord(label, parameters.b_ih, sum_over_time(ih))
    if needed.b_hh:
        yield BiasRecord(label, parameters.b_hh, sum_over_time(hh))
    if needed.w_hr:
        assert gates.projected is not None
        state, projection_gradient = map(by_sample, gates.projected)
        yield LinearRecord(label, parameters.w_hr, state, projection_gradient)
