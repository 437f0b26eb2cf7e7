"""The synthesiser: real audio, the same every time, and errors that say what to do."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr_finetune.config.schema import DataConfig
from asr_finetune.console import Reporter
from asr_finetune.data.sources import load_corpus
from asr_finetune.demo.synth import SAMPLING_RATE, SynthesisError, Voice, speak, synthesise, write_wav

# Noise-based voices are where espeak-ng's hidden state shows most.
VOICES = [Voice("en-us"), Voice("en+f3", rate=260, pitch=80), Voice("en-us+whisper"), Voice("en+klatt4")]


needs_espeak = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None,
    reason="espeakng-loader (the demo extra) is not installed",
)


@needs_espeak
@pytest.mark.parametrize("voice", VOICES, ids=str)
def test_sound(voice: Voice) -> None:
    """Speech-like: right length, not silent, within range."""
    short, long = synthesise(["one", "one two three four five six"], voice)
    for samples in (short, long):
        assert samples.dtype == np.float32
        assert samples.ndim == 1
        assert 0.02 < float(np.sqrt(np.mean(samples**2))) < 0.5
        assert np.abs(samples).max() <= 1.0
    assert 0.15 < len(short) / SAMPLING_RATE < 1.5
    assert len(long) > 2 * len(short)


@needs_espeak
@pytest.mark.parametrize("voice", VOICES, ids=str)
def test_what_was_spoken_before_changes_nothing(voice: Voice) -> None:
    texts = ["three one four", "one five nine"]
    first = synthesise(texts, voice)
    synthesise(["nine nine nine"] * 3, Voice("en+m3", rate=300))
    again = synthesise(texts, voice)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)


@needs_espeak
def test_a_manifest_of_public_sentences(tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("One two.\n\n  three   four \n")
    manifest, count = speak(texts, tmp_path / "speech", 3)
    corpus = load_corpus(str(manifest), split=None, data=DataConfig(train=str(manifest)))
    assert count == len(corpus) == 6
    by_folder = load_corpus(str(tmp_path / "speech"), split=None, data=DataConfig(train="speech"))
    assert by_folder.utterances == corpus.utterances
    assert {utterance.text for utterance in corpus.utterances} == {"One two.", "three four"}
    assert len(set(corpus.speakers)) == 3
    assert corpus.decoded(Reporter(False), "").problems == []
    with pytest.raises(ValueError, match="is there already"):
        speak(texts, tmp_path / "speech", 3)


@pytest.mark.parametrize(
    ("text", "voices", "message"),
    [(None, 1, "no such file"), ("\n", 1, "no sentence"), ("a", 99, "--voices 99")],
)
def test_nothing_to_speak_is_named(tmp_path: Path, text: str | None, voices: int, message: str) -> None:
    if text is not None:
        (tmp_path / "texts.txt").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        speak(tmp_path / "texts.txt", tmp_path / "speech", voices)


@needs_espeak
def test_voices_rates_and_pitches_differ() -> None:
    base = synthesise(["seven"], Voice("en-us"))[0]
    assert len(synthesise(["seven"], Voice("en-us", rate=350))[0]) < 0.8 * len(base)
    for other in (Voice("en-us", pitch=95), Voice("en-us+whisper"), Voice("en-029")):
        samples = synthesise(["seven"], other)[0]
        size = min(len(samples), len(base))
        assert np.abs(samples[:size] - base[:size]).mean() > 0.01


@needs_espeak
def test_wav_round_trip(tmp_path) -> None:
    samples = synthesise(["two"], Voice("en-us"))[0]
    write_wav(tmp_path / "two.wav", samples)
    read, rate = soundfile.read(tmp_path / "two.wav", dtype="float32")
    assert rate == SAMPLING_RATE
    assert soundfile.info(tmp_path / "two.wav").subtype == "PCM_16"
    np.testing.assert_allclose(read, samples, atol=2**-15)


@needs_espeak
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("en+klat", "no variant 'klat'.*klatt"),
        ("qq", "no language 'qq'.*'en'"),
        ("qq+f3", "no language 'qq'"),
    ],
)
def test_unknown_voice_is_refused(name: str, message: str) -> None:
    with pytest.raises(SynthesisError, match=message):
        synthesise(["one"], Voice(name))


def test_values_outside_their_limits_are_refused() -> None:
    with pytest.raises(ValueError, match="rate=20: espeak-ng takes 80 to 450"):
        Voice("en", rate=20)
    with pytest.raises(ValueError, match=r"texts\[1\]=' '"):
        synthesise(["one", " "], Voice("en"))


def test_missing_extra_names_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(SynthesisError, match=r"pip install 'dpkernels\[demo\]'"):
        synthesise(["one"], Voice("en"))
