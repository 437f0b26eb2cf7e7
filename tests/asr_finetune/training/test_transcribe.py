"""`asr-finetune transcribe`: what is read, how long audio is decoded, and the forms of the text."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers
from typer.testing import CliRunner

from asr_finetune import cli
from asr_finetune.config.schema import ConfigError, ModelConfig
from asr_finetune.files import MissingFile
from asr_finetune.models import longform
from asr_finetune.models.ctc import CTCRecognizer
from asr_finetune.models.loading import load_recognizer
from asr_finetune.models.longform import Segment, transcribe_long
from asr_finetune.models.whisper import WhisperRecognizer
from asr_finetune.training.export import export
from asr_finetune.training.transcribe import (
    Transcript,
    as_json,
    as_srt,
    as_text,
    recordings,
    transcribe,
    write,
)
from tests.asr_finetune import small_models, tones

RATE = small_models.RATE


def invoke(*arguments: object) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, [str(item) for item in arguments])


def wave(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=0.1, size=round(seconds * RATE)).astype(np.float32)


def paths(sources: Sequence[Path], **options: Any) -> list[Path | None]:
    return [record.path for record in recordings(sources, **options)]


def test_recordings_of_files_folders_and_manifests(tmp_path: Path) -> None:
    manifest = tones.write_manifest(tmp_path, 3)
    (tmp_path / "nemo.jsonl").write_text('{"audio_filepath": "tones/2.wav"}\n\n')
    folder = [tmp_path / "tones" / f"{number}.wav" for number in range(3)]
    assert paths([folder[1], tmp_path / "tones", manifest, tmp_path / "nemo.jsonl"]) == [
        *(folder[1], *folder, *folder, folder[2])
    ]
    (tmp_path / "bad.csv").write_text("clip,words\ntones/0.wav,low\n")
    (tmp_path / "empty").mkdir()
    for source, error, message in (
        ("none.wav", MissingFile, "no such file"),
        ("bad.csv", ConfigError, "has the columns clip, words: say which of them holds the audio"),
        ("empty", ConfigError, "no audio in this folder"),
    ):
        with pytest.raises(error, match=message):
            recordings([tmp_path / source])
    assert paths([tmp_path / "bad.csv"], columns={"audio": "clip"}) == folder[:1]


def kaldi(folder: Path, audio: Path) -> Path:
    folder.mkdir()
    (folder / "wav.scp").write_text(f"all {audio}\n")
    (folder / "segments").write_text("first all 0.1 0.4\nlater all 0.5 1.0\n")
    return folder


def table(column: Callable[[Path], Any]) -> Callable[[Path, Path], Path]:
    def write(path: Path, audio: Path) -> Path:
        import datasets

        datasets.Dataset.from_dict({"audio": [column(audio)]}).to_parquet(path.with_suffix(".parquet"))
        return path.with_suffix(".parquet")

    return write


def listing(suffix: str, text: str) -> Callable[[Path, Path], Path]:
    def write(path: Path, audio: Path) -> Path:
        path.with_suffix(suffix).write_text(text.format(audio))
        return path.with_suffix(suffix)

    return write


def saved(path: Path, audio: Path) -> Path:
    import datasets

    datasets.Dataset.from_dict({"path": [str(audio)]}).save_to_disk(str(path))
    return path


LISTINGS: dict[str, tuple[Callable[[Path, Path], Path], list[tuple[str, float, float]]]] = {
    "jsonl": (listing(".jsonl", '{{"audio": "{}"}}'), [("", 0.0, 1.2)]),
    "nemo": (
        listing(".json", '{{"audio_filepath": "{}", "offset": 0.5, "duration": 0.5, "id": "p"}}'),
        [("p", 0.5, 1.0)],
    ),
    "csv": (listing(".csv", "path,note\n{},x\n"), [("", 0.0, 1.2)]),
    "tsv": (listing(".tsv", "path\tsentence\n{}\tlow\n"), [("", 0.0, 1.2)]),
    "kaldi": (kaldi, [("first", 0.1, 0.4), ("later", 0.5, 1.0)]),
    "paths": (table(str), [("", 0.0, 1.2)]),
    "bytes": (table(lambda audio: {"bytes": audio.read_bytes(), "path": None}), [("", 0.0, 1.2)]),
    "samples": (
        table(lambda audio: {"array": soundfile.read(audio)[0].tolist(), "sampling_rate": RATE}),
        [("", 0.0, 1.2)],
    ),
    "saved": (saved, [("", 0.0, 1.2)]),
}


@pytest.mark.thinned(4)
@pytest.mark.parametrize("kind", LISTINGS)
def test_every_listing_that_trains_is_transcribed_without_its_transcripts(
    folders: Any, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "audio").mkdir()
    audio = tmp_path / "audio" / "call.wav"
    soundfile.write(audio, marks(1.2) / 30, RATE)
    write, expected = LISTINGS[kind]
    (tmp_path / "listed").mkdir()
    made = list(
        transcribe(scripted(folders["parakeet"]), recordings([write(tmp_path / "listed" / "all", audio)]))
    )
    assert [transcript.problem for transcript in made] == [""] * len(expected)
    spans = [(transcript.id, *vars(transcript.segments[0]).values()) for transcript in made]
    assert [(name, pytest.approx(start), pytest.approx(end)) for name, start, end in expected] == [
        span[:3] for span in spans
    ]
    by_file = [transcript.audio == str(audio) for transcript in made]
    assert by_file == [kind not in ("bytes", "samples")] * len(made)


def test_a_line_without_a_recording_is_a_problem_by_its_place(folders: Any, tmp_path: Path) -> None:
    tones.write_manifest(tmp_path, 1)
    (tmp_path / "bad.jsonl").write_text(
        '{"audio": "tones/0.wav"}\n{"text": "low"}\nno JSON\n{"audio": "none.wav"}\n'
    )
    made = list(transcribe(scripted(folders["parakeet"]), recordings([tmp_path / "bad.jsonl"])))
    assert [(item.audio.rpartition("/")[2], item.problem.partition(":")[0]) for item in made] == [
        ("0.wav", ""),
        ("bad.jsonl:2", "no `audio` path"),
        ("bad.jsonl:3", "not JSON"),
        ("none.wav", "no such file"),
    ]


def test_a_piece_has_its_own_name_and_the_times_of_its_file(tmp_path: Path) -> None:
    made = Transcript("calls/all.wav", 0.5, [Segment(0.5, 1.0, "low")], id="piece")
    assert as_text(made) == "piece\tlow\n"
    assert json.loads(as_json(made)) == {
        "id": "piece",
        "audio": "calls/all.wav",
        "seconds": 0.5,
        "text": "low",
        "segments": [{"start": 0.5, "end": 1.0, "text": "low"}],
    }
    assert write([made], "srt", tmp_path / "subtitles", print) == []
    assert (tmp_path / "subtitles" / "piece.srt").read_text() == "1\n00:00:00,500 --> 00:00:01,000\nlow\n"


def test_short_recordings_read_as_in_an_evaluation(runs: Path) -> None:
    recognizer = load_recognizer(ModelConfig(str(runs / "finished" / "adapter"), device="cpu"))
    files = recordings([runs / "clean.jsonl"])
    made = list(transcribe(recognizer, files))
    lines = (runs / "finished" / "not_private" / "transcripts_after_clean.tsv").read_text().splitlines()
    assert [transcript.text for transcript in made] == [line.split("\t")[2] for line in lines]
    assert [transcript.audio for transcript in made] == [str(record.path) for record in files]
    for transcript in made:
        assert [(part.start, part.end) for part in transcript.segments] == [(0.0, transcript.seconds)]


class Scripted(CTCRecognizer):
    """A CTC recogniser that hears one label every 0.5 s: the number of that half second, modulo the classes."""

    def logits(self, model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        marks = batch[self.input_name][0]
        logits = torch.zeros(1, len(marks), 30)
        logits[0, torch.arange(len(marks)), marks.long()] = 1.0
        return logits, torch.tensor([len(marks)])

    def encode_audio(self, array: np.ndarray) -> dict[str, torch.Tensor]:
        return {self.input_name: torch.tensor(array[:: RATE // 50], dtype=torch.float32)}

    def _inputs(self, items: Any) -> dict[str, torch.Tensor]:
        return {self.input_name: torch.stack([item[self.input_name] for item in items])}

    def text_of(self, labels: Any) -> str:
        return " ".join(map(str, labels))


def scripted(folder: Path) -> Scripted:
    made = small_models.load(folder)
    return Scripted(made.model, made.processor, name="scripted")


def marks(seconds: float, silent: tuple[float, float] = (-1.0, -1.0)) -> np.ndarray:
    """Samples that tell `Scripted` what to hear: from 0.25 s of each half second on, its number; blanks around."""
    time = np.arange(round(seconds * RATE)) / RATE
    numbers = (1 + np.floor(2 * time) % 28).astype(np.float32)
    heard = (time % 0.5 >= 0.2) & (time % 0.5 < 0.3) & ~((time >= silent[0]) & (time < silent[1]))
    return np.where(heard, numbers, 0.0).astype(np.float32)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("seconds", [0.5, 19.9, 20.0, 20.1, 36.0, 36.5, 71.0])
def test_windows_lose_and_repeat_nothing(folders: Any, seconds: float) -> None:
    done: list[float] = []
    found = transcribe_long(scripted(folders["parakeet"]), marks(seconds), done.append)
    heard = [int(label) for segment in found for label in segment.text.split()]
    count = int(2 * seconds + 0.4)  # each is heard from 0.2 to 0.3 s of its half second
    assert heard == [1 + number % 28 for number in range(count)]
    assert done == sorted(done)
    assert done[-1] == pytest.approx(seconds)
    assert found[-1].end == pytest.approx(0.3 + 0.5 * (count - 1), abs=0.05)


def test_a_pause_ends_a_segment(folders: Any) -> None:
    found = transcribe_long(scripted(folders["parakeet"]), marks(30, silent=(10, 14)), lambda _: None)
    assert [(round(part.start, 1), round(part.end, 1)) for part in found] == [(0.2, 9.8), (14.2, 29.8)]


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    "family", ["parakeet", "parakeet_tdt", "parakeet_rnnt", "wav2vec2-bert", "wav2vec2", "wav2vec2-group"]
)
def test_every_model_without_a_window_takes_long_audio(
    folders: Any, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one window it hears what it hears at once."""
    recognizer = small_models.load(folders[family])
    samples = wave(3.0)
    whole = recognizer.transcribe(recognizer.collate([recognizer.encode_audio(samples)]))[0]
    parts = transcribe_long(recognizer, samples, lambda _: None)
    assert "".join(part.text for part in parts).replace(" ", "") == whole.replace(" ", "")
    monkeypatch.setattr(longform, "WINDOW_SECONDS", 1.0)
    monkeypatch.setattr(longform, "OVERLAP_SECONDS", 0.4)
    windows = [samples[start : start + RATE] for start in range(0, len(samples), round(0.6 * RATE))][:5]
    heard = [recognizer.transcribe(recognizer.collate([recognizer.encode_audio(w)]))[0] for w in windows]
    # random weights may hear nothing in any of the windows
    assert bool(transcribe_long(recognizer, samples, lambda _: None)) == any(map(str.strip, heard))
    assert transcribe_long(recognizer, np.zeros(RATE * 2, np.float32), lambda _: None) is not None


