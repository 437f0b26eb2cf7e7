"""An utterance's loss is transformers' own, and its impossible labels move nobody else's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from asr_finetune.ctc import CTCRecognizer, ctc_frames_needed
from asr_finetune.whisper import WhisperRecognizer
from dpkernels.losses import IGNORED, ctc_loss_per_example
from tests.asr import small_models


@pytest.mark.parametrize("labels", [[1], [2, 2], [2, 1, 2, 2, 3], []])
def test_frames_that_labels_need(labels: list[int]) -> None:
    """As many as the loss asks for before it is finite."""
    row = torch.tensor([labels], dtype=torch.int64)
    needed = ctc_frames_needed(row[0])
    for frames in range(8):
        loss = ctc_loss_per_example(torch.zeros(1, 8, 4), torch.tensor([frames]), row, 0)
        assert bool(loss.isfinite()) == (frames >= needed)


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
