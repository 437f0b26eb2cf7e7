"""Per-example losses: their formula, their independence, and indices that no class stands for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dpkernels.losses import IGNORED, cross_entropy_per_example, ctc_loss_per_example

BLANK, CLASSES, FRAMES = 0, 4, 5
LENGTHS = torch.tensor([5, 3, 4])
LABELS = [torch.tensor(row) for row in ([1, 2, 2], [3], [2, 1])]


def random_logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def enumerated(logits: Tensor, labels: Tensor) -> float:
    """−ln of the sum over every path of T frames that collapses to the labels."""
    log_probs, total = logits.log_softmax(-1).tolist(), 0.0
    for path in itertools.product(range(logits.shape[1]), repeat=len(logits)):
        collapsed = [symbol for symbol, _ in itertools.groupby(path) if symbol != BLANK]
        if collapsed == labels.tolist():
            total += math.exp(sum(frame[symbol] for frame, symbol in zip(log_probs, path, strict=True)))
    return -math.log(total)


def padded(rows: list[Tensor]) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=IGNORED)


def ctc(logits: Tensor) -> Tensor:
    return ctc_loss_per_example(logits, LENGTHS, padded(LABELS), BLANK)


def cross_entropy(logits: Tensor) -> Tensor:
    return cross_entropy_per_example(logits, padded(LABELS))


LOSSES = [pytest.param(ctc, FRAMES, id="ctc"), pytest.param(cross_entropy, 3, id="cross entropy")]


def test_ctc_is_the_sum_over_all_alignments() -> None:
    logits = random_logits(3, FRAMES, CLASSES)
    expected = [
        enumerated(row[:length], labels) for row, length, labels in zip(logits, LENGTHS, LABELS, strict=True)
    ]
    assert ctc(logits).tolist() == pytest.approx(expected, rel=1e-12)


def test_cross_entropy_is_the_mean_over_own_tokens() -> None:
    logits = random_logits(3, 3, CLASSES)
    log_probs = logits.log_softmax(-1)
    picked = [[-log_probs[i, j, token] for j, token in enumerate(row)] for i, row in enumerate(LABELS)]
    expected = [float(sum(row)) / len(row) for row in picked]
    assert cross_entropy(logits).tolist() == pytest.approx(expected, rel=1e-12)
    total = cross_entropy_per_example(logits, padded(LABELS), reduction="sum")
    assert total.tolist() == pytest.approx([float(sum(row)) for row in picked], rel=1e-12)


@pytest.mark.parametrize(("loss", "steps"), LOSSES)
def test_a_loss_has_no_gradient_in_another_utterance(loss: Callable[[Tensor], Tensor], steps: int) -> None:
    logits = random_logits(3, steps, CLASSES).requires_grad_()
    losses = loss(logits)
    for index in range(3):
        (grad,) = torch.autograd.grad(losses[index], logits, retain_graph=True)
        reaches = grad.flatten(1).any(dim=1)
        assert reaches.tolist() == [other == index for other in range(3)]


@pytest.mark.parametrize(("loss", "steps"), LOSSES)
def test_gradients_agree_with_differences(loss: Callable[[Tensor], Tensor], steps: int) -> None:
    logits = random_logits(3, steps, CLASSES).requires_grad_()
    assert torch.autograd.gradcheck(loss, (logits,))


@pytest.mark.parametrize("poison", [1e30, float("inf"), float("nan")])
def test_ctc_reads_no_frame_beyond_its_length(poison: float) -> None:
    logits = random_logits(3, FRAMES + 2, CLASSES)
    beyond = torch.arange(FRAMES + 2) >= LENGTHS[:, None]
    expected = ctc(logits)
    assert torch.equal(ctc(logits.masked_fill(beyond[..., None], poison)), expected)


def test_ctc_has_no_gradient_beyond_its_length() -> None:
    logits = random_logits(3, FRAMES + 2, CLASSES).requires_grad_()
    (grad,) = torch.autograd.grad(ctc(logits).sum(), logits)
    reached = grad.any(dim=2)
    assert torch.equal(reached, torch.arange(FRAMES + 2) < LENGTHS[:, None])


def test_more_padding_of_the_labels_changes_nothing() -> None:
    logits, labels = random_logits(3, FRAMES, CLASSES), padded(LABELS)
    wider = torch.nn.functional.pad(labels, (0, 2), value=IGNORED)
    expected = ctc_loss_per_example(logits, LENGTHS, labels, BLANK)
    assert torch.equal(ctc_loss_per_example(logits, LENGTHS, wider, BLANK), expected)
    short = cross_entropy_per_example(logits[:, :3], labels)
    torch.testing.assert_close(cross_entropy_per_example(logits, wider), short, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("labels", "frames", "possible"),
    [
        ([1, 2, 3], 3, True),
        ([1, 2, 3], 2, False),
        ([1, 1], 2, False),
        ([1, 1], 3, True),
        ([2, 2, 2], 4, False),
        ([2, 2, 2], 5, True),
        ([1, 2, 1], 3, True),
    ],
)
def test_ctc_is_infinite_where_no_alignment_exists(labels: list[int], frames: int, possible: bool) -> None:
    logits = random_logits(1, FRAMES, CLASSES).requires_grad_()
    loss = ctc_loss_per_example(logits, torch.tensor([frames]), torch.tensor([labels]), BLANK)
    assert bool(loss.isfinite()) == possible
    assert not loss.isnan().any()
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert bool(grad.any()) == possible


def test_an_impossible_mate_changes_nobody_else() -> None:
    logits = random_logits(2, FRAMES, CLASSES).requires_grad_()
    labels = [torch.tensor([1, 1, 1, 1]), torch.tensor([1, 2])]
    frames = torch.tensor([FRAMES, FRAMES])
    losses = ctc_loss_per_example(logits, frames, padded(labels), BLANK)
    alone = ctc_loss_per_example(logits[1:], frames[1:], labels[1][None], BLANK)
    assert losses[0].isinf()
    assert losses[1] == alone[0]
    together, expected = (torch.autograd.grad(loss.sum(), logits)[0] for loss in (losses, alone))
    assert torch.equal(together[1], expected[1])


def test_no_tokens() -> None:
    """CTC: the likelihood of blanks alone; cross-entropy: 0, with no gradient."""
    logits, none = random_logits(1, FRAMES, CLASSES).requires_grad_(), torch.full((1, 2), IGNORED)
    blanks = -logits.log_softmax(-1)[0, :3, BLANK].sum()
    empty = ctc_loss_per_example(logits, torch.tensor([3]), none, BLANK)
    assert empty.item() == pytest.approx(blanks.item(), rel=1e-12)
    loss = cross_entropy_per_example(logits[:, :2], none)
    assert loss.tolist() == [0.0]
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert not grad.any()


def test_an_empty_batch() -> None:
    logits, labels = random_logits(0, FRAMES, CLASSES), torch.zeros(0, FRAMES, dtype=torch.int64)
    assert ctc_loss_per_example(logits, torch.zeros(0, dtype=torch.int64), labels, BLANK).shape == (0,)
    assert cross_entropy_per_example(logits, labels).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_logits_are_accumulated_in_float32(dtype: torch.dtype) -> None:
    logits = random_logits(3, FRAMES, CLASSES, dtype=dtype)
    labels = padded(LABELS)
    cut = logits[:, : labels.shape[1]]
    for loss, exact in (
        (ctc(logits), ctc(logits.double())),
        (cross_entropy(cut), cross_entropy(cut.double())),
    ):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)


def test_shapes_that_do_not_fit_are_refused() -> None:
    logits, labels = random_logits(3, FRAMES, CLASSES), padded(LABELS)
    with pytest.raises(ValueError, match=r"logits \(2, 5, 4\) and labels \(3, 3\)"):
        ctc_loss_per_example(logits[:2], LENGTHS, labels, BLANK)
    with pytest.raises(ValueError, match=r"input_lengths \(2,\): expected \[3\]"):
        ctc_loss_per_example(logits, LENGTHS[:2], labels, BLANK)
    with pytest.raises(ValueError, match=r"expected \[B, \*, V\] and \[B, \*\]"):
        cross_entropy_per_example(logits, labels)
    with pytest.raises(ValueError, match="reduction='none': expected mean or sum"):
        cross_entropy_per_example(logits[:, :3], labels, reduction="none")  # type: ignore[arg-type]


@pytest.mark.parametrize("blank", [-1, CLASSES])
def test_a_blank_that_is_no_class_is_refused(blank: int) -> None:
    with pytest.raises(ValueError, match=rf"blank={blank} with 4 classes"):
        ctc_loss_per_example(random_logits(3, FRAMES, CLASSES), LENGTHS, padded(LABELS), blank)


def test_labels_that_are_no_integers_are_refused() -> None:
    logits, labels = random_logits(3, FRAMES, CLASSES), padded(LABELS)
    with pytest.raises(TypeError, match=r"labels of torch\.float32: expected integers"):
        ctc_loss_per_example(logits, LENGTHS, labels.float(), BLANK)
    with pytest.raises(TypeError, match=r"input_lengths of torch\.float32"):
        ctc_loss_per_example(logits, LENGTHS.float(), labels, BLANK)
    with pytest.raises(TypeError, match=r"targets of torch\.bool"):
        cross_entropy_per_example(logits[:, :3], labels.bool())


NO_CLASS = [CLASSES, CLASSES + 1, 2**40, -1, -99, -101]
ROW = 1  # the example whose target is impossible


def check_that_a_row_adds_nothing(loss: Callable[[Tensor, list[int]], Tensor], logits: Tensor) -> None:
    """Its loss is marked, its gradient 0, and the others' losses and gradients have the bits they have without it."""
    others = [row for row in range(len(logits)) if row != ROW]
    logits.requires_grad_()
    losses, without = loss(logits, [*range(len(logits))]), loss(logits, others)
    assert losses[ROW] == math.inf
    assert torch.equal(losses[others], without)
    assert without.isfinite().all()
    (grad,), (expected,) = (torch.autograd.grad(part.sum(), logits) for part in (losses, without))
    assert torch.equal(grad[ROW], torch.zeros_like(grad[ROW]))
    assert torch.equal(grad[others], expected[others])
    assert grad[others].flatten(1).any(dim=1).all()


