"""Definition of the transducer ops (RNN-T, TDT): one utterance at a time, in float64, with all logits in memory.

An utterance with n frames and m labels has the cells (t, u), 0 ≤ t < n, 0 ≤ u ≤ m. From its z = act(encoder_t +
predictor_u) a cell has the logits z Wᵀ + b: V token logits, and in a TDT one logit for each duration. A path starts in
(0, 0). An arc of a cell emits the blank, to (t + d, u), or label u + 1, to (t + d, u + 1). A path ends with a blank
from (n − d, m). In an RNN-T d is 1 with the blank, and 0 with a label. In a TDT each arc chooses d among the durations;
with the blank d > 0. `transducer_loss` is −ln of the sum of all paths' probabilities.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dpkernels.reference._definitions import definition

ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh}


def arcs(durations: Sequence[int]) -> tuple[list[tuple[int, int | None]], list[tuple[int, int | None]]]:
    """The blank's and the labels' arcs: (frames ahead, index of the duration; None in an RNN-T, which has none)."""
    if not durations:
        return [(1, None)], [(0, None)]
    every: list[tuple[int, int | None]] = [(d, i) for i, d in enumerate(durations)]
    return [(d, i) for d, i in every if d > 0], every


def _joint(encoder: Tensor, predictor: Tensor, activation: str) -> Tensor:
    """z [n, m+1, H] of one utterance, rounded to the tensors' dtype, in which the output layer reads it."""
    accumulate = _result_dtype(encoder)
    z: Tensor = ACTIVATIONS[activation](encoder.to(accumulate)[:, None] + predictor.to(accumulate)[None])
    return z.to(encoder.dtype)


