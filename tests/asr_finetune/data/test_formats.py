"""Every format that recordings come in, as its own specification lays it out."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from asr_finetune.config.schema import ConfigError
from asr_finetune.data.audio import read_audio
from asr_finetune.data.sources import load_corpus
from asr_finetune.demo import synth
from tests.asr_finetune.recordings import RATE, manifest, noise, options, read, reasons, texts, write


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def nemo(folder: Path) -> Path:
    """NeMo: JSON lines, commonly in a .json: audio_filepath, duration, text; absolute paths or relative ones."""
    first, second = write(folder / "wavs" / "a.wav"), write(folder / "wavs" / "b.wav")
    lines = [
        {"audio_filepath": str(first), "duration": 0.5, "text": "one two", "speaker": 19},
        {"audio_filepath": f"wavs/{second.name}", "duration": 0.5, "text": "three", "lang": "en"},
    ]
    return manifest(folder, lines).rename(folder / "train_manifest.json")


def comma_separated(folder: Path) -> Path:
    """RFC 4180: commas, and quotes around fields that hold commas, quotes or line ends."""
    write(folder / "clips, old" / "a.wav")
    write(folder / "b.wav")
    path = folder / "all.csv"
    path.write_bytes(
        b'speaker,text,audio\r\n19,one two,"clips, old/a.wav"\r\n,"three",b.wav\r\n20,"said ""no""\n",lost.wav\r\n'
    )
    return path


def semicolons(folder: Path) -> Path:
    """As spreadsheets of many countries write it, with a byte order mark."""
    for name in "ab":
        write(folder / f"{name}.wav")
    path = folder / "all.csv"
    path.write_bytes(b"\xef\xbb\xbfaudio;text;speaker_id\r\na.wav;one two;19\r\nb.wav;three;\r\n")
    return path


def bars(folder: Path) -> Path:
    for name in "ab":
        write(folder / f"{name}.wav")
    path = folder / "filelist.csv"
    path.write_text("file_name|transcript|speaker\na.wav|one two|19\nb.wav|three|\n")
    return path


def common_voice(folder: Path) -> Path:
    """Common Voice: clips/ beside train.tsv, dev.tsv, ...; quotes have no meaning; other .tsv files are no listings."""
    columns = "client_id path sentence_id sentence sentence_domain up_votes down_votes age gender accents"
    columns += " variant locale segment"
    head = "\t".join(columns.split())
    for name in ("a", "b", "c"):
        write(folder / "clips" / f"{name}.mp3", 1.0)

    def line(client: str, name: str, sentence: str) -> str:
        return "\t".join([client, f"{name}.mp3", "0a1b", sentence, "", "2", "0", *[""] * 4, "en", ""])

    train = [head, line("19", "a", "one two"), line("", "b", "three"), line("20", "lost", '"four" five')]
    (folder / "train.tsv").write_text("\n".join(train) + "\n")
    (folder / "validated.tsv").write_text("\n".join([*train, line("20", "c", "six")]) + "\n")
    (folder / "clip_durations.tsv").write_text("clip\tduration[ms]\na.mp3\t1000\n")
    (folder / "reported.tsv").write_text(
        "sentence_id\tsentence\tlocale\treason\n0a1b\tone two\ten\toffensive\n"
    )
    return folder


def kaldi(folder: Path) -> Path:
    """Kaldi: wav.scp `<recording> <file>`, text `<utterance> <words>`, utt2spk `<utterance> <speaker>`."""
    for name in "ab":
        write(folder / f"{name}.flac")
    (folder / "wav.scp").write_text(f"a {folder}/a.flac\nb b.flac\nc /nowhere/c.flac\n")
    (folder / "text").write_text("a one two\nb\tthree\nc four\n")
    (folder / "utt2spk").write_text("a 19\nc 20\n")
    (folder / "spk2utt").write_text("19 a\n20 c\n")
    return folder


def ljspeech(folder: Path) -> Path:
    """LJSpeech: metadata.csv without header, ID|transcription|normalised transcription; wavs/ID.wav."""
    for name in "ab":
        write(folder / "wavs" / f"{name}.wav")
    lines = ['a|1 "2|one two', "b|three, they, said, loudly|three"]
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def audiofolder(folder: Path, *, suffix: str = "csv") -> Path:
    """`datasets`' audiofolder: metadata.csv or metadata.jsonl with file_name beside the files, one for each split."""
    for name in "ab":
        write(folder / "train" / "audio" / f"{name}.wav")
    rows = [
        {"file_name": "audio/a.wav", "transcription": "one two", "speaker_id": "19"},
        {"file_name": "audio/b.wav", "transcription": "three", "speaker_id": ""},
    ]
    made = [",".join(row.values()) if suffix == "csv" else json.dumps(row) for row in rows]
    made = [",".join(rows[0]), *made] if suffix == "csv" else made
    (folder / "train" / f"metadata.{suffix}").write_text("\n".join(made) + "\n")
    return folder


