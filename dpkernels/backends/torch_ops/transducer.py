"""The transducer ops composed from PyTorch, in blocks of an utterance's own frames, so that no batch mate has a part in
its bits: the shapes of all products and the places of all entries depend on its own lengths only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1 << 22
"""Logits computed at a time: 16 MiB of float32, 511 cells of 8,198 classes, so that products are efficient."""


@dataclass(frozen=True)
class _Utterance:
    """One utterance's own states [n, H] and [m+1, H], and labels [m]; frames are processed in blocks."""

    encoder: Tensor
    predictor: Tensor
    labels: Tensor
    weight: Tensor
    bias: Tensor | None
    activation: str

    def blocks(self) -> Iterator[slice]:
        """The frames of each block."""
        step = max(1, BLOCK // max(1, len(self.predictor) * len(self.weight)))
        for t in range(0, len(self.encoder), step):
            yield slice(t, min(t + step, len(self.encoder)))

    def joint(self, frames: slice) -> tuple[Tensor, Tensor]:
        """(z, act of the sum before rounding) [frames, m+1, H]; z in the products' dtype."""
        accumulate = torch.promote_types(self.encoder.dtype, torch.float32)
        total = self.encoder[frames].to(accumulate)[:, None] + self.predictor.to(accumulate)[None]
        value = total.relu_() if self.activation == "relu" else total.tanh_()
        return value.to(self.encoder.dtype), value

    def logits(self, z: Tensor) -> Tensor:
        """[frames·(m+1), V+D] in float32 or float64, from products in z's dtype."""
        rows = z.flatten(0, 1)
        # a CPU's product of half types is rounded to them: it is computed in float32 instead
        if z.device.type == "cpu" and z.dtype in (torch.bfloat16, torch.float16):
            rows = rows.float()
        weight = self.weight.to(rows.dtype).T
        logits = rows @ weight if self.bias is None else torch.addmm(self.bias.to(rows.dtype), rows, weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _utterances(
    encoder: Tensor,
    predictor: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    frame_lengths: Tensor,
    target_lengths: Tensor,
    activation: str,
) -> Iterator[tuple[tuple[int, slice, slice], _Utterance]]:
    """Each utterance, with the index of its cells in [B, T, U+1, *]."""
    for i, (n, m) in enumerate(zip(frame_lengths.tolist(), target_lengths.tolist(), strict=True)):
        # a contiguous copy: where the tensors begin in memory must not matter to a vectorised loop
        own = _Utterance(
            encoder[i, :n].contiguous(),
            predictor[i, : m + 1].contiguous(),
            targets[i, :m].contiguous(),
            weight,
            bias,
            activation,
        )
        yield (i, slice(n), slice(m + 1)), own


def transducer_scores(
    encoder: Tensor,
    predictor: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    frame_lengths: Tensor,
    target_lengths: Tensor,
    *,
    blank: int,
    durations: Sequence[int] = (),
    activation: str = "relu",
    sigma: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """See `dpkernels.ops.transducer_scores`."""
    (batch, frames, _), width, count = encoder.shape, predictor.shape[1], len(durations)
    dtype, classes = torch.promote_types(encoder.dtype, torch.float32), len(weight) - count
    scores = encoder.new_full((batch, frames, width, 2 + count), -torch.inf, dtype=dtype)
    normalizers = encoder.new_zeros((batch, frames, width, 2 if count else 1), dtype=dtype)
    joint = (encoder, predictor, weight, bias, targets, frame_lengths, target_lengths)
    for (i, _, labels), own in _utterances(*joint, activation):
        m = len(own.labels)
        for block in own.blocks():
            logits = own.logits(own.joint(block)[0]).view(-1, m + 1, len(weight))
            tokens, steps = logits[..., :classes], logits[..., classes:]
            total = tokens.logsumexp(-1)
            normalizers[i, block, labels, 0] = total
            scores[i, block, labels, 0] = tokens[..., blank] - total - sigma
            if m:
                index = own.labels[None, :, None].expand(len(logits), m, 1)
                scores[i, block, :m, 1] = tokens[:, :m].gather(2, index)[..., 0] - total[:, :m] - sigma
            if count:
                normalizers[i, block, labels, 1] = of_steps = steps.logsumexp(-1)
                scores[i, block, labels, 2:] = steps - of_steps[..., None]
    return scores, normalizers


Arc = tuple[int, int, int | None]
"""(frames ahead, 0 for the blank or 1 for a label, index of the duration or None)."""


def _arcs(durations: Sequence[int]) -> list[Arc]:
    if not durations:
        return [(1, 0, None), (0, 1, None)]
    blanks: list[Arc] = [(d, 0, i) for i, d in enumerate(durations) if d > 0]
    labels: list[Arc] = [(d, 1, i) for i, d in enumerate(durations)]
    return blanks + labels


def _score(scores: Tensor, arc: Arc) -> Tensor:
    """[n, m+1] the log-probability of taking the arc in each cell."""
    _, kind, index = arc
    return scores[..., kind] if index is None else scores[..., kind] + scores[..., 2 + index]


def _skewed(cells: Tensor, fill: float) -> Tensor:
    """[n, w] → [n+w−1, w], cell (t, u) in row t + u: the cells of a row do not depend on one another."""
    n, width = cells.shape
    out = cells.new_full((n + width - 1, width), fill)
    u = torch.arange(width, device=cells.device)
    out[torch.arange(n, device=cells.device)[:, None] + u, u] = cells
    return out


def _own_lattice(scores: Tensor, durations: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(loss, flows [n, m+1, 2+D]) of one utterance; float64, diagonal by diagonal."""
    n, width = scores.shape[:2]
    flows = torch.zeros_like(scores)
    if n == 0:
        return scores.new_full((), torch.inf), flows
    arcs = [(arc, _skewed(_score(scores, arc), -torch.inf)) for arc in _arcs(durations)]
    rows = n + width - 1
    alpha = scores.new_full((rows, width), -torch.inf)
    u = torch.arange(width, device=scores.device)
    alpha[0, 0] = 0.0
    for row in range(1, rows):
        total = alpha[row]
        for (ahead, kind, _), arc in arcs:
            source = row - ahead - kind
            if source < 0:
                continue
            arrived = alpha[source] + arc[source]
            total[kind:] = torch.logaddexp(total[kind:], arrived[: width - kind])
        # a cell of this diagonal beyond the utterance's frames is none
        total.masked_fill_((row - u >= n) | (row < u), -torch.inf)
    beta = scores.new_full((rows, width), -torch.inf)
    for row in range(rows - 1, -1, -1):
        total = beta[row]
        for (ahead, kind, _), arc in arcs:
            target = row + ahead + kind
            if kind == 0 and row - (width - 1) + ahead == n:
                total[-1] = torch.logaddexp(total[-1], arc[row, -1])  # the end of all paths
            if target < rows:
                onward = beta[target, kind:] + arc[row, : width - kind]
                total[: width - kind] = torch.logaddexp(total[: width - kind], onward)
        total.masked_fill_((row - u >= n) | (row < u), -torch.inf)
    log_likelihood = beta[0, 0]
    if not torch.isfinite(log_likelihood):
        return scores.new_full((), torch.inf), flows
    t = torch.arange(n, device=scores.device)[:, None]
    for (ahead, kind, index), arc in arcs:
        onward = scores.new_full((n, width), -torch.inf)
        if ahead < n:
            reached = beta[t[ahead:] + u, u]  # [n − ahead, w]
            onward[: n - ahead, : width - kind] = reached[:, kind:]
        if kind == 0 and ahead <= n:
            onward[n - ahead, -1] = 0.0
        flow = (alpha[t + u, u] + arc[t + u, u] + onward - log_likelihood).exp()
        flows[..., kind] += flow
        if index is not None:
            flows[..., 2 + index] += flow
    return -log_likelihood, flows


def transducer_lattice(
    scores: Tensor, frame_lengths: Tensor, target_lengths: Tensor, *, durations: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """See `dpkernels.ops.transducer_lattice`."""
    losses, flows = scores.new_empty(len(scores)), torch.zeros_like(scores)
    for i, (n, m) in enumerate(zip(frame_lengths.tolist(), target_lengths.tolist(), strict=True)):
        loss, own = _own_lattice(scores[i, :n, : m + 1].double(), durations)
        losses[i], flows[i, :n, : m + 1] = loss, own
    return losses, flows


def _logit_gradients(
    own: _Utterance,
    z: Tensor,
    normalizers: Tensor,
    flows: Tensor,
    grad_loss: Tensor,
    blank: int,
    count: int,
) -> Tensor:
    """∂ grad_loss·loss / ∂ logits [frames, m+1, V+D] of a block; its normalizers and flows have the block's cells."""
    logits = own.logits(z).view(*z.shape[:2], -1)
    classes, m = logits.shape[-1] - count, len(own.labels)
    through = (flows[..., 0] + flows[..., 1]).mul_(grad_loss)[..., None]
    tokens, steps = logits[..., :classes], logits[..., classes:]
    tokens.sub_(normalizers[..., :1]).exp_().mul_(through)
    tokens[..., blank] -= flows[..., 0] * grad_loss
    if m:
        index = own.labels[None, :, None].expand(len(z), m, 1)
        tokens[:, :m].scatter_add_(2, index, flows[:, :m, 1:2] * -grad_loss)
    if count:
        steps.sub_(normalizers[..., 1:]).exp_().mul_(through).sub_(flows[..., 2:] * grad_loss)
    return logits


def transducer_gradients(
    encoder: Tensor,
    predictor: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    frame_lengths: Tensor,
    target_lengths: Tensor,
    normalizers: Tensor,
    flows: Tensor,
    grad_losses: Tensor,
    *,
    blank: int,
    durations: Sequence[int] = (),
    activation: str = "relu",
) -> tuple[Tensor, Tensor]:
    """See `dpkernels.ops.transducer_gradients`."""
    grad_encoder, grad_predictor = torch.zeros_like(encoder), torch.zeros_like(predictor)
    joint = (encoder, predictor, weight, bias, targets, frame_lengths, target_lengths)
    for (i, _, labels), own in _utterances(*joint, activation):
        total = torch.zeros_like(own.predictor, dtype=flows.dtype)
        for block in own.blocks():
            z, value = own.joint(block)
            cells = (normalizers[i, block, labels], flows[i, block, labels], grad_losses[i])
            g = _logit_gradients(own, z, *cells, blank, len(durations)).flatten(0, 1)
            of_z = (g @ weight.to(g.dtype)).view(value.shape)
            of_sum = of_z.mul_(value > 0) if activation == "relu" else of_z.mul_(1.0 - value.square())
            grad_encoder[i, block] = of_sum.sum(1).to(encoder.dtype)
            total += of_sum.sum(0)
        grad_predictor[i, labels] = total.to(predictor.dtype)
    return grad_encoder, grad_predictor


def transducer_cells(
    encoder: Tensor,
    predictor: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    frame_lengths: Tensor,
    target_lengths: Tensor,
    normalizers: Tensor,
    flows: Tensor,
    grad_losses: Tensor,
    *,
    blank: int,
    durations: Sequence[int] = (),
    activation: str = "relu",
) -> tuple[Tensor, Tensor]:
    """See `dpkernels.ops.transducer_cells`."""
    (batch, frames, hidden), width = encoder.shape, predictor.shape[1]
    x = encoder.new_zeros((batch, frames, width, hidden))
    g = encoder.new_zeros((batch, frames, width, len(weight)))
    joint = (encoder, predictor, weight, bias, targets, frame_lengths, target_lengths)
    for (i, _, labels), own in _utterances(*joint, activation):
        for block in own.blocks():
            x[i, block, labels] = z = own.joint(block)[0]
            cells = (normalizers[i, block, labels], flows[i, block, labels], grad_losses[i])
            g[i, block, labels] = _logit_gradients(own, z, *cells, blank, len(durations)).to(g.dtype)
    return x.flatten(1, 2), g.flatten(1, 2)