@pytest.mark.parametrize("poison", [None, math.nan, math.inf])
@pytest.mark.parametrize(
    ("labels", "length"),
    [
        *([[label], 4] for label in NO_CLASS),
        *([[2, label, 1], 5] for label in NO_CLASS),
        ([BLANK], 4),
        ([2, BLANK, 1], 5),
        ([IGNORED, 2, 1], 5),
        ([2, IGNORED, 1], 5),
        ([2, 1], FRAMES + 1),
        ([2, 1], 2**40),
        ([2, 1], -1),
        ([], -1),
        ([1, 1, 1], 4),
    ],
)
def test_an_impossible_ctc_target_adds_exactly_nothing(
    labels: list[int], length: int, poison: float | None
) -> None:
    logits = random_logits(3, FRAMES, CLASSES, dtype=torch.float32)
    if poison is not None:
        logits[ROW] = poison
    rows = padded([LABELS[0], torch.tensor(labels, dtype=torch.int64), LABELS[2]])
    lengths = torch.tensor([5, length, 4])
    check_that_a_row_adds_nothing(
        lambda logits, kept: ctc_loss_per_example(logits[kept], lengths[kept], rows[kept], BLANK), logits
    )


@pytest.mark.parametrize("poison", [None, math.nan, math.inf])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("label", NO_CLASS)
@pytest.mark.parametrize("steps", [1, 3])
def test_an_impossible_target_of_cross_entropy_adds_exactly_nothing(
    label: int, steps: int, reduction: Literal["mean", "sum"], poison: float | None
) -> None:
    logits, targets = random_logits(3, steps, CLASSES, dtype=torch.float32), padded(LABELS)[:, :steps].clone()
    if poison is not None:
        logits[ROW] = poison
    targets[ROW, steps - 1] = label
    if steps == 1:
        logits, targets = logits[:, 0], targets[:, 0]
    check_that_a_row_adds_nothing(
        lambda logits, kept: cross_entropy_per_example(logits[kept], targets[kept], reduction=reduction),
        logits.detach(),
    )