def audiofolder_of_json(folder: Path) -> Path:
    return audiofolder(folder, suffix="jsonl")


def audiofolder_of_parquet(folder: Path) -> Path:
    for name in "ab":
        write(folder / "audio" / f"{name}.wav")
    rows = {
        "file_name": ["audio/a.wav", "audio/b.wav"],
        "text": ["one two", "three"],
        "speaker": ["19", None],
    }
    datasets.Dataset.from_dict(rows).to_parquet(str(folder / "metadata.parquet"))
    return folder


def json_list(folder: Path) -> Path:
    path = folder / "all.json"
    rows = [
        {"audio": write(folder / "a.wav").name, "sentence": "one two", "speaker": 19},
        {"audio": write(folder / "b.wav").name, "sentence": "three"},
    ]
    path.write_text(json.dumps(rows, indent=2))
    return path


def synthesised(folder: Path) -> Path:
    """The folder that `asr-finetune synthesise` writes."""
    entries = [("a", "one two", {"speaker": "19"}), ("b", "three", {})]
    lines = []
    for name, text, more in entries:
        synth.write_wav(folder / f"{name}.wav", noise(0.5, seed=len(text)))
        lines.append({"utt_id": name, "audio": f"{name}.wav", "text": text, **more})
    manifest(folder, lines).rename(folder / "manifest.jsonl")
    return folder


@pytest.mark.parametrize(
    ("make", "split"),
    [
        (nemo, None),
        (comma_separated, None),
        (semicolons, None),
        (bars, None),
        (common_voice, "train"),
        (kaldi, None),
        (ljspeech, None),
        (audiofolder, None),
        (audiofolder, "train"),
        (audiofolder_of_json, None),
        (audiofolder_of_parquet, None),
        (json_list, None),
        (synthesised, None),
    ],
)
def test_a_format_is_read(tmp_path: Path, make: Callable[[Path], Path], split: str | None) -> None:
    corpus = read(make(tmp_path), split)
    assert texts(corpus) == {"a": "one two", "b": "three"}
    assert corpus.speakers == ([None, None] if make is ljspeech else ["19", None])
    assert [len(read_audio(item, RATE)) for item in corpus.utterances] == [
        pytest.approx(item.seconds * RATE, abs=1) for item in corpus.utterances
    ]
    assert not corpus.doubts
    lost = [make_ for make_ in (comma_separated, common_voice, kaldi) if make_ is make]
    assert [reason.partition(":")[0] for reason in reasons(corpus).values()] == ["no such file"] * len(lost)


