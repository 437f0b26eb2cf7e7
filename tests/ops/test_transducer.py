"""The transducer loss on every backend: values and gradients, edges, padding and batch mates, what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dpkernels import ops
from dpkernels.reference import transducer as reference
from tests.ops.transducer import TDT, VARIANTS, Batch, make

DTYPES = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Relative to the largest entry: sums of a few hundred products, whose rounded terms float64 does not have."""


every_variant = pytest.mark.parametrize("durations", VARIANTS.values(), ids=VARIANTS)


def truth(batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """The losses in float64, and the gradients of Σ_i w_i·loss_i over the utterances that have a path."""
    exact = batch.to(torch.float64)
    leaves = [t.requires_grad_() for t in exact.states if t is not None]
    losses = reference.transducer_loss(*exact.joint, **exact.options, sigma=exact.sigma)
    total = (losses * weights_of(losses))[losses.isfinite()].sum()
    if not total.requires_grad:  # no utterance has a path
        return losses.detach(), [torch.zeros_like(leaf) for leaf in leaves]
    return losses.detach(), list(torch.autograd.grad(total, leaves))


def weights_of(losses: Tensor) -> Tensor:
    return torch.arange(1, len(losses) + 1, dtype=losses.dtype, device=losses.device)


def computed(batch: Batch, weights: Callable[[Tensor], Tensor] = weights_of) -> tuple[Tensor, list[Tensor]]:
    """The same by the backend's ops; utterances without a path are part of the backward."""
    leaves = [t.detach().clone().requires_grad_() for t in batch.states if t is not None]
    bias = leaves[3] if batch.bias is not None else None
    losses = replace(batch, encoder=leaves[0], predictor=leaves[1], weight=leaves[2], bias=bias).loss()
    gradients = torch.autograd.grad(losses, leaves, weights(losses))
    return losses.detach(), list(gradients)


def close(given: Tensor, exact: Tensor, tolerance: float) -> None:
    scale = exact.abs().max().item() if exact.numel() else 1.0
    torch.testing.assert_close(given.double(), exact, rtol=0.0, atol=tolerance * max(scale, 1.0))


@pytest.mark.thinned(7, backend="triton")
@every_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_and_gradients(backend: str, durations: tuple[int, ...], dtype: torch.dtype) -> None:
    for activation, bias in (("relu", True), ("tanh", False)):
        batch = make(durations, activation=activation, bias=bias, dtype=dtype)
        (losses, gradients), (exact, of_exact) = computed(batch), truth(batch)
        assert torch.equal(losses.isinf(), exact.isinf())
        assert losses[3].isinf()  # an utterance without frames
        kept = exact.isfinite()
        close(losses[kept], exact[kept], DTYPES[dtype])
        for given, wanted in zip(gradients, of_exact, strict=True):
            close(given, wanted, DTYPES[dtype])


@pytest.mark.thinned(9)
@pytest.mark.thinned(9, backend="triton")
@pytest.mark.parametrize(
    ("frames", "labels"), [((40, 17), (21, 9)), ((3, 2), (70, 33)), ((130,), (2,))], ids=str
)
@every_variant
def test_many_frames_or_labels(
    backend: str, durations: tuple[int, ...], frames: tuple[int, ...], labels: tuple[int, ...]
) -> None:
    batch = make(durations, frames=frames, labels=labels, hidden=18, classes=37, blank=36)
    (losses, gradients), (exact, of_exact) = computed(batch), truth(batch)
    assert torch.equal(losses.isinf(), exact.isinf())
    kept = exact.isfinite()
    close(losses[kept], exact[kept], 1e-6)
    for given, wanted in zip(gradients, of_exact, strict=True):
        close(given, wanted, 1e-4)


@pytest.mark.thinned(4)
@pytest.mark.thinned(3, backend="triton")
@every_variant
def test_each_op_is_its_definition(backend: str, durations: tuple[int, ...]) -> None:
    batch = make(durations)
    scores, normalizers = ops.transducer_scores(*batch.joint, **batch.options, sigma=batch.sigma)
    wanted = reference.transducer_scores(*batch.joint, **batch.options, sigma=batch.sigma)
    torch.testing.assert_close((scores, normalizers), wanted, rtol=1e-5, atol=1e-5)
    lengths = (batch.frame_lengths, batch.target_lengths)
    given = ops.transducer_lattice(wanted[0], *lengths, durations=durations)
    torch.testing.assert_close(
        given, reference.transducer_lattice(wanted[0], *lengths, durations=durations), rtol=1e-5, atol=1e-6
    )
    arguments = batch.backward_arguments()
    for name in ("transducer_gradients", "transducer_cells"):
        given = getattr(ops, name)(*arguments, **batch.options)
        torch.testing.assert_close(
            given, getattr(reference, name)(*arguments, **batch.options), rtol=1e-4, atol=1e-5
        )


@pytest.mark.thinned(3, backend="triton")
@every_variant
def test_batch_mates_and_padding_change_no_bit(backend: str, durations: tuple[int, ...]) -> None:
    """Padding holds NaN, and labels that are no class; neither is read."""
    batch = make(durations, frames=(7, 4, 19, 6), labels=(3, 2, 5, 0), hidden=18, classes=37)
    for i in range(4):
        n, m = int(batch.frame_lengths[i]), int(batch.target_lengths[i])
        batch.encoder[i, n:], batch.predictor[i, m + 1 :], batch.targets[i, m:] = torch.nan, torch.nan, -100
    losses, (of_encoder, of_predictor, *_) = computed(batch, torch.ones_like)
    for i in range(4):
        n, m = int(batch.frame_lengths[i]), int(batch.target_lengths[i])
        alone, (encoder, predictor, *_) = computed(batch.alone(i), torch.ones_like)
        assert torch.equal(losses[i], alone[0])
        assert torch.equal(of_encoder[i, :n], encoder[0])
        assert torch.equal(of_predictor[i, : m + 1], predictor[0])
        assert not of_encoder[i, n:].any()
        assert not of_predictor[i, m + 1 :].any()


def test_an_utterance_without_a_path_changes_nothing(backend: str) -> None:
    """Three labels need at least three frames where no duration is 0: a loss of +∞, and a gradient of exactly 0."""
    batch = make((1, 2), frames=(2, 7), labels=(3, 3))
    losses, (of_encoder, of_predictor, of_weight, of_bias) = computed(batch)
    assert losses.isinf().tolist() == [True, False]
    assert not of_encoder[0].any()
    assert not of_predictor[0].any()
    alone = batch.alone(1)
    leaves = [t.clone().requires_grad_() for t in alone.states]
    loss = replace(alone, weight=leaves[2], bias=leaves[3]).loss()
    wanted = torch.autograd.grad(2 * loss.sum(), leaves[2:])
    assert torch.equal(of_weight, wanted[0])
    assert torch.equal(of_bias, wanted[1])


@pytest.mark.thinned(3)
def test_extreme_logits_stay_finite(backend: str) -> None:
    batch = make(TDT, frames=(9, 5), labels=(4, 2))
    batch.encoder.mul_(300.0)
    losses, gradients = computed(batch)
    exact, _ = truth(batch)
    assert losses.isfinite().all()
    close(losses, exact, 1e-5)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.thinned(3)
@every_variant
def test_gradcheck(durations: tuple[int, ...], torch_backend: str) -> None:
    batch = make(durations, frames=(5, 3), labels=(2, 1), hidden=3, classes=4, activation="tanh")
    exact = batch.to(torch.float64)

    def losses(*states: Tensor) -> Tensor:
        names = ("encoder", "predictor", "weight", "bias")
        return replace(exact, **dict(zip(names, states, strict=True))).loss()

    assert torch.autograd.gradcheck(losses, tuple(t.requires_grad_() for t in exact.states))


@pytest.mark.thinned(3)
def test_transformers_tdt_loss_agrees(backend: str) -> None:
    loss_tdt = pytest.importorskip("transformers.loss.loss_tdt", reason="transformers has no TDT loss")
    batch = make(TDT, frames=(11, 6, 9), labels=(4, 3, 0))
    logits = _logits(batch).requires_grad_()
    wanted = loss_tdt.tdt_loss(
        logits[..., :-5],
        logits[..., -5:],
        batch.targets,
        batch.frame_lengths,
        batch.target_lengths,
        batch.blank,
        list(TDT),
        sigma=batch.sigma,
        reduction="none",
    )
    torch.testing.assert_close(batch.loss(), wanted, rtol=1e-5, atol=1e-5)
    _same_logit_gradients(batch, torch.autograd.grad(wanted.sum(), logits)[0])


def test_torchaudio_rnnt_loss_agrees(backend: str) -> None:
    functional = pytest.importorskip("torchaudio.functional", reason="torchaudio is not installed")
    batch = make((), frames=(11, 6, 9), labels=(4, 3, 1), sigma=0.0)
    logits = _logits(batch).cpu().requires_grad_()
    wanted = functional.rnnt_loss(
        logits,
        *(t.int().cpu() for t in (batch.targets, batch.frame_lengths, batch.target_lengths)),
        blank=batch.blank,
        reduction="none",
    )
    torch.testing.assert_close(batch.loss().cpu(), wanted, rtol=1e-5, atol=1e-5)
    _same_logit_gradients(batch, torch.autograd.grad(wanted.sum(), logits)[0])


def _logits(batch: Batch) -> Tensor:
    z = (batch.encoder[:, :, None] + batch.predictor[:, None]).relu()
    return torch.nn.functional.linear(z, batch.weight, batch.bias).detach()


def _same_logit_gradients(batch: Batch, wanted: Tensor) -> None:
    scores, normalizers = ops.transducer_scores(*batch.joint, **batch.options, sigma=batch.sigma)
    lengths = (batch.frame_lengths, batch.target_lengths)
    losses, flows = ops.transducer_lattice(scores, *lengths, durations=batch.durations)
    _, g = ops.transducer_cells(*batch.joint, normalizers, flows, torch.ones_like(losses), **batch.options)
    torch.testing.assert_close(g.view(wanted.shape), wanted.to(g.device), rtol=1e-4, atol=1e-5)


def test_no_utterances(backend: str) -> None:
    batch = make(TDT)
    empty = replace(batch, **{name: getattr(batch, name)[:0] for name in _BATCHED})
    losses, gradients = computed(empty)
    assert losses.shape == (0,)
    assert not any(gradient.any() for gradient in gradients)


_BATCHED = ("encoder", "predictor", "targets", "frame_lengths", "target_lengths")
Change = Callable[[Batch], Batch]
REFUSED: dict[str, tuple[type[Exception], Change]] = {
    "frame_lengths: given 8": (ValueError, lambda b: replace(b, frame_lengths=b.frame_lengths + 1)),
    "target_lengths: given 4": (ValueError, lambda b: replace(b, target_lengths=b.target_lengths + 1)),
    "targets: given 9": (ValueError, lambda b: replace(b, targets=torch.full_like(b.targets, 9))),
    "targets: given 0": (ValueError, lambda b: replace(b, targets=torch.zeros_like(b.targets))),
    "targets: given -1": (ValueError, lambda b: replace(b, targets=torch.full_like(b.targets, -1))),
    "blank: given 9": (ValueError, lambda b: replace(b, blank=9)),
    "durations: given": (ValueError, lambda b: replace(b, durations=(0, 0, 1, 1, 2))),
    "activation: given 'gelu'": (ValueError, lambda b: replace(b, activation="gelu")),
    "predictor: expected": (ValueError, lambda b: replace(b, predictor=b.predictor[:, :, :-1])),
    "weight: expected": (ValueError, lambda b: replace(b, weight=b.weight[:, :-1])),
    "bias: expected": (ValueError, lambda b: replace(b, bias=b.bias[:-1])),
    "targets: expected \\[B, U\\]": (ValueError, lambda b: replace(b, targets=b.targets[:, :-1])),
    "targets: expected int64": (TypeError, lambda b: replace(b, targets=b.targets.int())),
    "weight: expected torch.float32": (TypeError, lambda b: replace(b, weight=b.weight.double())),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message: str) -> None:
    error, change = REFUSED[message]
    with pytest.raises(error, match=message):
        change(make(TDT)).loss()


@pytest.mark.parametrize("op", ["transducer_gradients", "transducer_cells"])
@pytest.mark.parametrize(
    ("message", "place", "change"),
    [
        ("normalizers: expected \\[B, T, U\\+1, 2\\]", 7, lambda t: t[..., :1]),
        ("flows: expected \\[B, T, U\\+1, 7\\]", 8, lambda t: t[:, :-1]),
        ("grad_losses: expected \\[B\\]", 9, lambda t: t[:1]),
        ("grad_losses: expected torch.float32", 9, lambda t: t.double()),
    ],
)
def test_what_a_backward_refuses(
    op: str, message: str, place: int, change: Callable[[Tensor], Tensor]
) -> None:
    """A kernel would read beyond a tensor that is too small."""
    batch = make(TDT)
    arguments = list(batch.backward_arguments())
    arguments[place] = change(arguments[place])
    with pytest.raises((TypeError, ValueError), match=message):
        getattr(ops, op)(*arguments, **batch.options)


def test_only_sums_over_durations_reach_the_end(torch_backend: str) -> None:
    """A TDT over {1} with one frame a label is one path: its loss is a sum of known terms."""
    batch = make((1,), frames=(3,), labels=(2,), sigma=0.25)
    tokens = _logits(batch)[..., :-1].log_softmax(-1)[0]
    first, second = batch.targets[0].tolist()
    # an order of two labels and a final blank: only label, label, blank has three arcs that end with the blank
    path = tokens[0, 0, first] + tokens[1, 1, second] + tokens[2, 2, batch.blank]
    torch.testing.assert_close(batch.loss()[0], -(path - 3 * 0.25))


def test_rnnt_paths_by_enumeration(torch_backend: str) -> None:
    batch = make((), frames=(3,), labels=(2,), sigma=0.0)
    tokens = _logits(batch).log_softmax(-1)[0]
    terms = []
    for places in itertools.combinations_with_replacement(range(3), 2):  # each label's frame
        u, total = 0, torch.zeros(())
        for t in range(3):
            for _ in range(places.count(t)):
                total, u = total + tokens[t, u, batch.targets[0, u]], u + 1
            total = total + tokens[t, u, batch.blank]
        terms.append(total)
    torch.testing.assert_close(batch.loss()[0], -torch.stack(terms).logsumexp(0))


def test_memory_does_not_grow_with_the_classes(torch_backend: str) -> None:
    """What the backward keeps is 2 + D scores' worth a cell, whatever V is."""
    kept: dict[int, int] = {}
    for classes in (50, 500):
        batch = make(TDT, classes=classes, bias=False)
        saved: list[Any] = []

        def pack(tensor: Tensor, saved: list[Any] = saved) -> Tensor:
            saved.append(tensor)
            return tensor

        batch.encoder.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            batch.loss()
        kept[classes] = sum(t.nbytes for t in saved) - batch.weight.nbytes
    assert kept[50] == kept[500]
