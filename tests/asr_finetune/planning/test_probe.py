from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from asr_finetune.config.schema import Config, ConfigError
from asr_finetune.data.sources import load_corpus
from asr_finetune.planning.tables import describe_probe
from asr_finetune.planning.timing import probe
from asr_finetune.training.setup import recognizer_of
from tests.asr_finetune import small_models, tones


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with tones.one_thread():
        yield


def test_probe_measures_time_and_memory(tmp_path: Path) -> None:
    tones.write_model(tmp_path / "model")
    tones.write_manifest(tmp_path, 12)
    config = Config.from_dict(tones.settings(tmp_path, method__kind="head", train__steps=10))
    recognizer = recognizer_of(config)
    corpus = load_corpus(config.data.train, data=config.data)
    measured = probe(config, recognizer, corpus)
    step = measured.seconds_per_step + 8 * measured.seconds_per_example
    assert measured.total_seconds == pytest.approx(10 * step)
    assert measured.seconds_per_example > 0
    assert measured.sums == 8 * measured.trained_parameters
    assert measured.optimizer >= 2 * 4 * measured.trained_parameters  # Adam's two moments
    assert measured.parameters >= 4 * measured.total_parameters > 4 * measured.trained_parameters
    assert measured.peak > 50 * 2**20  # torch alone takes more
    assert measured.seconds_of_audio < measured.longest_seconds <= 1.2
    assert not (tmp_path / "run").exists()  # no ledger: a probe spends nothing
    assert any("peak memory" in name for name, _ in describe_probe(measured))


@pytest.mark.filterwarnings("error:no self_check")
def test_a_probe_stays_within_the_models_window(folders: dict[str, Path], tmp_path: Path) -> None:
    recognizer = small_models.load(folders["whisper"])
    config = Config.from_dict(tones.settings(tmp_path, method__kind="head"))
    with pytest.raises(
        ConfigError, match=r"--seconds 2 is longer than the model's window of 1 s.*window_seconds"
    ):
        probe(config, recognizer, seconds=2.0)
    measured = probe(config, recognizer)
    assert measured.seconds_of_audio == 1.0
    assert any("self-check" in value for _, value in describe_probe(measured))