def _logits(z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = z.double() @ weight.double().T
    return logits if bias is None else logits + bias.double()


def _own(frame_lengths: Tensor, target_lengths: Tensor) -> list[tuple[int, int, int]]:
    """(i, frames, labels) of each utterance."""
    pairs = zip(frame_lengths.tolist(), target_lengths.tolist(), strict=True)
    return [(i, int(n), int(m)) for i, (n, m) in enumerate(pairs)]


def _scores(logits: Tensor, labels: Tensor, blank: int, durations: Sequence[int], sigma: float) -> Tensor:
    """[n, m+1, 2+D] log-probabilities of the blank, the next label (−∞ where there is none) and each duration."""
    classes = logits.shape[-1] - len(durations)
    tokens = logits[..., :classes].log_softmax(-1) - sigma
    label = torch.full_like(tokens[..., :1], -torch.inf)
    m = len(labels)
    if m:
        index = labels.long()[None, :, None].expand(len(logits), m, 1)
        label = torch.cat([tokens[:, :m].gather(2, index), label[:, m:]], dim=1)
    steps = logits[..., classes:].log_softmax(-1) if durations else logits[..., :0]
    return torch.cat([tokens[..., blank : blank + 1], label, steps], dim=-1)


def _log_alpha(scores: Tensor, durations: Sequence[int]) -> list[list[Tensor]]:
    """Log-probability of reaching each cell, in row n also of the end; each a 0-d tensor, so autograd follows."""
    n, width = scores.shape[:2]
    blanks, labels = arcs(durations)
    impossible = scores.new_full((), -torch.inf)
    alpha = [[impossible] * width for _ in range(n + 1)]
    for t in range(n + 1):
        for u in range(width):
            terms = [scores.new_zeros(())] if t == u == 0 and n > 0 else []
            for kind, sources in ((0, blanks), (1, labels)):
                for ahead, i in sources:
                    s, v = t - ahead, u - kind
                    # the end is reached by a blank after the last label, and no other arc leaves the frames
                    if s < 0 or v < 0 or s >= n or (t == n and (kind == 1 or u < width - 1)):
                        continue
                    terms.append(
                        alpha[s][v] + scores[s, v, kind] + (0.0 if i is None else scores[s, v, 2 + i])
                    )
            finite = [term for term in terms if torch.isfinite(term)]
            if finite:
                alpha[t][u] = torch.stack(finite).logsumexp(0)
    return alpha


def _loss(scores: Tensor, durations: Sequence[int]) -> Tensor:
    return -_log_alpha(scores, durations)[-1][-1]


def transducer_loss(
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
) -> Tensor:
    """The losses [B] in float64 by one dynamic program over all logits, which autograd differentiates."""
    losses = []
    for i, n, m in _own(frame_lengths, target_lengths):
        z = _joint(encoder[i, :n], predictor[i, : m + 1], activation)
        scores = _scores(_logits(z, weight, bias), targets[i, :m], blank, durations, sigma)
        losses.append(_loss(scores, durations))
    return torch.stack(losses) if losses else encoder.sum(dim=(1, 2)).double()


def _result_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


@definition
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
    """The log-probabilities that paths need, and the log-sum-exps that the gradient needs."""
    (batch, frames, _), width, count = encoder.shape, predictor.shape[1], len(durations)
    dtype, classes = _result_dtype(encoder), weight.shape[0] - len(durations)
    scores = encoder.new_full((batch, frames, width, 2 + count), -torch.inf, dtype=dtype)
    normalizers = encoder.new_zeros((batch, frames, width, 2 if count else 1), dtype=dtype)
    for i, n, m in _own(frame_lengths, target_lengths):
        logits = _logits(_joint(encoder[i, :n], predictor[i, : m + 1], activation), weight, bias)
        scores[i, :n, : m + 1] = _scores(logits, targets[i, :m], blank, durations, sigma).to(dtype)
        normalizers[i, :n, : m + 1, 0] = logits[..., :classes].logsumexp(-1).to(dtype)
        if count:
            normalizers[i, :n, : m + 1, 1] = logits[..., classes:].logsumexp(-1).to(dtype)
    return scores, normalizers


@definition
def transducer_lattice(
    scores: Tensor, frame_lengths: Tensor, target_lengths: Tensor, *, durations: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """The losses, and the probability of each arc's kind in each cell: minus the derivative by its score."""
    losses = scores.new_empty(len(scores))
    flows = torch.zeros_like(scores)
    for i, n, m in _own(frame_lengths, target_lengths):
        with torch.enable_grad():
            own = scores[i, :n, : m + 1].detach().double().requires_grad_()
            loss = _loss(own, durations)
            if torch.isfinite(loss):
                flows[i, :n, : m + 1] = -torch.autograd.grad(loss, own)[0].to(flows.dtype)
        losses[i] = loss.detach()
    return losses, flows


def _cell_gradients(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    normalizers: Tensor,
    flows: Tensor,
    grad_loss: Tensor,
    blank: int,
    count: int,
) -> Tensor:
    """∂ grad_loss·loss / ∂logits [n, m+1, V+D] in float64."""
    logits, flows, normalizers = _logits(z, weight, bias), flows.double(), normalizers.double()
    classes, m = weight.shape[0] - count, len(labels)
    through = flows[..., :2].sum(-1, keepdim=True)
    tokens = (logits[..., :classes] - normalizers[..., :1]).exp() * through
    tokens[..., blank] -= flows[..., 0]
    if m:
        index = labels.long()[None, :, None].expand(len(z), m, 1)
        tokens[:, :m].scatter_add_(2, index, -flows[:, :m, 1:2])
    parts = [tokens]
    if count:
        parts.append((logits[..., classes:] - normalizers[..., 1:]).exp() * through - flows[..., 2:])
    return torch.cat(parts, dim=-1) * grad_loss.double()


@definition
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
    """z [B, T·(U+1), H] and the gradients of the logits [B, T·(U+1), V+D], zeros outside of an utterance's cells."""
    (batch, frames, hidden), width = encoder.shape, predictor.shape[1]
    x = encoder.new_zeros((batch, frames, width, hidden))
    g = encoder.new_zeros((batch, frames, width, weight.shape[0]))
    for i, n, m in _own(frame_lengths, target_lengths):
        own = (i, slice(n), slice(m + 1))
        z = _joint(encoder[i, :n], predictor[i, : m + 1], activation)
        arguments = (targets[i, :m], normalizers[own], flows[own], grad_losses[i], blank, len(durations))
        x[own], g[own] = z, _cell_gradients(z, weight, bias, *arguments).to(g.dtype)
    return x.flatten(1, 2), g.flatten(1, 2)


@definition
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
    """∂ Σ_i grad_losses_i·loss_i / ∂(encoder, predictor)."""
    grad_encoder, grad_predictor = torch.zeros_like(encoder), torch.zeros_like(predictor)
    for i, n, m in _own(frame_lengths, target_lengths):
        own = (i, slice(n), slice(m + 1))
        z = _joint(encoder[i, :n], predictor[i, : m + 1], activation)
        arguments = (targets[i, :m], normalizers[own], flows[own], grad_losses[i], blank, len(durations))
        of_z = _cell_gradients(z, weight, bias, *arguments) @ weight.double()
        # both activations' derivatives follow from their values
        of_sum = of_z * (z > 0) if activation == "relu" else of_z * (1.0 - z.double().square())
        grad_encoder[i, :n] = of_sum.sum(1).to(encoder.dtype)
        grad_predictor[i, : m + 1] = of_sum.sum(0).to(predictor.dtype)
    return grad_encoder, grad_predictor
