from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from asr_finetune.config import Config, ConfigError
from asr_finetune.plan import describe_probe, plan, probe, size, subject, units
from tests.asr import tones


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with tones.one_thread():
        yield


def test_noise_for_the_papers_setting() -> None:
    """σ = 0.694 (dp-accounting's PLD) for ε = 10, δ = 3.52e-6, N = 281,241, batch 4096, 2000 steps."""
    made = plan(examples=281241, epsilon=10, delta=3.52e-6, batch_size=4096, steps=2000)
    assert made.noise_multiplier == 0.694
    assert made.noise_multiplier_rdp is not None
    assert made.epsilon_rdp is not None
    assert made.noise_multiplier_rdp > made.noise_multiplier
    assert made.epsilon <= 10 < made.epsilon_rdp
    assert made.sample_rate == pytest.approx(4096 / 281241)
    assert made.epochs == pytest.approx(29.13, abs=0.01)
    steps, curve = zip(*made.epsilon_at, strict=True)
    assert steps == (200, 500, 1000, 1500, 2000)
    assert list(curve) == sorted(curve)
    assert curve[-1] == made.epsilon


def test_epsilon_for_given_noise_and_truncated_sampling() -> None:
    given = {"examples": 200, "noise_multiplier": 4.0, "delta": 1e-3, "batch_size": 10, "steps": 20}
    by_hand = plan(**given)  # type: ignore[arg-type]
    cut = plan(**given, max_batch_size=29)  # type: ignore[arg-type]
    assert by_hand.noise_multiplier_rdp is None
    assert cut.epsilon_rdp is None  # RDP has no rule for it
    assert cut.epsilon == pytest.approx(by_hand.epsilon, rel=0.05)
    assert by_hand.to_dict()["steps"] == 20


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "exactly one of"),
        ({"epsilon": 1.0, "noise_multiplier": 1.0}, "exactly one of"),
        ({"noise_multiplier": 0.0}, "epsilon is infinite"),
        ({"epsilon": 1.0, "batch_size": 2000}, "between 1 and --examples 1000"),
    ],
)
def test_refusals(values: dict[str, float], message: str) -> None:
    arguments = {"examples": 1000, "delta": 1e-4, "batch_size": 50, "steps": 20, **values}
    with pytest.raises(ConfigError, match=message):
        plan(**arguments)  # type: ignore[arg-type]


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
