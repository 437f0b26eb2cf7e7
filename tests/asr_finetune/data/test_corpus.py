from __future__ import annotations

from pathlib import Path

import pytest
import torch

from asr_finetune.config.schema import ConfigError
from asr_finetune.console import Reporter
from asr_finetune.data.corpus import Corpus
from asr_finetune.data.utterance import Problem
from asr_finetune.models.loading import Recognizer
from asr_finetune.models.recognizer import fit
from asr_finetune.models.whisper import WhisperRecognizer
from asr_finetune.training.setup import load as load_for
from tests.asr_finetune import small_models
from tests.asr_finetune.recordings import manifest, options, read, reasons, utterance, write


@pytest.fixture(scope="module")
def parakeet(folders: dict[str, Path]) -> Recognizer:
    return small_models.load(folders["parakeet"])


def test_ids_of_several_recordings_are_noted_and_kept(tmp_path: Path) -> None:
    """Whether one is there may not change what becomes of another."""
    lines = [{"audio": write(tmp_path / f"{n}.wav").name, "text": "x", "utt_id": "same"} for n in "ab"]
    corpus = read(manifest(tmp_path, lines))
    assert len(corpus) == 2
    (note,) = corpus.notes
    assert "1 ids belong to more than one recording" in note
    assert note in corpus.summary()
    assert not read(manifest(tmp_path, lines[:1])).notes


def test_the_summary_groups_what_was_left_out_by_kind() -> None:
    """Names of options, files and words in the reasons are neither grouped by nor mangled."""
    problems = [
        *(Problem(str(n), f"too short: 0.0{n} s, below data.min_seconds=0.05") for n in (1, 2)),
        Problem("x", "no such file: /a/b c.wav"),
        *(
            Problem(word, f"not in the vocabulary: '{word}'; see data.text_case")
            for word in ("A", "B.C", "D's")
        ),
    ]
    corpus = Corpus([utterance("a", seconds=90.0)], problems, "src")
    assert corpus.summary() == (
        "1 utterances, 1.5 min, speakers unknown\n"
        "6 left out: 3 × not in the vocabulary; 2 × too short; 1 × no such file"
    )
    assert corpus.hours == 90 / 3600


def test_reasons_begin_with_their_kind(parakeet: Recognizer, folders: dict[str, Path]) -> None:
    whisper = small_models.load(folders["whisper"])
    found = [
        parakeet.audio_problem(utterance("a", seconds=0.01)),
        parakeet.text_problem(utterance("a", "low WARP")),
        parakeet.text_problem(utterance("a", " ".join(["low"] * 30))),
        whisper.audio_problem(utterance("a", seconds=1.5)),
        whisper.text_problem(utterance("a", "low " * 30)),
    ]
    assert [Problem("a", reason or "").kind for reason in found] == [
        "too short for the model",
        "not in the vocabulary",
        "no CTC alignment",
        "longer than the encoder's window",
        "too many tokens",
    ]


# What a recogniser cannot take


def test_what_the_recognizer_cannot_take_is_left_out_by_name(parakeet: Recognizer) -> None:
    corpus = Corpus(
        [
            utterance("good"),
            utterance("brief", seconds=0.01),
            utterance("unknown", "low WARP"),
            utterance("crowded", " ".join(["low"] * 30)),
        ],
        [Problem("before", "no such file")],
    )
    fitted = fit(corpus, parakeet)
    assert [item.id for item in fitted.utterances] == ["good"]
    found = reasons(fitted)
    assert list(found) == ["before", "brief", "unknown", "crowded"]
    assert "too short" in found["brief"]
    assert "not in the vocabulary: 'WARP'" in found["unknown"]
    assert "no CTC alignment" in found["crowded"]
    # A test set keeps the transcripts that cannot be learnt: they are errors of the recogniser.
    tested = fit(corpus, parakeet, training=False)
    assert [item.id for item in tested.utterances] == ["good", "unknown", "crowded"]


