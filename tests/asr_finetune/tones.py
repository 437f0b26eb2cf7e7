"""A small speech-like task for tests of training: words are tones, recordings are WAV files in a manifest."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from asr_finetune.models.loading import tiny_parakeet
from asr_finetune.training.run_folder import RunFolder

WORDS = {"low": 300.0, "high": 1200.0}
RATE = 16000


@contextmanager
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on several threads, much slower where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def write_manifest(
    folder: Path, count: int, *, seed: int = 0, name: str = "tones", speakers: int = 4
) -> Path:
    """`count` recordings of one or two tones in noise, 0.3 to 0.6 s a tone."""
    generator = np.random.default_rng(seed)
    audio = folder / name
    audio.mkdir(parents=True)
    lines = []
    for index in range(count):
        words = [list(WORDS)[generator.integers(2)] for _ in range(generator.integers(1, 3))]
        parts = []
        for word in words:
            time = np.arange(int(RATE * generator.uniform(0.3, 0.6))) / RATE
            parts.append(0.3 * np.sin(2 * np.pi * WORDS[word] * time))
        samples = np.concatenate(parts) + 0.01 * generator.normal(size=sum(map(len, parts)))
        soundfile.write(audio / f"{index}.wav", samples.astype(np.float32), RATE)
        lines.append(
            {
                "audio": f"{name}/{index}.wav",
                "text": " ".join(words),
                "speaker": f"s{index % speakers}",
                "utt_id": f"u{index}" if name == "tones" else f"{name}-{index}",
            }
        )
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_model(folder: Path) -> Path:
    """A tiny Parakeet with fresh weights, as a folder that load_recognizer reads."""
    tiny_parakeet(list(WORDS), hidden=32, layers=1, heads=2, channels=8, mels=40).save(folder)
    return folder


def interrupt_after(patch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C right after a step was applied and counted."""
    original = RunFolder.note_history

    def note(self: RunFolder, entry: dict[str, Any]) -> None:
        original(self, entry)
        if entry["step"] == step:
            os.kill(os.getpid(), signal.SIGINT)

    patch.setattr(RunFolder, "note_history", note)


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """A configuration's values for the task in `folder`; `changes` are {"section.key": value}."""
    values: dict[str, Any] = {
        "model": {"name": str(folder / "model"), "device": "cpu"},
        "data": {"train": str(folder / "tones.jsonl")},
        "method": {"kind": "full"},
        "privacy": {"epsilon": 8.0, "delta": 1e-3},
        "train": {"batch_size": 8, "physical_batch_size": 4, "steps": 4, "checkpoint_every": 2},
        "evaluate": {"bootstrap": 50},
        "output": str(folder / "run"),
    }
    for key, value in changes.items():
        section, _, name = key.replace("__", ".").partition(".")
        if name:
            values[section] = {**values[section], name: value}
        else:
            values[section] = value
    return values
