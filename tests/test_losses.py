from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from asr_finetune.ctc import CTCRecognizer
from asr_finetune.losses import (
    IGNORED,
    ctc_frames_needed,
    ctc_loss_per_example,
    seq2seq_loss_per_example,
    sequence_log_likelihood,
)
from asr_finetune.recognizer import pad_rows
from asr_finetune.whisper import WhisperRecognizer
from tests.asr import small_models

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


def ctc(logits: Tensor) -> Tensor:
    return ctc_loss_per_example(logits, LENGTHS, pad_rows(LABELS, IGNORED), BLANK)


def seq2seq(logits: Tensor) -> Tensor:
    return seq2seq_loss_per_example(logits, pad_rows(LABELS, IGNORED))


LOSSES = [pytest.param(ctc, FRAMES, id="ctc"), pytest.param(seq2seq, 3, id="seq2seq")]


def test_ctc_is_the_sum_over_all_alignments() -> None:
    logits = random_logits(3, FRAMES, CLASSES)
    expected = [
        enumerated(row[:length], labels) for row, length, labels in zip(logits, LENGTHS, LABELS, strict=True)
    ]
    assert ctc(logits).tolist() == pytest.approx(expected, rel=1e-12)


def test_seq2seq_is_the_mean_over_own_tokens() -> None:
    logits = random_logits(3, 3, CLASSES)
    log_probs = logits.log_softmax(-1)
    picked = [[-log_probs[i, j, token] for j, token in enumerate(row)] for i, row in enumerate(LABELS)]
    expected = [float(sum(row)) / len(row) for row in picked]
    assert seq2seq(logits).tolist() == pytest.approx(expected, rel=1e-12)
    total, count = sequence_log_likelihood(logits, pad_rows(LABELS, IGNORED))
    assert count.tolist() == [3, 1, 2]
    assert total.tolist() == pytest.approx([-float(sum(row)) for row in picked], rel=1e-12)


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
    logits, labels = random_logits(3, FRAMES, CLASSES), pad_rows(LABELS, IGNORED)
    wider = torch.nn.functional.pad(labels, (0, 2), value=IGNORED)
    expected = ctc_loss_per_example(logits, LENGTHS, labels, BLANK)
    assert torch.equal(ctc_loss_per_example(logits, LENGTHS, wider, BLANK), expected)
    short = seq2seq_loss_per_example(logits[:, :3], labels)
    torch.testing.assert_close(seq2seq_loss_per_example(logits, wider), short, rtol=1e-12, atol=0)


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
    row = torch.tensor([labels])
    loss = ctc_loss_per_example(random_logits(1, FRAMES, CLASSES), torch.tensor([frames]), row, BLANK)
    assert bool(loss.isfinite()) == possible == (ctc_frames_needed(row[0]) <= frames)
    assert not loss.isnan().any()


def test_an_impossible_mate_changes_nobody_else() -> None:
    logits = random_logits(2, FRAMES, CLASSES).requires_grad_()
    labels = [torch.tensor([1, 1, 1, 1]), torch.tensor([1, 2])]
    frames = torch.tensor([FRAMES, FRAMES])
    losses = ctc_loss_per_example(logits, frames, pad_rows(labels, IGNORED), BLANK)
    alone = ctc_loss_per_example(logits[1:], frames[1:], labels[1][None], BLANK)
    assert losses[0].isinf()
    assert losses[1] == alone[0]
    together, expected = (torch.autograd.grad(loss.sum(), logits)[0] for loss in (losses, alone))
    assert torch.equal(together[1], expected[1])


def test_no_tokens() -> None:
    """CTC: the likelihood of blanks alone; seq2seq: 0, with no gradient."""
    logits, none = random_logits(1, FRAMES, CLASSES).requires_grad_(), torch.full((1, 2), IGNORED)
    blanks = -logits.log_softmax(-1)[0, :3, BLANK].sum()
    empty = ctc_loss_per_example(logits, torch.tensor([3]), none, BLANK)
    assert empty.item() == pytest.approx(blanks.item(), rel=1e-12)
    loss = seq2seq_loss_per_example(logits[:, :2], none)
    assert loss.tolist() == [0.0]
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert not grad.any()


