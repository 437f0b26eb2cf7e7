from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from asr_finetune.config.schema import ConfigError
from asr_finetune.data.sources import load_corpus, prepare_text
from tests.asr_finetune.recordings import manifest, options, read, reasons, texts, write

# Transcripts


@pytest.mark.parametrize(
    ("text", "values", "expected"),
    [
        ("  One \t two\n", {}, "One two"),
        ("One", {"text_case": "lower"}, "one"),
        ("Straße", {"text_case": "upper"}, "STRASSE"),
        ("well-known, it's “so”!", {"strip_punctuation": True}, "well known it's so"),
        ("...", {"strip_punctuation": True}, ""),
        ("a, b", {}, "a, b"),
    ],
)
def test_transcripts(text: str, values: dict[str, Any], expected: str) -> None:
    assert prepare_text(text, options(**values)) == expected


# A LibriSpeech tree


def chapter(root: Path, subset: str, speaker: str, lines: dict[str, str]) -> Path:
    folder = root / subset / speaker / "1"
    folder.mkdir(parents=True)
    listing = folder / f"{speaker}-1.trans.txt"
    listing.write_text("".join(f"{name} {text}\n" for name, text in lines.items()))
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "LibriSpeech"
    lines = {"19-1-0": "ONE TWO", "19-1-1": "LOST", "19-1-2": "", "19-1-3": "EMPTY FILE"}
    folder = chapter(root, "train-clean-100", "19", lines)
    for name in ("19-1-0", "19-1-2", "19-1-9"):
        write(folder / f"{name}.flac")
    (folder / "19-1-3.flac").touch()
    write(chapter(root, "dev-clean", "26", {"26-1-0": "THREE"}) / "26-1-0.wav")
    return root


def test_a_librispeech_tree(tree: Path) -> None:
    corpus = read(tree)
    assert texts(corpus) == {"26-1-0": "THREE", "19-1-0": "ONE TWO"}
    assert dict(zip(texts(corpus), corpus.speakers, strict=True)) == {"26-1-0": "26", "19-1-0": "19"}
    assert corpus.utterances[0].seconds == 0.5
    found = reasons(corpus)
    assert "no such file" in found["19-1-1"]
    assert found["19-1-2"] == "no transcript"
    assert "empty (0 bytes)" in found["19-1-3"]
    assert found["19-1-9"] == "no line in its listing: 19-1.trans.txt"
    assert len(found) == 4


@pytest.mark.parametrize(
    ("split", "ids"),
    [
        ("dev-clean", ["26-1-0"]),
        ("train-clean-100", ["19-1-0"]),
        ("train-clean-100+dev-clean", ["26-1-0", "19-1-0"]),
    ],
)
def test_librispeech_subsets(tree: Path, split: str, ids: list[str]) -> None:
    assert list(texts(read(tree, split))) == ids


def test_a_librispeech_subset_or_chapter_by_itself(tree: Path) -> None:
    assert list(texts(read(tree / "dev-clean"))) == ["26-1-0"]
    assert list(texts(read(tree / "dev-clean" / "26" / "1"))) == ["26-1-0"]


def test_an_unknown_subset_is_named(tree: Path) -> None:
    with pytest.raises(ConfigError, match=r"no subset 'test-other'.*there: dev-clean, train-clean-100"):
        read(tree, "test-other+dev-clean")


# A manifest


def test_a_header_that_is_not_well_formed_is_named(tmp_path: Path) -> None:
    (tmp_path / "all.csv").write_text('"audio"x,text\na.wav,a\n')
    with pytest.raises(
        ConfigError, match=r"all.csv', line 1: .*a quoted field needs a quote at both its ends"
    ):
        read(tmp_path / "all.csv")


@pytest.mark.parametrize(
    ("line", "name", "reason"),
    [
        ("{ not json", "all.jsonl:2", "not JSON: .* at column 3"),
        ("[1, 2]", "all.jsonl:2", "not a JSON object"),
        ('"text"', "all.jsonl:2", "not a JSON object"),
        ("nul\\x00\\xff", "all.jsonl:2", "not JSON"),
        ("[" * 5000, "all.jsonl:2", "not JSON: it is nested too deeply"),
        ("9" * 5000, "all.jsonl:2", "not JSON: .*digits"),
        ({"audio": "good.wav", "text": "a", "duration": 10**400}, "good", "its times are no seconds"),
        ({"audio": 300 * "a", "text": "a"}, 300 * "a", "its path cannot be a file's: File name too long"),
        ({"text": "no audio"}, "all.jsonl:2", "no `audio` path"),
        ({"audio": 3, "text": "number"}, "all.jsonl:2", "no `audio` path"),
        ({"audio": "", "text": "none"}, "all.jsonl:2", "no `audio` path"),
        ({"audio": "good.wav"}, "good", "no transcript"),
        ({"audio": "good.wav", "text": None}, "good", "no transcript"),
        ({"audio": "good.wav", "text": "  "}, "good", "no transcript"),
        ({"audio": "good.wav", "text": ["a"]}, "good", "no transcript"),
        ({"audio": "lost.wav", "text": "a", "utt_id": "named"}, "named", "no such file.*lost.wav"),
        ({"audio": "empty.wav", "text": "a"}, "empty", "empty"),
        ({"audio": "noise.wav", "text": "a"}, "noise", "unreadable audio"),
        ({"audio": "brief.wav", "text": "a"}, "brief", "too short: 0.010 s, below data.min_seconds=0.05"),
        ({"audio": "long.wav", "text": "a"}, "long", "too long: 2.000 s, above data.max_seconds=1"),
        ({"audio": "good.wav", "text": "a", "offset": 1.5}, "good", "a piece outside its recording: 1.5"),
        ({"audio": ".", "text": "a"}, "all.jsonl:2", "no such file"),
    ],
)
def test_a_damaged_line_is_named_and_stops_nothing(tmp_path: Path, line: Any, name: str, reason: str) -> None:
    write(tmp_path / "good.wav")
    write(tmp_path / "fine.wav")
    write(tmp_path / "brief.wav", 0.01)
    write(tmp_path / "long.wav", 2.0)
    (tmp_path / "empty.wav").touch()
    (tmp_path / "noise.wav").write_bytes(b"no header at all")
    good = {"audio": "good.wav", "text": "fine"}
    corpus = read(manifest(tmp_path, [good, line, "", {**good, "audio": "fine.wav"}]), max_seconds=1.0)
    assert [utterance.id for utterance in corpus.utterances] == ["good", "fine"]
    (problem,) = corpus.problems
    assert problem.id == name
    assert re.search(reason, problem.reason)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    lines = []
    for index, (split, corpus, speaker) in enumerate(
        [("train", "a", "s1"), ("train", "b", 2), ("test", "a", None), ("test", "b", "s1")]
    ):
        write(tmp_path / f"{index}.wav", seed=index)
        line = {"audio": f"{index}.wav", "text": "t", "split": split, "corpus": corpus, "utt_id": str(index)}
        lines.append(line if speaker is None else {**line, "speaker": speaker})
    return manifest(tmp_path, lines)