def test_small_integer_types_wrap_around_nowhere() -> None:
    """In uint8 −100 reads as 156, in int8 a number of 300 classes or frames as 44."""
    logits, labels = random_logits(3, FRAMES, CLASSES), padded(LABELS)
    narrow = ctc_loss_per_example(logits, LENGTHS.to(torch.int32), labels.to(torch.int8), BLANK)
    assert torch.equal(narrow, ctc(logits))
    wide = random_logits(2, 300, 300)
    labels, lengths = torch.tensor([[156, 100], [100, 200]]), torch.tensor([100, 101])
    for kind in (torch.uint8, torch.int8):
        rows = (labels if kind == torch.uint8 else labels // 2).to(kind)
        expected = ctc_loss_per_example(wide, lengths, rows.long(), BLANK)
        assert expected.isfinite().all()
        assert torch.equal(ctc_loss_per_example(wide, lengths.to(kind), rows, BLANK), expected)
        assert torch.equal(
            cross_entropy_per_example(wide[:, :2], rows), cross_entropy_per_example(wide[:, :2], rows.long())
        )
    impossible = ctc_loss_per_example(wide, lengths.to(torch.int8), torch.tensor([[300], [-1]]), BLANK)
    assert impossible.tolist() == [math.inf, math.inf]


def test_the_whole_batch_may_be_impossible() -> None:
    logits = random_logits(2, FRAMES, CLASSES).requires_grad_()
    labels, lengths = torch.tensor([[CLASSES], [-1]]), torch.tensor([FRAMES, FRAMES])
    for losses in (
        ctc_loss_per_example(logits, lengths, labels, BLANK),
        cross_entropy_per_example(logits[:, :1], labels),
    ):
        assert losses.tolist() == [math.inf, math.inf]
        assert not torch.autograd.grad(losses.sum(), logits)[0].any()


def test_examples_without_frames() -> None:
    """All recordings of a batch may be empty: no labels are certain, any others impossible."""
    logits = random_logits(3, 0, CLASSES).requires_grad_()
    labels = torch.tensor([[1], [IGNORED], [IGNORED]])
    losses = ctc_loss_per_example(logits, torch.tensor([0, 0, 1]), labels, BLANK)
    assert losses.tolist() == [math.inf, 0.0, math.inf]
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    assert grad.shape == logits.shape
    empty = random_logits(3, 0, CLASSES).requires_grad_()
    assert cross_entropy_per_example(empty, torch.zeros(3, 0, dtype=torch.long)).tolist() == [0.0] * 3


@pytest.mark.parametrize("shape", [(2, 0), (2, 3, 0)])
def test_logits_without_classes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"classes last, at least one"):
        cross_entropy_per_example(torch.zeros(shape), torch.zeros(shape[:-1], dtype=torch.long))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"logits": [[0.0]]}, "logits: got list"),
        (
            {"logits": torch.zeros(3, FRAMES, CLASSES, dtype=torch.long)},
            r"logits: got a tensor of torch\.int64",
        ),
        ({"input_lengths": [5, 3, 4]}, r"input_lengths: got list.*torch\.tensor\(input_lengths\)"),
        ({"labels": [[1], [2], [3]]}, "labels: got list"),
        ({"blank": 0.5}, "blank=0.5: expected an int"),
        ({"blank": True}, "blank=True: expected an int"),
    ],
)
def test_arguments_of_another_type_are_named(change: dict[str, object], named: str) -> None:
    given = {
        "logits": random_logits(3, FRAMES, CLASSES),
        "input_lengths": LENGTHS,
        "labels": padded(LABELS),
        "blank": BLANK,
    }
    with pytest.raises(TypeError, match=named):
        ctc_loss_per_example(**{**given, **change})  # type: ignore[arg-type]
    if change.keys() & {"logits", "labels"}:
        other = {"logits": random_logits(3, 3, CLASSES), "labels": padded(LABELS), **change}
        with pytest.raises(TypeError, match=named.replace("labels", "targets")):
            cross_entropy_per_example(other["logits"], other["labels"])  # type: ignore[arg-type]


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_smoothed_cross_entropy_is_the_mixture_with_all_classes(smoothing: float) -> None:
    logits = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 1, 2, IGNORED], [4, IGNORED, IGNORED, IGNORED], [7, 0, 0, 0]])
    losses = cross_entropy_per_example(logits, targets, label_smoothing=smoothing)
    logs = logits.log_softmax(-1)
    nll = -logs.gather(-1, targets.clamp(0, 4)[..., None])[..., 0]
    each = (1 - smoothing) * nll - smoothing * logs.mean(-1)
    torch.testing.assert_close(losses[:2], torch.stack([each[0, :3].mean(), each[1, 0]]))
    assert losses[2] == torch.inf  # 7 is no class


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, float("nan")])
def test_smoothing_out_of_range_is_refused(smoothing: float) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing=.*expected 0 ≤ label_smoothing ≤ 1"):
        cross_entropy_per_example(torch.zeros(1, 2), torch.zeros(1).long(), label_smoothing=smoothing)
