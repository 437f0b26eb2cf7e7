from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from asr_finetune.models.loading import CTCRecognizer, Recognizer, WhisperRecognizer
from tests.asr_finetune import small_models
from tests.asr_finetune.small_models import recording

UNEQUAL = [name for name in small_models.FAMILIES if name not in small_models.EQUAL_LENGTHS_ONLY]
CTC = [name for name in small_models.FAMILIES if name != "whisper"]
RATE = small_models.RATE


def gradient(recognizer: Recognizer, loss: Tensor) -> Tensor:
    """d loss / d everything trainable, as one vector."""
    parameters = [p for p in recognizer.model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(
        loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return torch.cat([grad.flatten() for grad in grads])


def relative_difference(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


@pytest.mark.thinned(3)
@pytest.mark.parametrize("family", small_models.FAMILIES)
def test_an_utterance_is_independent_of_the_rest_of_the_batch_and_padding(
    folders: dict[str, Path], family: str
) -> None:
    recognizer = small_models.load(folders[family])
    recognizer.model.double()
    batch, singles = small_models.batch_and_singles(recognizer)
    losses = recognizer.loss_per_example(recognizer.model, batch)
    for index, single in enumerate(singles):
        (alone,) = recognizer.loss_per_example(recognizer.model, single)
        assert alone > 0.1
        assert losses[index].item() == pytest.approx(alone.item(), rel=1e-9)
        expected = gradient(recognizer, alone)
        assert relative_difference(gradient(recognizer, losses[index]), expected) < 1e-8


@pytest.mark.thinned(3)
@pytest.mark.parametrize("family", UNEQUAL)
def test_transcripts_are_independent_of_the_rest_of_the_batch(folders: dict[str, Path], family: str) -> None:
    recognizer = small_models.load(folders[family])
    batch, singles = small_models.batch_and_singles(recognizer)
    together = recognizer.transcribe(batch)
    assert together == [recognizer.transcribe(single)[0] for single in singles]
    chosen = recognizer.transcribe(batch, ["low", "high"])
    assert chosen == [recognizer.transcribe(single, ["low", "high"])[0] for single in singles]
    assert set(chosen) <= {"low", "high"}
    with pytest.raises(ValueError, match="restrict_to=\\[\\]"):
        recognizer.transcribe(batch, [])


@pytest.mark.parametrize("family", UNEQUAL)
def test_restricted_decoding_picks_the_likeliest_text(folders: dict[str, Path], family: str) -> None:
    recognizer = small_models.load(folders[family])
    item = small_models.items(recognizer)[2]
    texts = ["low", "high", "low high"]
    prefix = recognizer.target_prefix
    scored = [
        recognizer.collate([{**item, "labels": recognizer.encode_text(prefix + text)}]) for text in texts
    ]
    losses = [
        # Whisper's loss is a mean over tokens; its score a sum.
        recognizer.loss_per_example(recognizer.model, batch).item()
        * (batch["labels"].shape[1] if recognizer.kind == "seq2seq" else 1)
        for batch in scored
    ]
    best = texts[int(np.argmin(losses))]
    for order in (texts, texts[::-1]):
        assert recognizer.transcribe(scored[0], order) == [best]


@pytest.mark.parametrize("family", small_models.EQUAL_LENGTHS_ONLY)
def test_unequal_lengths_are_refused_with_the_mend(folders: dict[str, Path], family: str) -> None:
    recognizer = small_models.load(folders[family])
    items = small_models.items(recognizer)
    with pytest.raises(ValueError, match=r"6400 to 9600.*train\.physical_batch_size=1.*Wav2Vec2-BERT"):
        recognizer.collate(items[:2])
    assert len(recognizer.transcribe(recognizer.collate([items[0], items[0]]))) == 2


@pytest.mark.thinned(3)
@pytest.mark.parametrize("family", small_models.FAMILIES)
def test_an_unusable_utterance_has_loss_and_gradient_zero(folders: dict[str, Path], family: str) -> None:
    recognizer = small_models.load(folders[family])
    empty = recognizer.empty_item()
    others = [] if recognizer.equal_lengths_only else [small_models.items(recognizer)[0]]
    batch = recognizer.collate([{**empty, "index": 0}, *others])
    loss = recognizer.loss_per_example(recognizer.model, batch)[0]
    assert float(loss.detach()) == 0
    assert not gradient(recognizer, loss).any()
    assert recognizer.transcribe(batch)[0] == recognizer.transcribe(batch, ["low"])[0] == ""


@pytest.mark.thinned(4)
@pytest.mark.parametrize("family", CTC)
def test_lengths_are_the_frames_of_the_output(folders: dict[str, Path], family: str) -> None:
    """For any length that is no problem the features exist, and `length` counts the logits' frames."""
    recognizer = small_models.load(folders[family])
    assert isinstance(recognizer, CTCRecognizer)
    usable = 0
    for samples in (*range(1, 1400, 39), *range(1400, 1801, 80), 1999, 2000, 2079, 2080, 15999, 16000, 16001):
        wave = small_models.waves((samples,))[0]
        if recognizer.audio_problem(recording(samples)) is not None:
            continue
        usable += 1
        batch = recognizer.collate([recognizer.encode_audio(wave)])
        logits, frames = recognizer.logits(recognizer.model, batch)
        assert logits.shape[1] == int(frames[0]) == recognizer.length(recording(samples))
        assert logits.isfinite().all()
    assert usable > 10
    too_short = recognizer.audio_problem(recording(100))
    assert too_short is not None
    assert "too short" in too_short


@pytest.mark.thinned(3)
@pytest.mark.parametrize("family", CTC)
def test_what_the_vocabulary_or_the_length_forbids_is_named(folders: dict[str, Path], family: str) -> None:
    recognizer = small_models.load(folders[family])
    assert recognizer.text_problem(recording(RATE, "low high")) is None
    unknown = recognizer.text_problem(recording(RATE, "low WARP high"))
    assert unknown is not None
    assert "'WARP'" in unknown
    assert "data.text_case" in unknown
    long = recognizer.text_problem(recording(RATE, " ".join(["low"] * 60)))
    assert long is not None
    assert "no CTC alignment" in long


@pytest.mark.thinned(4)
@pytest.mark.parametrize("family", CTC)
def test_where_no_problem_is_seen_the_loss_is_finite(folders: dict[str, Path], family: str) -> None:
    """The longest transcript that passes has an alignment, the next has none."""
    recognizer = small_models.load(folders[family])
    samples = 8000
    item = recognizer.encode_audio(small_models.waves((samples,))[0])
    passed = []
    for count in range(1, 40):
        text = " ".join(["low"] * count)
        problem = recognizer.text_problem(recording(samples, text))
        batch = recognizer.collate([{**item, "labels": recognizer.encode_text(text)}])
        (loss,) = recognizer.loss_per_example(recognizer.model, batch)
        assert bool(loss.isfinite()) == (problem is None)
        passed.append(problem is None)
    assert set(passed) == {True, False}


def test_double_letters_survive_greedy_decoding(folders: dict[str, Path]) -> None:
    recognizer = small_models.load(folders["wav2vec2-bert"])
    assert isinstance(recognizer, CTCRecognizer)
    path = [8, 8, 0, 8, 9, 4, 4, 10]  # l l blank l o | | w
    logits = nn.functional.one_hot(torch.tensor([path]), len(small_models.LETTERS)).float()
    recognizer.logits = lambda model, batch: (logits, torch.tensor([len(path)]))  # type: ignore[method-assign]
    assert recognizer.transcribe({}) == ["llo w"]
    recognizer.logits = lambda model, batch: (logits, torch.tensor([5]))  # type: ignore[method-assign]
    assert recognizer.transcribe({}) == ["llo"]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("family", small_models.FAMILIES)
def test_shared_randomness_is_off(folders: dict[str, Path], family: str, tmp_path: Path) -> None:
    """In training mode too, two forwards agree: no LayerDrop, no masks of the model's own."""
    recognizer = small_models.load(folders[family])
    recognizer.model.train()
    for module in recognizer.model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    batch, _ = small_models.batch_and_singles(recognizer)
    first, second = (recognizer.loss_per_example(recognizer.model, batch) for _ in range(2))
    assert torch.equal(first, second)
    for name, parameter in recognizer.model.named_parameters():
        if name.endswith("masked_spec_embed"):
            assert not parameter.requires_grad


def test_whisper_is_prompted_as_transformers_prompts_it(folders: dict[str, Path]) -> None:
    english, many = (small_models.load(folders[name]) for name in ("whisper", "multilingual"))
    assert isinstance(english, WhisperRecognizer)
    assert isinstance(many, WhisperRecognizer)
    prompts = [many.tokenizer.convert_ids_to_tokens(model.prompt) for model in (english, many)]
    start, plain = "<|startoftranscript|>", "<|notimestamps|>"
    assert prompts == [[start, plain], [start, "<|en|>", "<|transcribe|>", plain]]


def test_whisper_transcripts_that_do_not_fit_the_decoder(folders: dict[str, Path]) -> None:
    recognizer = small_models.load(folders["whisper"])
    fits, too_long = recording(RATE, "low" * 7), recording(RATE, "low" * 8)  # with a space and the end
    assert recognizer.text_problem(fits) is None
    problem = recognizer.text_problem(too_long)
    assert problem is not None
    assert "the decoder takes 23 at most" in problem
    labels = recognizer.encode_text(recognizer.target_prefix + fits.text)
    batch = recognizer.collate([{**recognizer.encode_audio(small_models.waves()[0]), "labels": labels}])
    assert recognizer.loss_per_example(recognizer.model, batch).isfinite().all()


def test_an_empty_batch_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="no items"):
        small_models.load(folders["parakeet"]).collate([])