@pytest.mark.parametrize(
    ("split", "values", "ids"),
    [
        (None, {}, "0123"),
        ("train", {}, "01"),
        ("train+test", {"corpus": "b"}, "13"),
        (None, {"speakers": ["s1"]}, "03"),
        (None, {"speakers": [2]}, "1"),
        (None, {"exclude_speakers": ["s1"]}, "12"),
        ("test", {"exclude_speakers": ["s1", "2"]}, "2"),
    ],
)
def test_filters(mixed: Path, split: str | None, values: dict[str, Any], ids: str) -> None:
    assert "".join(texts(read(mixed, split, **values))) == ids


def test_speakers_are_text_or_unknown(mixed: Path) -> None:
    assert read(mixed).speakers == ["s1", "2", None, "s1"]


@pytest.mark.parametrize(
    ("split", "values", "message"),
    [
        ("valid", {}, r"split='valid'.*splits there: test, train; corpora: a, b"),
        ("train", {"corpus": "c"}, r"data\.corpus='c'"),
        (None, {"speakers": ["nobody"]}, "no recordings match"),
        (None, {"min_seconds": 5.0}, r"all 4 recordings were left out.*\n  0 \(all\.jsonl:1\): too short"),
    ],
)
def test_nothing_left_is_refused_with_the_reason(
    mixed: Path, split: str | None, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(mixed, split, **values)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./none", "is not there, or nothing that is known here: give a LibriSpeech tree"),
        ("/nowhere/at/all", "is not there, or nothing that is known here: give a LibriSpeech tree"),
        ("nowhere.jsonl", "no manifest at 'nowhere.jsonl'"),
    ],
)
def test_no_such_source(source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_corpus(source, data=options())


# What ends a line, what names a recording


def test_only_line_feeds_end_a_manifests_line(tmp_path: Path) -> None:
    write(tmp_path / "a.wav")
    write(tmp_path / "b.wav")
    path = tmp_path / "all.jsonl"
    text = '{"audio": "a.wav", "text": "one\u2028two\u0085three"}\r\n{"audio": "b.wav", "text": "four"}\r\n'
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    corpus = read(path)
    assert texts(corpus) == {"a": "one two three", "b": "four"}
    assert not corpus.problems


def test_only_line_feeds_end_a_transcripts_line(tmp_path: Path) -> None:
    folder = chapter(tmp_path, "dev", "26", {"26-1-0": "ONE\u2028TWO", "26-1-1": "THREE"})
    listing = folder / "26-1.trans.txt"
    listing.write_bytes(b"\xef\xbb\xbf" + listing.read_bytes())
    write(folder / "26-1-0.flac")
    write(folder / "26-1-1.flac")
    corpus = read(tmp_path)
    assert texts(corpus) == {"26-1-0": "ONE TWO", "26-1-1": "THREE"}
    assert not corpus.problems


@pytest.mark.parametrize("inside", ["dev-clean", "dev-clean/26", "dev-clean/26/1"])
def test_a_tree_is_read_from_inside(tree: Path, monkeypatch: pytest.MonkeyPatch, inside: str) -> None:
    monkeypatch.chdir(tree / inside)
    corpus = read(Path("."))
    assert (list(texts(corpus)), corpus.speakers) == (["26-1-0"], ["26"])
    assert texts(read(Path("."), "dev-clean")) == texts(corpus)


def test_problems_say_the_line_where_ids_collide(tmp_path: Path) -> None:
    write(tmp_path / "a.wav")
    line = {"audio": "lost.wav", "text": "x", "utt_id": "same"}
    corpus = read(manifest(tmp_path, [{**line, "audio": "a.wav"}, line, {**line, "text": None}]))
    assert [problem.name for problem in corpus.problems] == ["same (all.jsonl:2)", "same (all.jsonl:3)"]
