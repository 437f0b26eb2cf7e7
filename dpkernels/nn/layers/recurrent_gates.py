"""The gradients of a recurrent layer's gates, from what its forward read and gave.

The forward is torch's own fused function, which hands out the states h_t and nothing else. As all of them are known in
the backward, the gates of all steps are two matrix products again, not T small ones; what is left to a loop over the
steps is what has to be: c_t (one elementwise call a step), and the way back through h_t (one product with W_hh).

Rows are packed as in a PackedSequence, step after step, a step's rows those of the examples that are that long; a
batch without padding is the case in which all steps have B rows. N is the number of rows, H the hidden size, P the
size of h (H, or the LSTM's proj_size). All is computed in float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Steps:
    """In which order a direction goes through the steps. sizes: rows of each step, never growing with t."""

    sizes: Sequence[int]
    reverse: bool

    def split(self, rows: Tensor) -> list[Tensor]:
        """The rows [N, *] of each step, in the direction's order."""
        views = list(rows.split(list(self.sizes)))
        return views[::-1] if self.reverse else views

    def before(self, states: Tensor, initial: Tensor) -> Tensor:
        """The state that each row starts from, [N, n]: of the step before, or `initial` [B, n]."""
        views = states.split(list(self.sizes))
        if not self.reverse:
            return torch.cat([initial, *(view[:n] for view, n in zip(views, self.sizes[1:], strict=False))])
        parts = []
        for t, n in enumerate(self.sizes):
            later = self.sizes[t + 1] if t + 1 < len(self.sizes) else 0
            parts += [*views[t + 1 : t + 2], initial[later:n]]  # the shorter examples start here
        return torch.cat(parts)


@dataclass
class Back:
    """What comes back to one direction of a layer: gradients of its outputs.

    Attributes:
        rows: of h_t, [N, P], or None where no output was used.
        h, c: of the last states, [B, P] and, an LSTM's, [B, H]: they become those of the first ones, in place.
    """

    rows: Tensor | None
    h: Tensor
    c: Tensor | None = None

    def split(self, steps: Steps) -> Sequence[Tensor | None]:
        """`rows`, step by step, in the direction's order."""
        return [None] * len(steps.sizes) if self.rows is None else steps.split(self.rows)


@dataclass
class Gates:
    """The gradients of a direction's products, [N, gates·H].

    Attributes:
        ih, hh: of W_ih x_t + b_ih and of W_hh h_{t-1} + b_hh. One tensor where they are the same.
        projected: of an LSTM with a projection, its input o ⊙ tanh(c) [N, H] and its output's gradient [N, P].
    """

    ih: Tensor
    hh: Tensor
    projected: tuple[Tensor, Tensor] | None = None

    def to(self, dtype: torch.dtype) -> Gates:
        """All of it in this dtype."""
        ih = self.ih.to(dtype)
        hh = ih if self.hh is self.ih else self.hh.to(dtype)
        projected = self.projected and (self.projected[0].to(dtype), self.projected[1].to(dtype))
        return Gates(ih, hh, projected)


def rnn_gates(steps: Steps, h: Tensor, w_hh: Tensor, back: Back, *, relu: bool) -> Gates:
    """h_t = tanh(a_t) or relu(a_t), a_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh. h: [N, H]."""
    grads = (h > 0).to(w_hh.dtype) if relu else 1 - h.square()
    each = zip(steps.split(grads), back.split(steps), strict=True)
    for g, dout in reversed(list(each)):
        dh = back.h[: len(g)]
        if dout is not None:
            dh += dout
        g *= dh
        torch.mm(g, w_hh, out=dh)
    return Gates(grads, grads)


