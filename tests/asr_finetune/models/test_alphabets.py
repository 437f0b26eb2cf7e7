"""Transcripts beyond plain English: typographic apostrophes, and alphabets for a new CTC output layer."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from asr_finetune.cli import app
from asr_finetune.config.schema import ConfigError, MethodConfig, ModelConfig
from asr_finetune.models.alphabets import ALPHABETS, CHARACTERS, read_alphabet
from asr_finetune.models.loading import load_with_adapter, tiny_parakeet
from asr_finetune.models.methods import apply_method
from tests.asr_finetune import small_models
from tests.asr_finetune.recordings import utterance

NEW = {"new_head": True, "vocabulary": "characters"}


@pytest.fixture(scope="module")
def letters() -> Any:
    with_apostrophe = tiny_parakeet(CHARACTERS, hidden=16, layers=1, heads=2, channels=4, mels=16)
    return with_apostrophe


@pytest.mark.parametrize("apostrophe", ["\u2019", "\u02bc", "\uff07"])
def test_a_typographic_apostrophe_is_the_plain_one(letters: Any, apostrophe: str) -> None:
    text = f"it{apostrophe}s low"
    assert torch.equal(letters.encode_text(text), letters.encode_text("it's low"))
    assert letters.text_problem(utterance("a", text, seconds=2.0)) is None
    problem = letters.text_problem(utterance("a", f"it{apostrophe}s “low”", seconds=2.0))
    assert problem.startswith("not in the vocabulary: '“low”'")


def test_a_vocabulary_with_its_own_typographic_apostrophe_keeps_it() -> None:
    own = tiny_parakeet(["'", "\u2019", *"its", "|"], hidden=16, layers=1, heads=2, channels=4, mels=16)
    assert not torch.equal(own.encode_text("it\u2019s"), own.encode_text("it's"))
    words = tiny_parakeet(["it's", "low"], unit="words", hidden=16, layers=1, heads=2, channels=4, mels=16)
    assert words.tokenizer.unk_token_id not in words.encode_text("it\u2019s low")


def test_accents_are_composed() -> None:
    german = tiny_parakeet(read_alphabet("german"), hidden=16, layers=1, heads=2, channels=4, mels=16)
    text = "schöne grüße"
    assert torch.equal(german.encode_text(unicodedata.normalize("NFD", text)), german.encode_text(text))


@pytest.mark.parametrize("name", ALPHABETS)
def test_an_alphabet_has_each_letter_once_in_lower_case(name: str) -> None:
    letters = ALPHABETS[name]
    assert len(set(letters)) == len(letters)
    assert letters == letters.lower() == unicodedata.normalize("NFC", letters)
    assert all(len(char) == 1 and unicodedata.category(char) == "Ll" for char in letters)
    assert read_alphabet(name)[-12:] == [*"0123456789'", "|"]


def test_the_english_alphabet_is_the_one_without_a_name() -> None:
    assert read_alphabet(None) == read_alphabet("english") == CHARACTERS


def test_the_alphabet_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "letters.txt"
    path.write_bytes("\ufeffß a b\r\no\u0308 a |\n".encode())
    assert read_alphabet(str(path)) == ["ß", "a", "b", "ö", "|"]
    path.write_text(" \n")
    with pytest.raises(ConfigError, match="no character in this file"):
        read_alphabet(str(path))
    with pytest.raises(
        ConfigError, match=r"model\.alphabet='klingon': neither a file nor one of english, .*never one"
    ):
        read_alphabet("klingon")


@pytest.mark.thinned(3)
@pytest.mark.parametrize("family", ["parakeet", "wav2vec2", "wav2vec2-bert"])
def test_a_new_head_with_an_alphabet_is_saved_and_loads(
    folders: dict[str, Path], tmp_path: Path, family: str
) -> None:
    alphabet = tmp_path / "letters.txt"
    alphabet.write_text("zäyx")
    recognizer = small_models.load(folders[family], **NEW, alphabet=str(alphabet))
    assert recognizer.classes == len("zäyx|") + 2
    apply_method(recognizer, MethodConfig(kind="lora", rank=2))
    recognizer.save(tmp_path / "adapter")
    alphabet.unlink()
    loaded = load_with_adapter(ModelConfig(str(folders[family]), device="cpu"), tmp_path / "adapter")
    assert loaded.tokenizer.get_vocab() == recognizer.tokenizer.get_vocab()
    batch, _ = small_models.batch_and_singles(recognizer)
    torch.testing.assert_close(small_models.logits(loaded, batch), small_models.logits(recognizer, batch))
    again = tmp_path / "again"
    loaded.save(again)
    assert (again / "alphabet.txt").read_bytes() == (tmp_path / "adapter" / "alphabet.txt").read_bytes()


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("whisper", {"alphabet": "german"}, r"model\.alphabet are for CTC models"),
        ("parakeet", {"alphabet": "german"}, r"model\.alphabet='german' with model\.vocabulary=keep"),
        (
            "parakeet",
            {"alphabet": "german", "new_head": True, "vocabulary": "own"},
            "with model.vocabulary=own",
        ),
        ("parakeet", {**NEW, "alphabet": "klingon"}, "neither a file nor one of english"),
    ],
)
def test_an_alphabet_that_does_not_fit_is_refused(
    folders: dict[str, Path], family: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        small_models.load(folders[family], **values)


def test_an_alphabet_from_the_command_line() -> None:
    arguments = ["train", "--model", "m", "--data", "d", "--alphabet", "german", "--print-config"]
    assert "alphabet: german" in CliRunner().invoke(app, arguments).output
