"""Alphabets: the characters of a new CTC output layer."""

from __future__ import annotations

import unicodedata
from pathlib import Path

from asr_finetune.config.values import ConfigError

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
