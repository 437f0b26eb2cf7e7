from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from asr_finetune.config import ConfigError
from asr_finetune.data import Utterance
from asr_finetune.models import CTCRecognizer, Recognizer, WhisperRecognizer, tiny_parakeet
from tests.asr import small_models, tones

UNEQUAL = [name for name in small_models.FAMILIES if name not in small_models.EQUAL_LENGTHS_ONLY]
CTC = [name for name in small_models.FAMILIES if name != "whisper"]
RATE = small_models.RATE


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    root = tmp_path_factory.mktemp("models")
    with tones.one_thread():
        for name, write in small_models.FAMILIES.items():
            write(root / name)
        small_models.whisper(root / "multilingual", multilingual=True)
        yield {name: root / name for name in (*small_models.FAMILIES, "multilingual")}


def recording(samples: int, text: str = "low") -> Utterance:
    return Utterance("u", None, np.zeros(samples, np.float32), RATE, text, None, samples / RATE)


def gradient(recognizer: Recognizer, loss: Tensor) -> Tensor:
    """d loss / d everything trainable, as one vector."""
    parameters = [p for p in recognizer.model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(
        loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return torch.cat([grad.flatten() for grad in grads])


def relative_difference(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", small_models.FAMILIES)
def test_an_utterance_is_independent_of_batch_mates_and_padding(
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


@pytest.mark.parametrize("family", UNEQUAL)
def test_transcripts_are_independent_of_batch_mates(folders: dict[str, Path], family: str) -> None:
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
        float(recognizer.loss_per_example(recognizer.model, batch)[0])
        * (batch["labels"].shape[1] if recognizer.kind == "seq2seq" else 1)
        for batch in scored
    ]
    best = texts[int(np.argmin(losses))]
    assert (
        recognizer.transcribe(scored[0], texts) == recognizer.transcribe(scored[0], [*texts[::-1]]) == [best]
    )


@pytest.mark.parametrize("family", small_models.EQUAL_LENGTHS_ONLY)
def test_unequal_lengths_are_refused_with_the_mend(folders: dict[str, Path], family: str) -> None:
    recognizer = small_models.load(folders[family])
    items = small_models.items(recognizer)
    with pytest.raises(ValueError, match=r"6400 to 9600.*train\.physical_batch_size=1.*Wav2Vec2-BERT"):
        recognizer.collate(items[:2])
    assert len(recognizer.transcribe(recognizer.collate([items[0], items[0]]))) == 2


@pytest.mark.parametrize("family", small_models.FAMILIES)
def test_an_unusable_utterance_has_loss_and_gradient_zero(folders: dict[str, Path], family: str) -> None:
    recognizer = small_models.load(folders[family])
    empty = recognizer.empty_item()
    mates = [] if recognizer.equal_lengths_only else [small_models.items(recognizer)[0]]
    batch = recognizer.collate([{**empty, "index": 0}, *mates])
    loss = recognizer.loss_per_example(recognizer.model, batch)[0]
    assert float(loss.detach()) == 0
    assert not gradient(recognizer, loss).any()
    assert recognizer.transcribe(batch)[0] == recognizer.transcribe(batch, ["low"])[0] == ""


@pytest.mark.parametrize("family", small_models.FAMILIES)
def test_save_and_load_back(folders: dict[str, Path], family: str, tmp_path: Path) -> None:
    recognizer = small_models.load(folders[family])
    small_models.randomised(recognizer.model)
    batch, _ = small_models.batch_and_singles(recognizer)
    recognizer.target_prefix = recognizer.target_prefix + "low "
    recognizer.save(tmp_path)
    again = small_models.load(tmp_path)
    expected = small_models.logits(recognizer, batch)
    assert torch.equal(small_models.logits(again, batch), expected)
    assert again.target_prefix == recognizer.target_prefix
    for item, other in zip(small_models.items(recognizer), small_models.items(again), strict=True):
        assert all(np.array_equal(value, other[key]) for key, value in item.items())
    plain = type(recognizer.base).from_pretrained(tmp_path)
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in again.base.state_dict().items())


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


@pytest.mark.parametrize("family", CTC)
def test_a_new_head_is_for_public_characters(folders: dict[str, Path], family: str, tmp_path: Path) -> None:
    old = small_models.load(folders[family])
    recognizer = small_models.load(folders[family], new_head=True, vocabulary="characters")
    again = small_models.load(folders[family], new_head=True, vocabulary="characters")
    assert recognizer.new_head
    labels = recognizer.encode_text("it's 5")
    assert recognizer.tokenizer.decode(labels.tolist(), group_tokens=False) == "it's 5"
    kept = [name for name in old.base.state_dict() if not name.startswith(("lm_head", "ctc_head"))]
    for name, value in recognizer.base.state_dict().items():
        assert torch.equal(value, again.base.state_dict()[name]), "the new layer's start is not public"
        assert name not in kept or torch.equal(value, old.base.state_dict()[name])
    item = {**recognizer.encode_audio(small_models.waves()[2]), "labels": labels}
    batch = recognizer.collate([item])
    assert recognizer.loss_per_example(recognizer.model, batch).isfinite().all()
    recognizer.save(tmp_path)
    loaded = small_models.load(tmp_path)
    assert torch.equal(small_models.logits(loaded, batch), small_models.logits(recognizer, batch))
    assert torch.equal(loaded.encode_text("it's 5"), labels)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("parakeet", {"new_head": True}, "new_head true and vocabulary characters"),
        ("parakeet", {"vocabulary": "characters"}, "new_head true and vocabulary characters"),
        ("parakeet", {"vocabulary": "words"}, "tiny_parakeet"),
        ("parakeet", {"window_seconds": 1.0}, r"model\.window_seconds=1 is for Whisper"),
        ("whisper", {"new_head": True, "vocabulary": "characters"}, "are for CTC models"),
        ("whisper", {"window_seconds": 1.5}, r"model\.window_seconds=1\.5.*at most 1 s"),
    ],
)
def test_options_that_do_not_fit_are_named(
    folders: dict[str, Path], family: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        small_models.load(folders[family], **options)


def test_a_model_that_the_hub_does_not_give_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConfigError, match="no such folder, and the hub does not know it or cannot be reached"
    ):
        small_models.load(Path("nobody/no-such-model"))


