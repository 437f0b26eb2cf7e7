"""Data loading and micro-batches, on the CPU: how many utterances a core prepares in a second, and what padding wastes.

    python -m bench.asr.data --output bench/results/DEVICE/data.json
    python -m bench.asr.data --manifest SPEECH/manifest.jsonl --corpus librispeech --rate 200

Utterances a second of a core: reading (soundfile decodes FLAC); features (Parakeet's log-mel); both, collated into
micro-batches, as a DataLoader's worker does it; the same from the cache; and what the training process itself can take
from a worker, which no number of workers raises. CPU time, so that other processes do not count. Audio: speech-like
noise of LibriSpeech's durations as FLAC, and the recordings of a manifest where one is given. `--rate`: utterances a
second that a GPU's step takes; the cores that keep up with it follow.

Padding: share of the frames of micro-batches that are no utterance's, over Poisson-sampled logical batches, split as
they are drawn, by length, and by length within a frame budget.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch.utils.data import DataLoader

from asr_finetune.config.schema import DataConfig
from asr_finetune.data.audio import read_audio
from asr_finetune.data.corpus import Corpus
from asr_finetune.data.sources import load_corpus
from asr_finetune.data.utterance import Utterance
from asr_finetune.models.alphabets import CHARACTERS
from asr_finetune.models.loading import tiny_parakeet
from asr_finetune.models.recognizer import Recognizer
from asr_finetune.training.dataset import CACHE_BYTES, SpeechDataset
from bench.harness.machine import about
from dpkernels.privacy import micro_batches

RATE = 16_000
SEED = 20
# LibriSpeech's 281,241 training utterances: 12.3 s on average, most of them near the cut at 16 s or so, few above.
MEAN_SECONDS, SHORTEST, LONGEST = 12.3, 1.4, 24.5
_COLLATED = 8  # utterances in the micro-batches of a small corpus
FRAMES_PER_SECOND = 12.5  # Parakeet's encoder


def librispeech_like_seconds(count: int) -> np.ndarray:
    """Durations of LibriSpeech's shape, not its values: most at 14 to 16 s, a floor of shorter ones, mean 12.3."""
    random = np.random.default_rng(SEED)
    peak = random.normal(14.8, 1.0, count)
    floor = random.uniform(SHORTEST, 14.5, count)
    seconds = np.where(random.random(count) < 0.63, peak, floor)
    seconds = np.where(random.random(count) < 0.01, random.uniform(17, LONGEST, count), seconds)
    return np.clip(seconds * MEAN_SECONDS / seconds.mean(), SHORTEST, LONGEST)


def speech_like(seconds: float, seed: int) -> np.ndarray:
    """Coloured noise in syllables, 4 a second: FLAC packs it to about what it packs read speech to."""
    random = np.random.default_rng(seed)
    count = round(seconds * RATE)
    spectrum = np.fft.rfft(random.normal(size=count))
    spectrum /= 1 + np.arange(len(spectrum)) * (RATE / count) / 400
    voice = np.fft.irfft(spectrum, count)
    syllables = np.clip(np.sin(2 * np.pi * 4 * np.arange(count) / RATE), 0.02, None)
    return (0.3 * voice / np.abs(voice).max() * syllables).astype(np.float32)


def generated(folder: Path, count: int) -> Corpus:
    """FLAC files of LibriSpeech-like durations."""
    utterances = []
    for index, seconds in enumerate(librispeech_like_seconds(count)):
        path = folder / f"{index}.flac"
        soundfile.write(path, speech_like(float(seconds), index), RATE)
        header = soundfile.info(str(path))
        utterances.append(
            Utterance(str(index), path, None, None, "some words", None, header.frames / header.samplerate)
        )
    return Corpus(utterances)


def padding(seconds: np.ndarray, batch: int, width: int, draws: int = 20) -> dict[str, Any]:
    """Shares of padding and micro-batches a logical batch, by how a Poisson batch of about `batch` is split.

    width: utterances in a micro-batch; for the frame budget, of the longest utterance.
    """
    frames = np.maximum((seconds * FRAMES_PER_SECOND).astype(int), 1)
    random = np.random.default_rng(SEED)
    budget = width * int(frames.max())
    splits: dict[str, Callable[[np.ndarray], list[list[int]]]] = {
        "as drawn": lambda drawn: micro_batches(drawn, width),
        "by length": lambda drawn: micro_batches(drawn, width, frames),
        "by length, frame budget": lambda drawn: micro_batches(drawn, batch, frames, budget),
    }
    padded, parts, unpadded = dict.fromkeys(splits, 0), dict.fromkeys(splits, 0), 0
    for _ in range(draws):
        drawn = np.flatnonzero(random.random(len(frames)) < min(batch / len(frames), 1.0))
        unpadded += int(frames[drawn].sum())
        for name, split in splits.items():
            batches = split(drawn)
            parts[name] += len(batches)
            padded[name] += sum(len(part) * int(frames[part].max()) for part in batches)
    return {
        name: {
            "padding": round(1 - unpadded / padded[name], 4),
            "micro_batches": round(parts[name] / draws, 1),
        }
        for name in splits
    }


