"""Alphabets: the characters of a new CTC output layer, and the tokenizer of such characters or of words."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import transformers
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel

from asr_finetune.config.values import ConfigError

BLANK, UNKNOWN = "<pad>", "<unk>"
WORD_DELIMITER = "|"
ALPHABET_FILE = "alphabet.txt"  # beside an adapter with a new output layer: its characters, one a line
# Public and fixed, since a vocabulary from the private transcripts would reveal their content.
_LATIN = "abcdefghijklmnopqrstuvwxyz"
_DIGITS = "0123456789'"
ALPHABETS = {
    "english": _LATIN,
    "dutch": _LATIN + "éëïóöü",
    "french": _LATIN + "àâæçéèêëîïôœùûüÿ",
    "german": _LATIN + "äöüß",
    "italian": _LATIN + "àèéìíîòóùú",
    "polish": _LATIN + "ąćęłńóśźż",
    "portuguese": _LATIN + "àáâãçéêíóôõúü",
    "spanish": _LATIN + "áéíñóúü",
    "swedish": _LATIN + "åäöé",
    "turkish": _LATIN + "âçğıîöşüû",
    "greek": "αβγδεζηθικλμνξοπρσςτυφχψωάέήίόύώϊϋΐΰ",
    "russian": "абвгдеёжзийклмнопрстуфхцчшщъыьэюя",
    "ukrainian": "абвгґдеєжзиіїйклмнопрстуфхцчшщьюя",
}
CHARACTERS = [*_LATIN, *_DIGITS, WORD_DELIMITER]


def read_alphabet(name: str | None) -> list[str]:
    """The characters of a new output layer: those of a named alphabet, or of a public text file.

    Args:
        name: a key of ALPHABETS, to which digits and the apostrophe are added, or the path of a text file whose
            characters count, each once, in their order there; None: English.

    Raises:
        ConfigError: there is neither such an alphabet nor such a file, or the file has no characters.
    """
    if name is None or name in ALPHABETS:
        return [*ALPHABETS[name or "english"], *_DIGITS, WORD_DELIMITER]
    if not Path(name).is_file():
        raise ConfigError(
            f"model.alphabet={name!r}: neither a file nor one of {', '.join(ALPHABETS)}: give a public text file that "
            "holds every character to recognise, never one made of the private transcripts"
        )
    text = unicodedata.normalize("NFC", Path(name).read_text(encoding="utf-8-sig"))
    characters = [char for char in dict.fromkeys(text) if not char.isspace() and char != WORD_DELIMITER]
    if not characters:
        raise ConfigError(f"model.alphabet={name!r}: no character in this file: write each one to recognise")
    return [*characters, WORD_DELIMITER]


def ctc_tokenizer(vocabulary: Sequence[str], unit: Literal["words", "characters"]) -> Any:
    """A CTC tokenizer for whole words or single characters; the blank is class 0.

    Args:
        vocabulary: words, or characters with `WORD_DELIMITER` in place of the space.
        unit: the unit of one label.

    Raises:
        ConfigError: the vocabulary is empty, or has a repeated or reserved entry, a character of several letters, or a
            word with white space; the message names the entry.
    """
    if not vocabulary:
        raise ConfigError("vocabulary=[]: give the words or characters to recognise")
    repeated = [entry for entry, count in Counter(vocabulary).items() if count > 1]
    if repeated:
        raise ConfigError(
            f"vocabulary: {_named(repeated)} more than once: each entry is one class, so leave the repeats out"
        )
    reserved = [entry for entry in vocabulary if entry in (BLANK, UNKNOWN, "")]
    if reserved:
        raise ConfigError(
            f"vocabulary: {_named(reserved)} is reserved (as {BLANK!r}, {UNKNOWN!r} and '' are): leave it out"
        )
    long = [entry for entry in vocabulary if len(entry) > 1]
    if unit == "characters" and long:
        raise ConfigError(
            f"vocabulary: {_named(long)} of several letters, but a character is a single letter: leave it out, or give "
            "unit='words'"
        )
    spaced = [entry for entry in vocabulary if entry.split() != [entry]]
    if unit == "words" and spaced:
        raise ConfigError(
            f"vocabulary: {_named(spaced)} with white space, which ends a word: give its words separately"
        )
    entries = [BLANK, UNKNOWN, *vocabulary]
    core = Tokenizer(WordLevel({entry: index for index, entry in enumerate(entries)}, unk_token=UNKNOWN))
    if unit == "words":
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        core.normalizer = normalizers.Sequence(
            [normalizers.Strip(), normalizers.Replace(Regex(r"\s+"), WORD_DELIMITER)]
        )
        core.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
        core.decoder = decoders.Sequence([decoders.Replace(WORD_DELIMITER, " "), decoders.Fuse()])
    return transformers.ParakeetTokenizer(tokenizer_object=core, pad_token=BLANK, unk_token=UNKNOWN)


def _named(entries: Sequence[str]) -> str:
    """The first of some entries, and how many more there are."""
    more = f" and {len(entries) - 1} more" if len(entries) > 1 else ""
    return f"{entries[0]!r}{more}"
