from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asr_finetune.config.schema import Config, ConfigError
from asr_finetune.data.sources import load_corpus
from asr_finetune.planning.command import run
from asr_finetune.planning.tables import describe_probe, describe_several
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
    assert measured.total_seconds() == pytest.approx(10 * step)
    assert measured.total_seconds(4) == pytest.approx(10 * step / 4)
    # Of R devices each keeps 1/R of the sums and of the parameters, and sends the rest.
    assert measured.sent_per_step(1) == 0
    assert measured.sent_per_step(4) == 3 / 4 * 12 * measured.trained_parameters
    assert measured.seconds_per_example > 0
    assert measured.sums == 8 * measured.trained_parameters
    assert measured.optimizer >= 2 * 4 * measured.trained_parameters  # Adam's two moments
    assert measured.parameters >= 4 * measured.total_parameters > 4 * measured.trained_parameters
    assert measured.peak > 50 * 2**20  # torch alone takes more
    assert measured.seconds_of_audio < measured.longest_seconds <= 1.2
    assert not (tmp_path / "run").exists()  # no ledger: a probe spends nothing
    assert any("peak memory" in name for name, _ in describe_probe(measured))
    assert dict(describe_several(measured, 4))["  utterances of each in a step"] == "2 of 8"


@pytest.mark.parametrize("flags", [{}, {"model.name": "x", "gpu_memory": 80.0}, {"gpus": 0}])
def test_a_number_of_gpus_needs_a_measurement(flags: dict[str, Any]) -> None:
    sizes = {
        "data.train": None,
        "train.batch_size": 8,
        "train.steps": 2,
        "privacy.delta": 1e-3,
        "privacy.epsilon": 8.0,
    }
    planned = {key: flags[key] for key in ("gpu_memory", "gpus") if key in flags}
    model = {"model.name": flags.get("model.name")}
    with pytest.raises(ConfigError, match=r"--gpus \d"):
        next(run(None, sizes | model, examples=100, **{"gpus": 4, **planned}))


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