def gru_gates(steps: Steps, ih: Tensor, hh: Tensor, h_before: Tensor, w_hh: Tensor, back: Back) -> Gates:
    """r, z = σ(ih + hh), n = tanh(ih_n + r ⊙ hh_n), h_t = (1 - z) ⊙ n + z ⊙ h_{t-1}; gates in the order r, z, n.

    The new gate's hidden part is gated by r, so its gradient is r times that of its input part.
    ih, hh: [N, 3H]. h_before: h_{t-1} [N, H].
    """
    size = h_before.shape[1]
    r, z = (ih[:, : 2 * size] + hh[:, : 2 * size]).sigmoid_().chunk(2, 1)
    hidden = hh[:, 2 * size :]
    n = torch.addcmul(ih[:, 2 * size :], r, hidden).tanh_()
    # dh times these is: r's and z's gradient, the new gate's hidden and its input part.
    grads = torch.empty(len(ih), 4, size, dtype=ih.dtype, device=ih.device)
    of_n = torch.mul(1 - z, 1 - n.square(), out=grads[:, 3])
    of_hidden = torch.mul(of_n, r, out=grads[:, 2])
    torch.mul(of_hidden * hidden, 1 - r, out=grads[:, 0])
    torch.mul((h_before - n) * z, 1 - z, out=grads[:, 1])
    flat = grads.view(len(ih), 4 * size)
    hh_grads = flat[:, : 3 * size]
    each = zip(steps.split(grads), steps.split(hh_grads), steps.split(z), back.split(steps), strict=True)
    for g, g_hh, z_t, dout in reversed(list(each)):
        dh = back.h[: len(g)]
        if dout is not None:
            dh += dout
        g *= dh.unsqueeze(1)
        dh *= z_t
        dh.addmm_(g_hh, w_hh)
    return Gates(torch.cat((flat[:, : 2 * size], flat[:, 3 * size :]), 1), hh_grads)


def lstm_gates(
    steps: Steps, gates: Tensor, c_first: Tensor, w_hh: Tensor, w_hr: Tensor | None, back: Back
) -> Gates:
    """i, f, o = σ, g = tanh; c_t = f ⊙ c_{t-1} + i ⊙ g, h_t = o ⊙ tanh(c_t), or W_hr of it; in the order i, f, g, o.

    gates: their arguments [N, 4H], which are overwritten. c_first: c_0 [B, H].
    """
    assert back.c is not None
    size = c_first.shape[1]
    grads = gates.view(len(gates), 4, size)
    grads[:, :2].sigmoid_()
    grads[:, 2].tanh_()
    grads[:, 3].sigmoid_()
    i, f, g, o = grads.unbind(1)
    f = f.contiguous()
    c, state = i * g, c_first.clone()
    for c_t, f_t in zip(steps.split(c), steps.split(f), strict=True):
        c_t.addcmul_(f_t, state[: len(c_t)])
        state[: len(c_t)] = c_t
    tanh_c = c.tanh()
    read = None if w_hr is None else o * tanh_c
    # dh times the first is what c_t gets from h_t; c_t's gradient times i, f and g, and dh times o, are the gates'.
    of_c = (1 - tanh_c.square()).mul_(o)
    of_i = (1 - i).mul_(i).mul_(g)
    grads[:, 2] = (1 - g.square()).mul_(i)
    grads[:, 0] = of_i
    grads[:, 1] = (1 - f).mul_(f).mul_(steps.before(c, c_first))
    grads[:, 3] = (1 - o).mul_(o).mul_(tanh_c)
    out_grads = (
        None if w_hr is None else torch.empty(len(gates), w_hr.shape[0], dtype=c.dtype, device=c.device)
    )
    each = zip(
        steps.split(gates),
        steps.split(grads[:, :3]),
        steps.split(grads[:, 3]),
        steps.split(f),
        steps.split(of_c),
        back.split(steps),
        [None] * len(steps.sizes) if out_grads is None else steps.split(out_grads),
        strict=True,
    )
    for whole, ifg_t, o_t, f_t, c_t, dout, kept in reversed(list(each)):
        dh, dc = back.h[: len(whole)], back.c[: len(whole)]
        if dout is not None:
            dh += dout
        inner = dh
        if w_hr is not None and kept is not None:
            kept.copy_(dh)
            inner = dh @ w_hr
        dc.addcmul_(inner, c_t)
        ifg_t *= dc.unsqueeze(1)
        o_t *= inner
        dc *= f_t
        torch.mm(whole, w_hh, out=dh)
    projected = None if read is None or out_grads is None else (read, out_grads)
    return Gates(gates, gates, projected)
