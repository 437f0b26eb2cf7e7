"""`python -m bench.asr.data`: what it counts, and how little of length-bucketed micro-batches is padding."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from asr_finetune.config.schema import DataConfig
from asr_finetune.data.sources import load_corpus
from bench.asr import data
from tests.asr_finetune.models.test_whisper_real import BESIDE


@pytest.fixture
def manifest() -> str:
    path = Path(os.environ.get("DPKERNELS_TEST_SPEECH", BESIDE)) / "manifest.jsonl"
    if not path.is_file():
        pytest.skip(f"no recordings: there is no {path}; set DPKERNELS_TEST_SPEECH")
    return str(path)


def test_durations_are_like_librispeech_s() -> None:
    seconds = data.librispeech_like_seconds(20_000)
    assert seconds.mean() == pytest.approx(12.3, abs=0.2)
    assert (seconds.min(), seconds.max()) == (1.4, pytest.approx(24.5, abs=1))
    assert 0.5 < np.mean((seconds > 12) & (seconds < 17)) < 0.8


def test_micro_batches_of_like_lengths_are_hardly_padded() -> None:
    found = data.padding(data.librispeech_like_seconds(20_000), 1024, 16, draws=3)
    assert found["as drawn"]["padding"] > 0.2
    assert found["by length"]["padding"] < 0.03
    assert found["by length, frame budget"]["padding"] < 0.05
    assert found["by length, frame budget"]["micro_batches"] < 0.7 * found["by length"]["micro_batches"]


def test_padding_of_real_utterances(manifest: str) -> None:
    corpus = load_corpus(manifest, data=DataConfig(train="unused", corpus="librispeech"))
    seconds = np.array([utterance.seconds for utterance in corpus.utterances])
    found = data.padding(seconds, 36, 4)
    assert found["by length"]["padding"] < 0.6 * found["as drawn"]["padding"]
    assert found["by length, frame budget"]["micro_batches"] < found["by length"]["micro_batches"]


@pytest.mark.slow
def test_the_command_writes_rates_and_padding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "data.json"
    data.main(["--count", "6", "--batch", "64", "--width", "4", "--output", str(output)])
    found = json.loads(output.read_text())["corpora"]["generated"]
    speeds = found["utterances_per_second_and_core"]
    assert set(speeds) == {"decode", "features", "computed", "cached", "received"}
    assert speeds["cached"] > speeds["computed"]
    assert found["utterances_in_a_cache"] > 1000
    assert json.loads(capsys.readouterr().out)["librispeech_like_padding"]["by length"]["padding"] < 0.1