def whisper_with_times(folder: Path, timed: Path) -> WhisperRecognizer:
    """The small Whisper with tokens for the times of its window, which it is made to prefer."""
    recognizer = small_models.load(folder)
    assert isinstance(recognizer, WhisperRecognizer)
    tokenizer, model = recognizer.tokenizer, recognizer.base
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [f"<|{index / 50:.2f}|>" for index in range(51)]},
        replace_extra_special_tokens=False,
    )
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(timed)
    recognizer.processor.save_pretrained(timed)
    loaded = small_models.load(timed)
    assert isinstance(loaded, WhisperRecognizer)
    return loaded


@pytest.mark.parametrize("family", ["whisper", "multilingual"])
def test_whisper_decodes_long_audio_by_its_own_times(folders: Any, tmp_path: Path, family: str) -> None:
    recognizer = whisper_with_times(folders[family], tmp_path / "timed")
    samples, seen = wave(3.5), []
    given: list[dict[str, Any]] = []
    original = type(recognizer.base).generate

    def generate(self: Any, features: Any, **options: Any) -> Any:
        given.append({**options, "frames": features.shape[-1]})
        return original(self, features, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(recognizer.base), "generate", generate)
        found = transcribe_long(recognizer, samples, seen.append)
    (options,) = given
    assert options["frames"] == 350
    assert options["return_timestamps"]
    assert options.get("language") == ("en" if family == "multilingual" else None)
    assert len(seen) >= 4  # a window has one second
    assert seen == sorted(seen)
    assert found
    assert all(0 <= part.start <= part.end <= 3.5 and part.text for part in found)
    assert not re.search(r"<\|", "".join(part.text for part in found))
    assert all(first.start <= second.start for first, second in itertools.pairwise(found))
    assert found[-1].end > 2.0


