from __future__ import annotations

import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers

from asr_finetune.config.schema import ConfigError, ModelConfig
from asr_finetune.models import checkpoint
from asr_finetune.models.loading import WhisperRecognizer, load_recognizer, tiny_parakeet
from tests.asr_finetune import small_models
from tests.asr_finetune.small_models import recording

UNEQUAL = [name for name in small_models.FAMILIES if name not in small_models.EQUAL_LENGTHS_ONLY]
CTC = [name for name in small_models.FAMILIES if name != "whisper"]
RATE = small_models.RATE


@pytest.mark.thinned(4)
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


@pytest.mark.thinned(4)
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


@pytest.mark.thinned(4)
@pytest.mark.parametrize("family", CTC)
def test_a_new_head_on_the_checkpoints_own_vocabulary(
    folders: dict[str, Path], family: str, tmp_path: Path
) -> None:
    """Characters leave no CTC alignment where a frame is 80 ms, Parakeet's; its own tokens are longer."""
    old = small_models.load(folders[family])
    new, again = (small_models.load(folders[family], new_head=True, vocabulary="own") for _ in range(2))
    assert new.new_head
    head = ("lm_head", "ctc_head")
    for name, value in new.base.state_dict().items():
        assert torch.equal(value, again.base.state_dict()[name]), "the new layer's start is not public"
        assert torch.equal(value, old.base.state_dict()[name]) != name.startswith(head)
    assert torch.equal(new.encode_text("low high"), old.encode_text("low high"))
    new.save(tmp_path)
    batch, _ = small_models.batch_and_singles(new)
    loaded = small_models.load(tmp_path)
    assert torch.equal(small_models.logits(loaded, batch), small_models.logits(new, batch))


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("parakeet", {"vocabulary": "own"}, "new_head true and vocabulary characters .or own"),
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


def test_a_hub_that_is_away_is_one_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clients would wait between repetitions, of every file."""

    def waits(seconds: float) -> None:
        raise AssertionError(f"waited {seconds} s to ask again")

    monkeypatch.setattr(time, "sleep", waits)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    away = r"there is no such folder, the hub .http://127\.0\.0\.1:9. cannot be reached.*Give .--model, .*a folder"
    with pytest.raises(ConfigError, match=away):
        small_models.load(Path("nobody/no-such-model"))


def test_a_hub_that_is_not_wanted_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"there is no such folder, the hub .* cannot be reached"):
        small_models.load(Path("nobody/no-such-model"))


@pytest.mark.parametrize(
    ("answer", "asked"),
    [(None, {}), (huggingface_hub.errors.HTTPError("away"), {"local_files_only": True})],
    ids=["there", "away"],
)
def test_the_hub_is_read_where_it_answers(
    monkeypatch: pytest.MonkeyPatch, answer: Exception | None, asked: dict[str, Any]
) -> None:
    """And its earlier downloads where it does not."""
    seen: list[dict[str, Any]] = []

    def metadata(url: str) -> None:
        assert url.endswith("/somebody/model/resolve/v1/config.json")
        if answer is not None:
            raise answer

    class Reader:
        @staticmethod
        def from_pretrained(name: str, **options: Any) -> str:
            seen.append(options)
            return name

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    checkpoint.cached_hub_answers.cache_clear()
    config = ModelConfig("somebody/model", revision="v1")
    assert checkpoint.read(Reader, config) == "somebody/model"
    assert seen == [{"revision": "v1", **asked}]


def test_a_model_that_the_hub_does_not_have_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has answered, so transformers asks it in its own way."""

    class Reader:
        @staticmethod
        def from_pretrained(name: str, revision: str | None) -> str:
            raise OSError("401 Client Error")

    def refused(url: str) -> None:
        response: Any = SimpleNamespace(headers={}, request=None)
        raise huggingface_hub.errors.HfHubHTTPError("401", response=response)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refused)
    checkpoint.cached_hub_answers.cache_clear()
    with pytest.raises(ConfigError, match=r"no such folder, and the hub does not give it.*says: 401 Client"):
        checkpoint.read(Reader, ModelConfig("nobody/no-such-model"))


def test_a_library_that_a_checkpoint_needs_is_named(tmp_path: Path) -> None:
    class Reader:
        @staticmethod
        def from_pretrained(name: str, revision: str | None) -> str:
            raise ImportError(
                "\nSpeech2TextTokenizer requires the SentencePiece library but it was not found"
            )

    with pytest.raises(ConfigError, match=r"says: Speech2TextTokenizer requires the SentencePiece library"):
        checkpoint.read(Reader, ModelConfig(str(tmp_path)))


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
    with pytest.raises(
        ConfigError,
        match=r"is a bert model: .* as no speech recogniser.*Supported are ctc: .*parakeet_ctc.*whisper",
    ):
        small_models.load(tmp_path)


@pytest.mark.thinned(3)
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


@pytest.mark.parametrize(
    ("vocabulary", "options", "message"),
    [
        ([], {}, "give the words"),
        (["a", "b", "b"], {}, r"'b' more than once"),
        (["a", "<pad>"], {"unit": "words"}, r"'<pad>' is reserved .*leave it out"),
        (
            ["a", "bc", "def", "g"],
            {"unit": "characters"},
            r"'bc' and 1 more of several letters.*unit='words'",
        ),
        (["a", "b c"], {}, r"'b c' with white space"),
        (["a", "b "], {"unit": "words"}, r"'b ' with white space"),
        (["a"], {"hidden": 10}, "not a multiple"),
    ],
)
def test_vocabularies_that_tiny_parakeet_refuses(
    vocabulary: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_parakeet(vocabulary, **options)


@pytest.mark.parametrize("device", ["foo", "cuda:9999", "meta", "cpu:x"])
def test_devices_that_there_are_not(folders: dict[str, Path], device: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.device='{device}'.*cpu"):
        load_recognizer(ModelConfig(str(folders["parakeet"]), device=device))


def test_no_bars_but_ours(
    folders: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    transformers.utils.logging.enable_progress_bar()
    small_models.load(folders["parakeet"]).save(tmp_path)
    transformers.utils.logging.enable_progress_bar()
    tiny_parakeet(["a"], hidden=16, layers=1, heads=2, channels=4, mels=16).save(tmp_path / "fresh")
    assert capfd.readouterr().err == ""