def test_any_names_of_columns(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.wav")
    path = tmp_path / "odd.tsv"
    path.write_text("who\tpath\twords\traw\tname\n19\ta.wav\tone two\t1 2\tx\n20\tb.wav\tthree\t3\ty\n")
    named = {"text": "words", "speaker": "who", "id": "name"}
    corpus = read(path, columns=named)
    assert (texts(corpus), corpus.speakers) == ({"x": "one two", "y": "three"}, ["19", "20"])
    assert texts(read(path, columns={**named, "text": "raw"})) == {"x": "1 2", "y": "3"}
    with pytest.raises(
        ConfigError, match=r"columns={text: \?}.*columns who, path, words, raw, name: say which"
    ):
        read(path)
    with pytest.raises(ConfigError, match=r"data\.columns=.*expected a mapping with some of audio, text"):
        read(path, columns={"sentence": "words"})


def test_the_transcripts_of_ljspeech_before_normalisation(tmp_path: Path) -> None:
    assert texts(read(ljspeech(tmp_path), columns={"text": "transcription"}))["a"] == '1 "2'
    assert texts(read(tmp_path / "metadata.csv"))["a"] == "one two"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'audio,text\na.wav,"one\nb.wav,two\n',
            r"all\.csv', line \d: .*a quoted field needs a quote at both",
        ),
        ("audio\ta.wav\n", r"columns={text: \?}"),
        ("", r"columns={audio: \?}"),
    ],
)
def test_a_table_that_is_not_well_formed_is_refused(tmp_path: Path, text: str, message: str) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.wav")
    (tmp_path / "all.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read(tmp_path / "all.csv")


def test_a_row_unlike_its_header_is_left_out_by_name(tmp_path: Path) -> None:
    write(tmp_path / "a.wav")
    (tmp_path / "all.csv").write_bytes(b"audio,text\n\na.wav,one\na.wav,one,two\na.wav\na.wav,caf\xe9\n")
    corpus = read(tmp_path / "all.csv")
    assert texts(corpus) == {"a": "one"}
    assert [(item.name, item.reason) for item in corpus.problems] == [
        ("all.csv:4", "a row unlike the header: 3 fields in place of 2"),
        ("all.csv:5", "a row unlike the header: 1 fields in place of 2"),
        ("a (all.csv:6)", "a transcript that is not UTF-8: 'caf\ufffd'"),
    ]


def test_overlapping_listings_are_not_mixed(tmp_path: Path) -> None:
    """Common Voice's validated.tsv holds train.tsv, and its other files are of other quality."""
    folder = common_voice(tmp_path)
    with pytest.raises(ConfigError, match=r"has the splits train, validated, .*choose with data.train_split"):
        read(folder)
    with pytest.raises(ConfigError, match="given: dev"):
        read(folder, "dev")
    assert len(read(folder, "train+validated")) == 3


# Kaldi's commands, archives and segments


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (
            "sph2pipe -f wav a.sph |",
            r"a command in wav.scp: 'sph2pipe .* is not run: write its output to a file",
        ),
        ("data.ark:17", "an archive in wav.scp: .*wav-copy"),
        ("", "no line in wav.scp"),
    ],
)
def test_a_kaldi_entry_that_is_no_file_is_left_out_with_the_fix(
    tmp_path: Path, entry: str, reason: str
) -> None:
    folder = kaldi(tmp_path)
    (folder / "wav.scp").write_text(f"a {folder}/a.flac\nb {entry}\n")
    corpus = read(folder)
    assert list(texts(corpus)) == ["a"]
    (found,) = corpus.problems
    assert (found.id, found.place) == ("b", "wav.scp:2")
    assert re.match(reason, found.reason)


def test_a_kaldi_folder_needs_text_and_has_no_splits(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no splits"):
        read(kaldi(tmp_path), "train")
    (tmp_path / "text").unlink()
    with pytest.raises(ConfigError, match=r"Kaldi folder \(wav.scp\) without `text`"):
        read(tmp_path)


# What is not known


def test_what_is_no_known_format_is_refused_with_the_list_of_those_that_are(tmp_path: Path) -> None:
    write(tmp_path / "only" / "a.wav")
    (tmp_path / "notes.txt").write_text("a.wav one")
    for source in (tmp_path / "only", tmp_path / "only" / "a.wav", tmp_path / "notes.txt", tmp_path / "none"):
        with pytest.raises(
            ConfigError, match=r"give a LibriSpeech tree .*Kaldi.*LJSpeech.*\.parquet.*`datasets`"
        ):
            read(source)


@pytest.mark.parametrize("source", ["https://example.org/a.tar", "s3://bucket/a", "hf://datasets/a/b"])
def test_a_stream_is_refused_with_the_reason(source: str) -> None:
    with pytest.raises(ConfigError, match=f"{source}' is a stream: Poisson sampling .*N must be known"):
        load_corpus(source, data=options())


def test_a_pipe_is_a_stream_too(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "all.jsonl")
    with pytest.raises(ConfigError, match="is a stream"):
        read(tmp_path / "all.jsonl")


def test_a_streaming_data_set_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").touch()
    stream = datasets.Dataset.from_dict({"audio": ["a.wav"], "text": ["one"]}).to_iterable_dataset()
    for loaded in (stream, datasets.IterableDatasetDict({"train": stream})):
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, loaded=loaded, **__: loaded)
        with pytest.raises(ConfigError, match="is a stream: Poisson sampling"):
            read(tmp_path)
