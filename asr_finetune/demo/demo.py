"""The demo: synthetic speech, a small recogniser, and private fine-tuning to voices that it recognises badly.

Only the size differs from a real run: audio files from a synthesiser, a ParakeetForCTC, and for the private part the
`train` function of `asr-finetune train`. Every figure is measured. Nothing is downloaded.

    speech/          WAV files, manifest.jsonl: splits "public", "valid" (public), "train", "test" (private)
    public_model/    the recogniser trained, without privacy, on the public voices
    not_private/     the same recipe without privacy, for comparison with the private run
    private/         the private run: model, ledger, run.json
    report.html      its report
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from asr_finetune.config.schema import (
    Config,
    DataConfig,
    EvaluateConfig,
    MethodConfig,
    ModelConfig,
    PrivacyConfig,
    TrainConfig,
)
from asr_finetune.console import Reporter, duration
from asr_finetune.demo.synth import PUBLIC_VOICES, Voice, synthesise, write_wav
from asr_finetune.files import write_text
from asr_finetune.models.loading import tiny_parakeet
from asr_finetune.models.recognizer import Recognizer
from asr_finetune.report.report import write_report
from asr_finetune.training.dataset import SpeechDataset
from asr_finetune.training.run import train
from asr_finetune.training.run_folder import RunFolder
from asr_finetune.training.setup import fitted_corpus
from dpkernels.rounding import shown_epsilon, shown_sigma

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LONGEST = 3  # digits in an utterance

# Whisperers, a hoarse voice, a slow low one and a fast high one: the recogniser has not been trained on them.
PRIVATE_VOICES = (
    Voice("en+whisper", rate=200, pitch=30),
    Voice("en-us+whisperf"),
    Voice("en-us+whisper", rate=230, pitch=70),
    Voice("en-us+m1", rate=100, pitch=10),
    Voice("en+f3", rate=280, pitch=90),
    Voice("en+Demonic"),
)
# Two similar voices for the public validation data.
VALID_VOICES = (Voice("en-029+whisper", rate=190, pitch=45), Voice("en-us+m5", rate=105, pitch=15))


@dataclass(frozen=True)
class Recipe:
    """Sizes and settings; the defaults are the demo, smaller ones are for its test.

    Attributes:
        public: utterances of each public voice.
        private: training utterances of each private voice.
        test: test utterances of each private voice; no text of them is in any training split.
        valid: utterances of each public validation voice.
        public_epochs: passes over the public voices.
        batch_size: expected batch of the private run.
        steps: its logical steps.
        learning_rate: its peak learning rate (Adam, falling to 0 along a cosine).
        max_grad_norm: its clipping norm.
        epsilon: its target.
        delta: its δ, well below 1 over the number of private utterances.
    """

    public: int = 160
    private: int = 700
    test: int = 40
    valid: int = 40
    public_epochs: int = 7
    batch_size: int = 384
    steps: int = 30
    learning_rate: float = 2e-3
    max_grad_norm: float = 1.0
    epsilon: float = 8.0
    delta: float = 1e-5


@dataclass(frozen=True)
class DemoResult:
    """The demo's results.

    Attributes:
        before: WER on the private voices' test utterances before fine-tuning.
        private: after private fine-tuning.
        non_private: after the same recipe without privacy.
        epsilon: ε spent by the private run, at `delta`.
        delta: δ.
        report: the HTML page.
        seconds: of the whole demo.
    """

    before: float
    private: float
    non_private: float
    epsilon: float
    delta: float
    report: Path
    seconds: float


def run(output: Path, recipe: Recipe | None = None, *, console: Console | None = None) -> DemoResult:
    """Run the demo; parts that an earlier call finished in `output` are kept.

    Args:
        output: folder for everything it makes.
        recipe: sizes and settings.
        console: where to print; standard output when None.

    Raises:
        SynthesisError: the synthesiser is not installed; the message says how to.
        ConfigError: `output` holds a demo with another recipe.
    """
    recipe = recipe or Recipe()
    reporter = Reporter(console=console)
    began = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    reporter.say("1/4  speech: ten public voices, six private ones", style="bold")
    manifest = make_speech(output / "speech", recipe, reporter)
    reporter.say("2/4  a recogniser of the public voices, trained without privacy", style="bold")
    public_model = train_public(output / "public_model", manifest, recipe, reporter)
    reporter.say("3/4  fine-tuned to the private voices without privacy, for comparison", style="bold")
    plain = configuration(output / "not_private", manifest, public_model, recipe, private=False)
    train(plain)
    reporter.say("4/4  the same with differential privacy", style="bold")
    result = train(configuration(output / "private", manifest, public_model, recipe), compare=plain.output)
    report = write_report(result.output, output / "report.html")
    values = RunFolder(result.output).read_json(RunFolder(result.output).run)
    seconds = time.monotonic() - began
    _show(reporter, values, report, seconds)
    evaluation = values["evaluation"]
    return DemoResult(
        before=evaluation["before"]["wer"],
        private=evaluation["after"]["wer"],
        non_private=evaluation["non_private"]["wer"],
        epsilon=values["privacy"]["epsilon"],
        delta=values["privacy"]["delta"],
        report=report,
        seconds=seconds,
    )


def make_speech(folder: Path, recipe: Recipe, reporter: Reporter) -> Path:
    """Write the WAV files and, last, their manifest: where it is, they all are. Returns its path."""
    manifest = folder / "manifest.jsonl"
    if manifest.is_file():
        reporter.say(f"{manifest} is there already")
        return manifest
    parts = (
        ("public", PUBLIC_VOICES, recipe.public),
        ("valid", VALID_VOICES, recipe.valid),
        ("train", PRIVATE_VOICES, recipe.private),
        ("test", PRIVATE_VOICES, recipe.test),
    )
    lines: list[str] = []
    total = sum(len(voices) * count for _, voices, count in parts)
    with reporter.bar("speech", total) as bar:
        for split, voices, count in parts:
            for number, voice in enumerate(voices):
                lines += _speak(folder, split, number, voice, count)
                bar.update(len(lines))
    write_text(manifest, "".join(lines))
    return manifest


def _speak(folder: Path, split: str, number: int, voice: Voice, count: int) -> Iterator[str]:
    """The manifest's lines for one voice's utterances, with the files written."""
    generator = random.Random(f"{split} {voice}")
    texts = [_draw(generator, held_out=split in ("test", "valid")) for _ in range(count)]
    place = folder / split
    place.mkdir(parents=True, exist_ok=True)
    for index, (text, samples) in enumerate(zip(texts, synthesise(texts, voice), strict=True)):
        name = f"{split}-{number}-{index:04d}"
        write_wav(place / f"{name}.wav", samples)
        entry = {
            "utt_id": name,
            "audio": f"{split}/{name}.wav",
            "text": text,
            "speaker": voice.name if split == "public" else f"{voice.name} {voice.rate} {voice.pitch}",
            "split": split,
        }
        yield json.dumps(entry) + "\n"


def _draw(generator: random.Random, *, held_out: bool) -> str:
    """Digits to say: a multiple of 5 in sum, and two or more, for held-out splits and for no other."""
    while True:
        digits = generator.choices(range(len(DIGITS)), k=generator.randint(1, LONGEST))
        if (len(digits) > 1 and sum(digits) % 5 == 0) == held_out:
            return " ".join(DIGITS[digit] for digit in digits)


def train_public(folder: Path, manifest: Path, recipe: Recipe, reporter: Reporter) -> Path:
    """Train a small recogniser on the public voices; ordinary training. Returns its folder."""
    finished = folder / "finished"
    if finished.is_file():
        reporter.say(f"{folder} is there already")
        return folder
    torch.manual_seed(0)
    recognizer = tiny_parakeet(DIGITS, hidden=96, layers=2, channels=16, intermediate_size=256)
    data = DataConfig(train=str(manifest))
    corpus = fitted_corpus(data.train, "public", data, recognizer)
    _fit(recognizer, SpeechDataset(corpus, recognizer, cache=True), recipe.public_epochs, reporter)
    recognizer.save(folder)
    write_text(finished, "")
    return folder


def _fit(recognizer: Recognizer, dataset: SpeechDataset, epochs: int, reporter: Reporter) -> None:
    """AdamW on the mean CTC loss, one-cycle learning rate, batches of 16 of like length."""
    model, batch_size = recognizer.model, 16
    batches = _batches_of_like_length(dataset, recognizer, batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    total = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=total, pct_start=0.15)
    generator = random.Random(0)
    model.train()
    done = 0
    with reporter.bar("public training", total) as bar:
        for _ in range(epochs):
            generator.shuffle(batches)
            for chosen in batches:
                batch = recognizer.collate([dataset[index] for index in chosen])
                loss = recognizer.loss_per_example(model, batch).mean()
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                done += 1
                bar.update(done, f"loss {loss.item():.3f}")
    model.eval()


def _batches_of_like_length(
    dataset: SpeechDataset, recognizer: Recognizer, batch_size: int
) -> list[Sequence[int]]:
    lengths = [recognizer.length(utterance) for utterance in dataset.corpus.utterances]
    order = list(range(len(lengths)))
    random.Random(0).shuffle(order)
    order.sort(key=lambda index: lengths[index])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def configuration(
    output: Path, manifest: Path, public_model: Path, recipe: Recipe, *, private: bool = True
) -> Config:
    """The configuration of `asr-finetune train` for the private voices."""
    return Config(
        model=ModelConfig(name=str(public_model), device="cpu"),
        data=DataConfig(
            train=str(manifest),
            train_split="train",
            test=str(manifest),
            test_split="test",
            valid=str(manifest),
            valid_split="valid",
        ),
        method=MethodConfig(kind="full"),
        privacy=PrivacyConfig(
            epsilon=recipe.epsilon if private else None,
            delta=recipe.delta if private else None,
            max_grad_norm=recipe.max_grad_norm,
            enabled=private,
        ),
        train=TrainConfig(
            batch_size=recipe.batch_size,
            physical_batch_size=32,
            steps=recipe.steps,
            learning_rate=recipe.learning_rate,
            lr_schedule="cosine",
            eval_every=max(recipe.steps // 5, 1) if private else 0,
        ),
        evaluate=EvaluateConfig(batch_size=64),
        output=str(output),
    )


def _show(reporter: Reporter, values: dict[str, Any], report: Path, seconds: float) -> None:
    """Print the result as a table, and the path of the report."""
    evaluation, privacy = values["evaluation"], values["privacy"]
    table = Table(title="word error rate on the private voices' test utterances", title_justify="left")
    for heading in ("", "WER", "95 % interval", "word errors removed"):
        table.add_column(heading, justify="left" if not heading else "right")
    before = evaluation["before"]
    labels = (
        ("before", "before fine-tuning"),
        ("after", f"private: ε = {shown_epsilon(privacy['epsilon'], 2)}, δ = {privacy['delta']:g}"),
        ("non_private", "the same without privacy"),
    )
    for key, label in labels:
        rates = evaluation[key]
        low, high = rates["wer_ci"]
        removed = "" if key == "before" else f"{1 - rates['wer'] / before['wer']:.0%}"
        style = "bold" if key == "after" else None
        table.add_row(label, f"{rates['wer']:.1%}", f"{low:.1%} to {high:.1%}", removed, style=style)
    reporter.console.print()
    reporter.console.print(table)
    reporter.say(
        f"{privacy['dataset_size']:,} private utterances, the unit of privacy is one of them; "
        f"σ = {shown_sigma(privacy['noise_multiplier'])}, C = {privacy['max_grad_norm']:g}, {privacy['steps']} steps "
        f"of about {privacy['expected_batch_size']} utterances; {privacy['accountant'].upper()} accounting"
    )
    reporter.say(f"private training took {duration(values['seconds'])}, the whole demo {duration(seconds)}")
    reporter.say(f"report: {report}", style="bold")
