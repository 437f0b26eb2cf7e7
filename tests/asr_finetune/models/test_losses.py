"""An utterance's loss is transformers' own, and its impossible labels move nobody else's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from asr_finetune.models.ctc import CTCRecognizer, ctc_frames_needed
from asr_finetune.models.recognizer import Recognizer
from asr_finetune.models.whisper import WhisperRecognizer
from dpkernels.losses import IGNORED, ctc_loss_per_example
from tests.asr_finetune import small_models


@pytest.mark.parametrize("labels", [[1], [2, 2], [2, 1, 2, 2, 3], []])
def test_frames_that_labels_need(labels: list[int]) -> None:
    """As many as the loss asks for before it is finite."""
    row = torch.tensor([labels], dtype=torch.int64)
    needed = ctc_frames_needed(row[0])
    for frames in range(8):
        loss = ctc_loss_per_example(torch.zeros(1, 8, 4), torch.tensor([frames]), row, 0)
        assert bool(loss.isfinite()) == (frames >= needed)


@pytest.mark.thinned(3)
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


def losses_and_gradients(
    recognizer: Recognizer, items: list[dict[str, Any]]
) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
    """An utterance's loss and its gradient of every parameter, in a batch from `collate`."""
    losses = recognizer.loss_per_example(recognizer.model, recognizer.collate(items))
    parameters = [p for p in recognizer.model.parameters() if p.requires_grad]
    gradients = [
        [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(
                parameters,
                torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True),
                strict=True,
            )
        ]
        for loss in losses
    ]
    return losses.detach(), gradients


def no_class(recognizer: Recognizer) -> list[torch.Tensor]:
    """Labels that the output layer or the decoder has no place for."""
    text = recognizer.encode_text(recognizer.target_prefix + "low")
    found = []
    for label in (recognizer.classes, recognizer.classes + 3, 2**40, -1, -101):
        found.append(text.clone())
        found[-1][0] = label
    if isinstance(recognizer, CTCRecognizer):
        return [*found, torch.full_like(text, recognizer.blank), text.repeat(40)]
    return [*found, text[:1].repeat(25)]  # one more than the decoder's positions


@pytest.mark.thinned(2)
@pytest.mark.parametrize("family", ["parakeet", "wav2vec2-bert", "wav2vec2", "whisper"])
def test_an_impossible_label_adds_nothing_and_moves_no_other_utterance(
    folders: dict[str, Path], family: str
) -> None:
    """Bit for bit: with torch's CTC alone such a label reads the next utterance's memory."""
    recognizer = small_models.load(folders[family])
    first, second, third = small_models.items(recognizer)
    items = [second, first, third]
    losses, gradients = losses_and_gradients(recognizer, items)
    for labels in no_class(recognizer):
        # as wide as the batch with it, where the decoder runs over the padding too
        width = len(labels) - max(len(item["labels"]) for item in items)
        expected, own = losses, gradients
        if width > 0 and family == "whisper":
            continue_with = [
                {**item, "labels": torch.nn.functional.pad(item["labels"], (0, width), value=IGNORED)}
                for item in items
            ]
            expected, own = losses_and_gradients(recognizer, continue_with)
        found, moved = losses_and_gradients(recognizer, [second, {**first, "labels": labels}, third])
        assert found[1] == float("inf")
        assert not any(part.any() for part in moved[1])
        for row in (0, 2):
            assert found[row] == expected[row]
            assert all(torch.equal(*pair) for pair in zip(moved[row], own[row], strict=True))
            assert any(part.any() for part in moved[row])


def test_an_impossible_text_is_the_least_likely(folders: dict[str, Path]) -> None:
    """Restricted decoding among texts of which one has a blank in it, or does not fit the decoder."""
    for family, impossible in (("parakeet", "low <pad>"), ("whisper", "low " * 20)):
        recognizer = small_models.load(folders[family])
        batch = recognizer.collate(small_models.items(recognizer))
        texts = [impossible, "low", "high"]
        assert torch.isneginf(recognizer._scores(batch, texts)[:, 0]).all()
        assert recognizer.transcribe(batch, texts) == recognizer.transcribe(batch, texts[1:])
