from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from asr_finetune.config import Config, ConfigError
from asr_finetune.plain import micro_batch_limits
from asr_finetune.plan import plan, probe, subject
from asr_finetune.plan_tables import describe_probe, plan_table, size
from asr_finetune.sampling import assumed_sampling, expected_utterances, sampling_of, units
from asr_finetune.sources import load_corpus
from asr_finetune.train import train
from dpkernels.privacy import Sampling
from tests.asr import small_models, tones


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with tones.one_thread():
        yield


def sampled(count: int, batch_size: int, **privacy: Any) -> Sampling:
    values = {"model": {"name": "m"}, "data": {"train": "d"}, "output": "o", "privacy": privacy}
    return assumed_sampling(Config.from_dict({**values, "train": {"batch_size": batch_size}}), count)


def test_noise_for_the_papers_setting() -> None:
    """σ = 0.694 (dp-accounting's PLD) for ε = 10, δ = 3.52e-6, N = 281,241, batch 4096, 2000 steps."""
    made = plan(sampled(281241, 4096), epsilon=10, delta=3.52e-6, steps=2000)
    assert made.noise_multiplier == 0.694
    assert made.noise_multiplier_other is not None
    assert made.epsilon_other is not None
    assert made.noise_multiplier_other > made.noise_multiplier
    assert made.epsilon <= 10 < made.epsilon_other
    assert made.sample_rate == pytest.approx(4096 / 281241)
    assert made.epochs == pytest.approx(29.13, abs=0.01)
    steps, curve = zip(*made.epsilon_at, strict=True)
    assert steps == (200, 500, 1000, 1500, 2000)
    assert list(curve) == sorted(curve)
    assert curve[-1] == made.epsilon


def test_epsilon_for_given_noise_and_truncated_sampling() -> None:
    given: dict[str, Any] = {"noise_multiplier": 4.0, "delta": 1e-3, "steps": 20}
    by_hand = plan(sampled(200, 10), **given)
    cut = plan(sampled(200, 10, max_batch_size=29), **given)
    assert by_hand.noise_multiplier_other is None
    assert cut.epsilon_other is None  # RDP has no rule for it
    assert cut.epsilon == pytest.approx(by_hand.epsilon, rel=0.05)
    assert by_hand.to_dict()["steps"] == 20


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "exactly one of"),
        ({"epsilon": 1.0, "noise_multiplier": 1.0}, "exactly one of"),
        ({"noise_multiplier": 0.0}, "epsilon is infinite"),
    ],
)
def test_refusals(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(sampled(1000, 50), delta=1e-4, steps=20, **values)  # type: ignore[arg-type]


SPEAKERS = {"unit": "speaker", "max_examples_per_speaker": 3}


@pytest.mark.parametrize(
    ("count", "privacy", "most", "mend"),
    [
        (100, {}, 100, r"exceeds the 100 training utterances: lower it"),
        (
            4,
            SPEAKERS,
            12,
            r"exceeds 12: 3 utterances .*max_examples_per_speaker. of each of 4 .*or raise that",
        ),
    ],
)
def test_the_largest_batch(count: int, privacy: dict[str, Any], most: int, mend: str) -> None:
    assert sampled(count, most, **privacy).sample_rate == 1
    with pytest.raises(ConfigError, match=rf"train\.batch_size={most + 1} .--batch-size. {mend}"):
        sampled(count, most + 1, **privacy)


def test_probe_measures_time_and_memory(tmp_path: Path) -> None:
    tones.write_model(tmp_path / "model")
    tones.write_manifest(tmp_path, 12)
    config = Config.from_dict(tones.settings(tmp_path, method__kind="head", train__steps=10))
    recognizer, corpus = subject(config)
    assert units(config, corpus) == 12
    assert units(config.with_values("privacy", unit="speaker"), corpus) == 4
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


def test_sizes() -> None:
    assert [size(value) for value in (10, 2048, 3 * 2**20, 5 * 2**30)] == [
        "10 B",
        "2 KiB",
        "3 MiB",
        "5.00 GiB",
    ]


LENGTH: dict[str, Any] = {"delta": 1e-4, "steps": 20}


def test_the_accountant_of_the_configuration() -> None:
    sampling = sampled(1000, 50)
    pld, rdp = plan(sampling, **LENGTH, epsilon=2.0), plan(sampling, **LENGTH, epsilon=2.0, accountant="rdp")
    assert rdp.noise_multiplier == pld.noise_multiplier_other
    assert rdp.noise_multiplier_other == pld.noise_multiplier
    assert rdp.epsilon_other is not None
    assert rdp.epsilon_other < rdp.epsilon <= 2.0
    rows = plan_table(rdp)
    assert str(rows.title).startswith("ε: target 2, spends ")
    assert "noise multiplier σ (RDP)" in rows.columns[0]._cells


def test_speakers_are_called_so_and_counted_so(tmp_path: Path) -> None:
    made = plan(sampled(1000, 60, **SPEAKERS), **LENGTH, noise_multiplier=1.0)
    assert (made.units, made.sample_rate, made.per_unit) == (1000, 60 / 3000, 3)
    said = [str(cell) for cell in plan_table(made).columns[1]._cells]
    assert any("rate 0.02000 (of 1,000 speakers; of one at most 3 utterances" in cell for cell in said)
    assert any("each speaker is drawn 0.4 times" in cell for cell in said)
    tones.write_manifest(tmp_path, 10)  # 4 speakers: 3, 3, 2, 2 recordings
    changes = {f"privacy__{key}": value for key, value in SPEAKERS.items()}
    config = Config.from_dict(tones.settings(tmp_path, **changes))
    corpus = load_corpus(str(tmp_path / "tones.jsonl"), data=config.data)
    assert sampling_of(config, corpus).sample_rate == 8 / 12
    # of a speaker drawn with probability 8/12, all 3 or all 2
    assert expected_utterances(config, corpus) == pytest.approx(8 / 12 * 10)
    assert expected_utterances(config, None) == 8
    assert expected_utterances(config.with_values("privacy", max_examples_per_speaker=2), corpus) == 8
    assert expected_utterances(config.with_values("privacy", unit="example"), corpus) == 8
    with pytest.raises(ConfigError, match=r"train\.batch_size=11 .* exceeds the 10 training utterances"):
        sampling_of(config.with_values("train", batch_size=11), corpus)  # 4 · 3 of them would do


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


def test_micro_batches_are_filled_up_to_so_many_of_the_longest(tmp_path: Path) -> None:
    config = Config.from_dict(tones.settings(tmp_path, train__physical_batch_size=2)).train
    assert micro_batch_limits(config, [10, 40, 20]) == (2, None)
    filled = replace(config, fill_micro_batches=True)
    assert micro_batch_limits(filled, [10, 40, 20]) == (8, 80)  # at most the logical batch


def test_training_with_filled_micro_batches_sees_every_example_once(tmp_path: Path) -> None:
    tones.write_model(tmp_path / "model")
    tones.write_manifest(tmp_path, 12)
    changes = {
        "train__batch_size": 12,  # q = 1: every logical batch is the whole set
        "train__physical_batch_size": 2,
        "train__fill_micro_batches": True,
        "train__steps": 1,
    }
    result = train(Config.from_dict(tones.settings(tmp_path, **changes)), progress=False)
    assert [entry["examples"] for entry in result.history] == [12]
