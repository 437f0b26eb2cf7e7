"""Recordings of noise and what a corpus of them reads as, for tests of data."""

from __future__ import annotations

import io
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from asr_finetune.config.schema import DataConfig
from asr_finetune.data.corpus import Corpus, Utterance
from asr_finetune.data.sources import load_corpus

RATE = 16000


def options(**values: Any) -> DataConfig:
    return DataConfig(train="unused", **values)


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=0.1, size=round(seconds * RATE)).astype(np.float32)


def utterance(name: str, text: str = "low", seconds: float = 0.5, **values: Any) -> Utterance:
    return Utterance(name, None, noise(seconds, seed=len(name)), RATE, text, None, seconds, **values)


def write(path: Path, seconds: float = 0.5, seed: int | None = None) -> Path:
    """A recording that files of other names do not hold, unless the seed says so."""
    seed = zlib.crc32(path.name.encode()) if seed is None else seed
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, noise(seconds, seed), RATE)
    return path


def encoded(seconds: float = 0.5, seed: int = 0) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, noise(seconds, seed), RATE, format="FLAC")
    return file.getvalue()


def manifest(folder: Path, lines: list[Any]) -> Path:
    """Objects as JSON, text as it is."""
    path = folder / "all.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read(source: Path, split: str | None = None, **values: Any) -> Corpus:
    return load_corpus(str(source), split=split, data=options(**values))


def reasons(corpus: Corpus) -> dict[str, str]:
    return {problem.id: problem.reason for problem in corpus.problems}


def texts(corpus: Corpus) -> dict[str, str]:
    return {utterance.id: utterance.text for utterance in corpus.utterances}