def throughput(corpus: Corpus, recognizer: Recognizer) -> dict[str, float]:
    """Utterances a second of one thread, by stage; the median of three passes over the corpus."""
    samples = [read_audio(utterance, RATE) for utterance in corpus.utterances]
    cached, computed = SpeechDataset(corpus, recognizer, cache=True), SpeechDataset(corpus, recognizer)
    frames = np.array([recognizer.length(utterance) for utterance in corpus.utterances])
    parts = micro_batches(np.arange(len(corpus)), _COLLATED, frames)

    def read_all(dataset: SpeechDataset, workers: int = 0) -> None:
        for _ in DataLoader(dataset, batch_sampler=parts, collate_fn=recognizer.collate, num_workers=workers):
            pass

    read_all(cached)
    stages: dict[str, Callable[[], Any]] = {
        "decode": lambda: [read_audio(utterance, RATE) for utterance in corpus.utterances],
        "features": lambda: [recognizer.encode_audio(array) for array in samples],
        "computed": lambda: read_all(computed),
        "cached": lambda: read_all(cached),
        "received": lambda: read_all(cached, 1),
    }
    return {name: round(len(corpus) / _seconds(stage), 1) for name, stage in stages.items()}


def _seconds(stage: Callable[[], Any]) -> float:
    taken = []
    for _ in range(3):
        began = time.process_time()  # of this process: a core's time, also where cores are shared
        stage()
        taken.append(time.process_time() - began)
    return sorted(taken)[1]


def describe(corpus: Corpus, recognizer: Recognizer, rate: float) -> dict[str, Any]:
    """Everything about one corpus."""
    seconds = np.array([utterance.seconds for utterance in corpus.utterances])
    speeds = throughput(corpus, recognizer)
    item = recognizer.encode_audio(speech_like(float(seconds.mean()), 0))
    size, batch = sum(value.nbytes for value in item.values()), max(len(corpus) // 2, 1)
    return {
        "utterances": len(corpus),
        "mean_seconds": round(float(seconds.mean()), 2),
        "utterances_per_second_and_core": speeds,
        "cores_for_rate": {
            name: round(rate / speeds[name], 2) for name in ("computed", "cached", "received")
        },
        "cached_bytes_per_utterance": size,
        "utterances_in_a_cache": CACHE_BYTES // size,
        "padding": {"batch": batch, "width": _COLLATED, **padding(seconds, batch, _COLLATED)},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.asr.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--count", type=int, default=100, help="generated utterances")
    parser.add_argument("--manifest", help="recordings to measure as well")
    parser.add_argument("--corpus", help="keep the manifest's lines of this corpus only")
    parser.add_argument("--rate", type=float, default=100.0, help="utterances a second that a GPU takes")
    parser.add_argument("--batch", type=int, default=4096, help="logical batch, for padding")
    parser.add_argument("--width", type=int, default=32, help="micro-batch, for padding")
    parser.add_argument("--output", help="JSON file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    recognizer = tiny_parakeet(CHARACTERS, hidden=16, layers=1, heads=2, channels=8)
    results: dict[str, Any] = {"group": "data", "about": about("cpu"), "rate": options.rate, "corpora": {}}
    results["librispeech_like_padding"] = {
        "batch": options.batch,
        "width": options.width,
        **padding(librispeech_like_seconds(281_241), options.batch, options.width),
    }
    with tempfile.TemporaryDirectory() as folder:
        corpora = {"generated": generated(Path(folder), options.count)}
        if options.manifest:
            config = DataConfig(train=options.manifest, corpus=options.corpus, text_case="lower")
            corpora["recordings"] = load_corpus(options.manifest, data=config)
        for name, corpus in corpora.items():
            results["corpora"][name] = describe(corpus, recognizer, options.rate)
    text = json.dumps(results, indent=1)
    print(text)
    if options.output:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        Path(options.output).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