def test_whisper_without_times_says_so(folders: Any) -> None:
    recognizer = small_models.load(folders["whisper"])
    with pytest.raises(ConfigError, match=r"takes 1 s of audio at most, not 2\.0 s"):
        transcribe_long(recognizer, wave(2.0), lambda _: None)


def test_the_command(runs: Path) -> None:
    (runs / "tone" / "deep").mkdir(parents=True)
    soundfile.write(runs / "tone" / "a.wav", wave(1.0), RATE)
    soundfile.write(runs / "tone" / "deep" / "a.flac", wave(1.5, seed=1), RATE)
    (runs / "tone" / "broken.wav").write_bytes(b"RIFF")
    common = ("transcribe", runs / "tone", "--model", runs / "finished", "--device", "cpu")
    result = invoke(*common, "--quiet")
    assert result.exit_code == 1
    assert "not transcribed" in result.stderr
    assert "broken.wav: unreadable audio" in result.stderr
    assert [line.split("\t")[0] for line in result.stdout.splitlines()] == [
        str(runs / "tone" / name) for name in ("a.wav", "deep/a.flac")
    ]
    (runs / "tone" / "broken.wav").unlink()
    result = invoke(*common, "--format", "json", "--output", runs / "out.jsonl")
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (runs / "out.jsonl").read_text().splitlines()]
    assert [line["seconds"] for line in lines] == [1.0, 1.5]
    assert all(line["text"] == " ".join(part["text"] for part in line["segments"]) for line in lines)
    assert "seconds of audio 2/2" in result.stderr
    result = invoke(*common, "--format", "srt", "--output", runs / "subtitles")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (runs / "subtitles").iterdir()} == {"a.srt", "a-1.srt"}


