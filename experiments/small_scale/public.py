"""What the small Parakeet starts from: public synthetic digits, and a training on them without privacy.

The recordings are cut to what is spoken and kept at 8 kHz, as those of the Free Spoken Digit Dataset are. No recording
of that data set is heard here.
"""

import json
from pathlib import Path

import numpy as np
import soundfile
import soxr

from asr_finetune.demo.demo import DIGITS
from asr_finetune.demo.synth import SAMPLING_RATE, Voice, synthesise
from asr_finetune.models.loading import tiny_parakeet
from asr_finetune.training.checkpoint import write_text
from experiments.runs import asr_finetune

NAMES = ("en-us", "en-us+f2", "en-us+m2", "en-029+f1", "en-029+m3", "en-gb-x-rp+m1", "en+f3", "en+m4")
VOICES = tuple(
    Voice(name, rate=rate, pitch=pitch) for name in NAMES for rate, pitch in ((130, 30), (190, 60), (260, 45))
)
REPEATS = 8  # of each digit by each voice
CONFIG = "experiments/small_scale/public_parakeet.yaml"


def speech(folder: Path) -> Path:
    """Write the recordings and, last, their manifest; return its path."""
    manifest = folder / "manifest.jsonl"
    if manifest.is_file():
        return manifest
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, voice in enumerate(VOICES):
        texts = [digit for _ in range(REPEATS) for digit in DIGITS]
        for index, (text, samples) in enumerate(zip(texts, synthesise(texts, voice), strict=True)):
            name = f"{number}-{index:03d}"
            soundfile.write(folder / f"{name}.wav", soxr.resample(spoken(samples), SAMPLING_RATE, 8000), 8000)
            entry = {"utt_id": name, "audio": f"{name}.wav", "text": text, "speaker": str(number)}
            lines.append(json.dumps(entry) + "\n")
    write_text(manifest, "".join(lines))
    return manifest


def spoken(samples: np.ndarray) -> np.ndarray:
    """The samples from the first loud one to the last."""
    loud = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
    return samples[loud[0] : loud[-1] + 1]


def public_parakeet(work: Path) -> Path:
    """The folder of the small Parakeet, trained on the synthetic digits where that was not done yet."""
    finished = work / "public_parakeet" / "model"
    if not finished.is_dir():
        fresh = work / "fresh_parakeet"
        tiny_parakeet(DIGITS, hidden=96, layers=2, channels=16, intermediate_size=256).save(fresh)
        data = speech(work / "public_speech")
        asr_finetune(
            ["train", "--config", CONFIG], ["--model", fresh, "--train", data, "--output", finished.parent]
        )
    return finished