@pytest.mark.parametrize(
    ("files", "content"),
    [
        (("config.json",), None),
        (("config.json",), b"{"),
        (("config.json",), b"{}"),
        (("config.json",), b'{"model_type": "of-tomorrow"}'),
        (("model.safetensors",), None),
        (("model.safetensors",), b"cut off"),
        (("processor_config.json",), None),
        (("tokenizer.json", "vocab.json"), None),
    ],
)
@pytest.mark.parametrize("family", ["parakeet", "wav2vec2", "whisper"])
def test_a_damaged_checkpoint_is_named(
    folders: dict[str, Path], tmp_path: Path, family: str, files: tuple[str, ...], content: bytes | None
) -> None:
    damaged = shutil.copytree(folders[family], tmp_path / "damaged")
    for path in (damaged / file for file in files):
        if content is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"model\.name=.*damaged.*(no usable checkpoint|tokenizer does not)"
    ):
        small_models.load(damaged)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"is a bert model; supported: whisper, parakeet_ctc"):
        small_models.load(tmp_path)


@pytest.mark.parametrize("family", UNEQUAL)
def test_half_precision_weights(folders: dict[str, Path], family: str) -> None:
    recognizer = small_models.load(folders[family], dtype="bfloat16")
    batch, _ = small_models.batch_and_singles(recognizer)
    losses = recognizer.loss_per_example(recognizer.model, batch)
    assert losses.dtype == torch.float32
    full = small_models.load(folders[family])
    # bfloat16 has 8 bits: a relative step of 2⁻⁸, which a few layers in a row make a few per cent.
    torch.testing.assert_close(losses, full.loss_per_example(full.model, batch), rtol=0.1, atol=0.1)


def test_a_trimmed_whisper_is_whisper_with_a_shorter_window(folders: dict[str, Path], tmp_path: Path) -> None:
    recognizer = small_models.load(folders["whisper"], window_seconds=0.41)
    assert isinstance(recognizer, WhisperRecognizer)
    assert recognizer.window_seconds == pytest.approx(0.42)  # rounded up to positions of 20 ms
    item = recognizer.encode_audio(small_models.waves((6000,))[0])
    assert item["input_features"].shape == (42, 8)
    problem = recognizer.audio_problem(recording(6800))
    assert problem is not None
    assert "raise model.window_seconds" in problem
    with pytest.raises(ValueError, match="longer than the encoder's window"):
        recognizer.encode_audio(np.zeros(6800, np.float32))
    batch = recognizer.collate([{**item, "labels": recognizer.encode_text(" low")}])
    recognizer.save(tmp_path)
    again = small_models.load(tmp_path)
    assert isinstance(again, WhisperRecognizer)
    assert again.window_seconds == recognizer.window_seconds
    assert torch.equal(small_models.logits(again, batch), small_models.logits(recognizer, batch))
    whole = small_models.load(folders["whisper"]).base.model.encoder.embed_positions.weight
    assert torch.equal(again.base.model.encoder.embed_positions.weight, whole[:21])


def test_whisper_is_prompted_as_transformers_prompts_it(folders: dict[str, Path]) -> None:
    english, many = (small_models.load(folders[name]) for name in ("whisper", "multilingual"))
    assert isinstance(english, WhisperRecognizer)
    assert isinstance(many, WhisperRecognizer)
    prompts = [many.tokenizer.convert_ids_to_tokens(model.prompt) for model in (english, many)]
    start, plain = "<|startoftranscript|>", "<|notimestamps|>"
    assert prompts == [[start, plain], [start, "<|en|>", "<|transcribe|>", plain]]
    with pytest.raises(ValueError, match="language='fr'"):
        WhisperRecognizer(many.base, many.processor, name="many", language="fr")


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


@pytest.mark.parametrize(
    ("vocabulary", "options", "message"),
    [
        ([], {}, "give the words"),
        (["a", "a"], {}, "repeated"),
        (["<pad>"], {"unit": "words"}, "reserved"),
        (["ab"], {"unit": "characters"}, "single letters"),
        (["a b"], {}, "no white space"),
        (["a"], {"hidden": 10}, "not a multiple"),
    ],
)
def test_vocabularies_that_tiny_parakeet_refuses(
    vocabulary: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_parakeet(vocabulary, **options)


def test_an_empty_batch_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="no items"):
        small_models.load(folders["parakeet"]).collate([])
