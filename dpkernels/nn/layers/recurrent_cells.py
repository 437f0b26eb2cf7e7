"""GhostLSTMCell, GhostGRUCell and GhostRNNCell: one step of a recurrence, for loops in user code.

A loop calls a cell T times. The T records of each weight are stacked after the backward (`Record.merge`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dpkernels.nn.layers.linear import ghost_linear
from dpkernels.nn.recording.module import GhostModule
from dpkernels.nn.tensors import autocast_dtype


class _Cell(GhostModule):
    """Mixin: the two products of a torch.nn.RNNCellBase as ghost linear layers."""

    ghost_covers: ClassVar[tuple[str, ...]] = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    ghost_in_graph = True
    ghost_reads_output = True

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """As torch's: input [B,d], hx [B,H]. A private forward raises ValueError for an input without a batch."""
        assert isinstance(self, nn.RNNCellBase)
        if not self._ghost_active(self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh):
            return super().forward(input, hx)  # type: ignore[misc]
        states = tuple(hx) if isinstance(hx, tuple | list) else (hx,)
        for name, t in (("input", input), *(("hx", state) for state in states if state is not None)):
            if t.dim() != 2 or len(t) != len(input):
                raise ValueError(
                    f"{self.ghost_label()!r}: its {name} has shape {list(t.shape)}, not that of a batch of vectors, so "
                    "its gradient cannot be split by example; give it an input [B, d], and hx [B, H]"
                )
        zeros = None if hx is not None else input.new_zeros(len(input), self.hidden_size)
        h = states[0] if zeros is None else zeros
        c = states[-1] if zeros is None else zeros
        return self._step(self._product("ih", input), self._product("hh", h), h, c)

    def ghost_shapes(self, tensors: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As GhostModule's; fake tensors do not see autocast within torch's own cell."""
        return self._empty(*args, **kwargs)

    def _empty(self, input: Tensor, hx: Any = None) -> Any:
        assert isinstance(self, nn.RNNCellBase)
        kept = (
            hx[-1] if isinstance(hx, tuple | list) else input if hx is None else hx
        )  # what the new state adds to
        dtype = autocast_dtype(input) or input.dtype
        if not isinstance(self, nn.RNNCell):
            dtype = torch.promote_types(dtype, kept.dtype)
        states = [input.new_empty((input.shape[0], self.hidden_size), dtype=dtype) for _ in range(2)]
        return states if isinstance(self, nn.LSTMCell) else states[0]

    def _product(self, name: str, x: Tensor) -> Tensor:
        weight, bias = getattr(self, f"weight_{name}"), getattr(self, f"bias_{name}")
        return ghost_linear(self, x, weight, bias)

    def _step(self, ih: Tensor, hh: Tensor, h: Tensor, c: Tensor) -> Any:
        """The new state from W_ih x + b_ih, W_hh h + b_hh and the previous state (without a cell state, c is h)."""
        raise NotImplementedError


class GhostLSTMCell(_Cell, nn.LSTMCell):
    """nn.LSTMCell: same constructor, same state_dict, same results; privately both weights are linear records."""

    def ghost_result(self, tensors: list[Tensor]) -> Any:
        """The pair of states."""
        return tensors[0], tensors[1]

    def _step(self, ih: Tensor, hh: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = (ih + hh).chunk(4, 1)
        new = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(new), new


class GhostGRUCell(_Cell, nn.GRUCell):
    """nn.GRUCell: same constructor, same state_dict, same results; privately both weights are linear records."""

    def _step(self, ih: Tensor, hh: Tensor, h: Tensor, c: Tensor) -> Tensor:
        r_x, z_x, n_x = ih.chunk(3, 1)
        r_h, z_h, n_h = hh.chunk(3, 1)
        new = torch.tanh(n_x + n_h * torch.sigmoid(r_h + r_x))
        return (h - new) * torch.sigmoid(z_h + z_x) + new


class GhostRNNCell(_Cell, nn.RNNCell):
    """nn.RNNCell: same constructor, same state_dict, same results; privately both weights are linear records."""

    def _step(self, ih: Tensor, hh: Tensor, h: Tensor, c: Tensor) -> Tensor:
        return torch.relu(ih + hh) if self.nonlinearity == "relu" else torch.tanh(ih + hh)
