"""All entries of the table."""

from __future__ import annotations

import importlib.util

from bench.models import zoo_convnets, zoo_multimodal, zoo_speech, zoo_text, zoo_vision
from bench.models.entry import Entry

if importlib.util.find_spec("torchvision"):
    zoo_convnets.torchvision()  # first: transformers imports it where it is installed

ENTRIES: list[Entry] = [
    *zoo_text.ENTRIES,
    *zoo_speech.ENTRIES,
    *zoo_vision.ENTRIES,
    *zoo_convnets.ENTRIES,
    *zoo_multimodal.ENTRIES,
]
