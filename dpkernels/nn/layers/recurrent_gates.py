"""The gradients of a recurrent layer's gates, from the inputs and outputs of its forward.

The forward is torch's own fused function, which returns the states h_t and nothing else. All of them are known in the
backward, so the gates of all steps are recomputed by two matrix products instead of T small ones. A loop over the steps
remains only for c_t (one elementwise call per step) and for the gradient through h_t (one product with W_hh per step).

Rows are packed as in a PackedSequence, step after step: a step has one row for each example that is long enough. In a
batch without padding every step has B rows. N is the number of rows, H the hidden size, P the size of h (H, or the
LSTM's proj_size). Everything is computed in float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Steps:
    """The order of a direction's steps. sizes: number of rows of each step, never growing with t."""

    sizes: Sequence[int]
    reverse: bool

    def split(self, rows: Tensor) -> list[Tensor]:
        """The rows [N, *] of each step, in the direction's order."""
        views = list(rows.split(list(self.sizes)))
        return views[::-1] if self.reverse else views

    def before(self, states: Tensor, initial: Tensor) -> Tensor:
        """The previous state of each row, [N, n]: from the previous step, or `initial` [B, n]."""
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
    """The gradients of the outputs of one direction of a layer.

    Attributes:
        rows: gradient of h_t, [N, P], or None if no output was used.
        h, c: gradients of the last states, [B, P] and for an LSTM [B, H]. The functions below replace them, in place,
            by the gradients of the initial states.
    """

    rows: Tensor | None
    h: Tensor
    c: Tensor | None = None

    def split(self, steps: Steps) -> Sequence[Tensor | None]:
        """`rows` split by step, in the direction's order."""
        return [None] * len(steps.sizes) if self.rows is None else steps.split(self.rows)


@dataclass
class Gates:
    """The gradients of a direction's products, [N, gates·H].

    Attributes:
        ih, hh: gradients of W_ih x_t + b_ih and of W_hh h_{t-1} + b_hh. One tensor if they are equal.
        projected: for an LSTM with a projection, its input o ⊙ tanh(c) [N, H] and its output gradient [N, P].
    """

    ih: Tensor
    hh: Tensor
    projected: tuple[Tensor, Tensor] | None = None

    def to(self, dtype: torch.dtype) -> Gates:
        """All tensors in this dtype."""
        ih = self.ih.to(dtype)
        hh = ih if self.hh is self.ih else self.hh.to(dtype)
        projected = self.projected and (self.projected[0].to(dtype), self.projected[1].to(dtype))
        return Gates(ih, hh, projected)


def rnn_gates(steps: Steps, h: Tensor, w_hh: Tensor, back: Back, *, relu: bool) -> Gates:
    """h_t = tanh(a_t) or relu(a_t), a_t = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh. h: [N, H]."""
    grads = (h > 0).to(w_hh.dtype) if relu else 1 - h.square()
    per_step = zip(steps.split(grads), back.split(steps), strict=True)
    for g, dout in reversed(list(per_step)):
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
    # dh times these gives the gradients of r, of z, and of the new gate's hidden part and input part.
    grads = torch.empty(len(ih), 4, size, dtype=ih.dtype, device=ih.device)
    of_n = torch.mul(1 - z, 1 - n.square(), out=grads[:, 3])
    of_hidden = torch.mul(of_n, r, out=grads[:, 2])
    torch.mul(of_hidden * hidden, 1 - r, out=grads[:, 0])
    torch.mul((h_before - n) * z, 1 - z, out=grads[:, 1])
    flat = grads.view(len(ih), 4 * size)
    hh_grads = flat[:, : 3 * size]
    per_step = zip(steps.split(grads), steps.split(hh_grads), steps.split(z), back.split(steps), strict=True)
    for g, g_hh, z_t, dout in reversed(list(per_step)):
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
    unprojected = None if w_hr is None else o * tanh_c
    # dh times of_c is the gradient that c_t gets from h_t. The gates' gradients are that of c_t times the slots of i, f
    # and g, and dh times the slot of o.
    of_c = (1 - tanh_c.square()).mul_(o)
    of_i = (1 - i).mul_(i).mul_(g)
    grads[:, 2] = (1 - g.square()).mul_(i)
    grads[:, 0] = of_i
    grads[:, 1] = (1 - f).mul_(f).mul_(steps.before(c, c_first))
    grads[:, 3] = (1 - o).mul_(o).mul_(tanh_c)
    out_grads = (
        None if w_hr is None else torch.empty(len(gates), w_hr.shape[0], dtype=c.dtype, device=c.device)
    )
    per_step = zip(
        steps.split(gates),
        steps.split(grads[:, :3]),
        steps.split(grads[:, 3]),
        steps.split(f),
        steps.split(of_c),
        back.split(steps),
        [None] * len(steps.sizes) if out_grads is None else steps.split(out_grads),
        strict=True,
    )
    for gates_t, ifg_t, o_t, f_t, c_t, dout, out_grad in reversed(list(per_step)):
        dh, dc = back.h[: len(gates_t)], back.c[: len(gates_t)]
        if dout is not None:
            dh += dout
        inner = dh
        if w_hr is not None and out_grad is not None:
            out_grad.copy_(dh)
            inner = dh @ w_hr
        dc.addcmul_(inner, c_t)
        ifg_t *= dc.unsqueeze(1)
        o_t *= inner
        dc *= f_t
        torch.mm(gates_t, w_hh, out=dh)
    projected = None if unprojected is None or out_grads is None else (unprojected, out_grads)
    return Gates(gates, gates, projected)