@pytest.mark.parametrize(
    ("family", "text", "reason"),
    [
        ("parakeet", "low <pad> high", "the blank as a label: '<pad>' in the transcript"),
        ("parakeet", "low <unk>", "not in the vocabulary: '<unk>'"),
        ("wav2vec2", "low <pad> high", "not in the vocabulary: '<pad>'"),
        ("wav2vec2-bert", "<s> low </s>", "not in the vocabulary: '<s>, </s>'"),
        ("wav2vec2", "low <unk>", "not in the vocabulary: '<unk>'"),
        ("wav2vec2", "low|high", "the tokenizer's space symbol in the transcript: '|'"),
    ],
)
def test_literal_special_tokens_are_left_out_by_name(
    folders: dict[str, Path], family: str, text: str, reason: str
) -> None:
    recognizer = small_models.load(folders[family])
    corpus = Corpus([utterance("good", seconds=1.0), utterance("odd", text, seconds=1.0)])
    found = reasons(fit(corpus, recognizer))
    assert list(found) == ["odd"]
    assert found["odd"].startswith(reason)


def test_a_literal_special_token_is_text_to_whisper(folders: dict[str, Path]) -> None:
    """Its tokenizer can spell it."""
    recognizer = small_models.load(folders["multilingual"])
    assert isinstance(recognizer, WhisperRecognizer)
    labels = recognizer.encode_text(" <|de|>low<|endoftext|>").tolist()
    added = set(recognizer.tokenizer.get_added_vocab().values())
    assert not added & set(labels[:-1])
    assert recognizer.text_problem(utterance("odd", "<|de|> low <|endoftext|>")) is None
    german, end = recognizer.tokenizer.convert_tokens_to_ids(["<|de|>", "<|endoftext|>"])
    for label in (german, end):
        problem = recognizer.label_problem(torch.tensor([labels[0], label, end]))
        assert problem is not None
        assert problem.startswith("a special token as a label: ['<|")
    assert recognizer.label_problem(torch.tensor(labels)) is None


CTC = [family for family in small_models.FAMILIES if family != "whisper"]


@pytest.mark.thinned(5)
@pytest.mark.parametrize(
    ("family", "new_head"), [*((f, False) for f in small_models.FAMILIES), *((f, True) for f in CTC)]
)
def test_other_texts_have_the_labels_that_they_had(
    folders: dict[str, Path], family: str, new_head: bool
) -> None:
    new = {"new_head": True, "vocabulary": "characters"} if new_head else {}
    recognizer = small_models.load(folders[family], **new)
    for text in ("low high", " low  high ", "lowhigh", "l o w", "it's 5", "wow, low. High!", ""):
        plain = recognizer.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert recognizer.encode_text(text).tolist()[: len(plain)] == plain


def test_whisper_leaves_out_what_its_window_does_not_hold(folders: dict[str, Path]) -> None:
    recognizer = small_models.load(folders["whisper"])
    fitted = fit(Corpus([utterance("fits", seconds=1.0), utterance("long", seconds=1.01)]), recognizer)
    assert [item.id for item in fitted.utterances] == ["fits"]
    assert "raise model.window_seconds" in reasons(fitted)["long"]


def test_nothing_left_is_refused_with_names(parakeet: Recognizer) -> None:
    with pytest.raises(ConfigError, match=r"all 1 recordings were left out(.|\n)*unknown: not in the vocab"):
        fit(Corpus([utterance("unknown", "WARP")], source="here"), parakeet)


def test_what_does_not_decode_is_found_by_reading_it(tmp_path: Path) -> None:
    for name in ("good", "cut"):
        write(tmp_path / f"{name}.flac", 2.0)
    cut = tmp_path / "cut.flac"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    lines = [{"audio": f"{name}.flac", "text": "low"} for name in ("good", "cut")]
    corpus = read(manifest(tmp_path, lines))
    assert len(corpus) == 2  # the header says nothing
    decoded = corpus.decoded(Reporter(False), "audio")
    assert [item.id for item in decoded.utterances] == ["good"]
    assert "unreadable audio" in reasons(decoded)["cut"]


def test_loading_says_what_was_left_out(
    tmp_path: Path, parakeet: Recognizer, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a.wav")
    lines = [{"audio": "a.wav", "text": "low", "utt_id": "good"}]
    lines += [{"audio": "lost.wav", "text": "low", "utt_id": f"lost{index}"} for index in range(12)]
    load_for(str(manifest(tmp_path, lines)), None, options(), Reporter(True), "train", parakeet)
    said = " ".join(capsys.readouterr().out.split())
    assert "train: 1 utterances" in said
    assert "12 left out: 12 × no such file" in said
    assert "left out lost0 (all.jsonl:2): no such file" in said
    assert "lost9" in said
    assert "lost10" not in said
    assert "and 2 more" in said