def test_subtitles_of_several_files_need_a_folder_and_a_stopped_run_an_export(runs: Path) -> None:
    model = ("--model", runs / "stopped", "--device", "cpu", "-q")
    result = invoke("transcribe", runs / "clean", *model, "--format", "srt")
    assert "give --output FOLDER" in str(result.exception)
    assert "asr-finetune export" in str(invoke("transcribe", runs / "clean", *model).exception)
    export(runs / "stopped")
    assert invoke("transcribe", runs / "clean", *model).exit_code == 0
    both = ("--model", runs / "model", "--adapter", runs / "stopped", "--device", "cpu", "-q")
    assert (
        invoke("transcribe", runs / "clean", *both).stdout
        == invoke("transcribe", runs / "clean", *model).stdout
    )


def test_subtitles() -> None:
    parts = [Segment(0.0, 1.25, "one"), Segment(59.9996, 3661.5, "two")]
    assert as_srt(Transcript("a.wav", 3700.0, parts)) == (
        "1\n00:00:00,000 --> 00:00:01,250\none\n\n2\n00:01:00,000 --> 01:01:01,500\ntwo\n"
    )


def test_what_no_model_takes_is_a_problem(runs: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "short.wav", np.zeros(10, np.float32), RATE)
    recognizer = load_recognizer(ModelConfig(str(runs / "model"), device="cpu"))
    (made,) = transcribe(recognizer, [tmp_path / "short.wav"])
    assert made.problem.startswith("too short for the model")
    assert transformers.__version__  # the models' library, whose generate() is called above