def test_an_empty_batch() -> None:
    logits, labels = random_logits(0, FRAMES, CLASSES), torch.zeros(0, FRAMES, dtype=torch.int64)
    assert ctc_loss_per_example(logits, torch.zeros(0, dtype=torch.int64), labels, BLANK).shape == (0,)
    assert seq2seq_loss_per_example(logits, labels).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_logits_are_accumulated_in_float32(dtype: torch.dtype) -> None:
    logits = random_logits(3, FRAMES, CLASSES, dtype=dtype)
    labels = pad_rows(LABELS, IGNORED)
    cut = logits[:, : labels.shape[1]]
    for loss, exact in ((ctc(logits), ctc(logits.double())), (seq2seq(cut), seq2seq(cut.double()))):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)


def test_shapes_that_do_not_fit_are_refused() -> None:
    logits, labels = random_logits(3, FRAMES, CLASSES), pad_rows(LABELS, IGNORED)
    with pytest.raises(ValueError, match=r"logits \(2, 5, 4\) and labels \(3, 3\)"):
        ctc_loss_per_example(logits[:2], LENGTHS, labels, BLANK)
    with pytest.raises(ValueError, match="an input length of 5 with 4 frames"):
        ctc_loss_per_example(logits[:, :4], LENGTHS, labels, BLANK)
    with pytest.raises(ValueError, match=r"expected \[B, L, V\] and \[B, L\]"):
        seq2seq_loss_per_example(logits, labels)


@pytest.mark.parametrize("family", ["parakeet", "wav2vec2-bert", "wav2vec2", "wav2vec2-conformer"])
def test_one_utterance_has_transformers_own_ctc_loss(family: str, tmp_path: Path) -> None:
    small_models.FAMILIES[family](tmp_path)
    recognizer = small_models.load(tmp_path)
    assert isinstance(recognizer, CTCRecognizer)
    for item in small_models.items(recognizer, (16000, 19200, 24000)):
        batch = recognizer.collate([item])
        inputs: dict[str, Any] = {key: batch[key] for key in (recognizer.input_name, "attention_mask")}
        own = recognizer.base(**inputs, labels=batch["labels"]).loss
        # "mean" divides by the number of labels, and then by the batch of one.
        reduced = batch["labels"].shape[1] if recognizer.base.config.ctc_loss_reduction == "mean" else 1
        (loss,) = recognizer.loss_per_example(recognizer.model, batch)
        assert loss.item() == pytest.approx(own.item() * reduced, rel=1e-5)


@pytest.mark.parametrize("multilingual", [False, True])
def test_one_utterance_has_transformers_own_whisper_loss(multilingual: bool, tmp_path: Path) -> None:
    small_models.whisper(tmp_path, multilingual=multilingual)
    recognizer = small_models.load(tmp_path)
    assert isinstance(recognizer, WhisperRecognizer)
    for item in small_models.items(recognizer):
        batch = recognizer.collate([item])
        prompt = torch.tensor([recognizer.prompt[1:]])
        # transformers shifts the labels by itself and learns the prompt too, unless it is masked.
        labels = torch.cat([torch.full_like(prompt, IGNORED), batch["labels"]], dim=1)
        decoder = torch.cat([torch.tensor([recognizer.prompt]), batch["labels"][:, :-1]], dim=1)
        features = batch["input_features"].transpose(1, 2)
        own = recognizer.base(input_features=features, decoder_input_ids=decoder, labels=labels).loss
        (loss,) = recognizer.loss_per_example(recognizer.model, batch)
        assert loss.item() == pytest.approx(own.item(), rel=1e-5)
