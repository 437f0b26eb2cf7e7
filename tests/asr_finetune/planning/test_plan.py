from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from asr_finetune.config.schema import Config, ConfigError
from asr_finetune.data.sources import load_corpus
from asr_finetune.planning.command import run
from asr_finetune.planning.tables import plan_table, size
from asr_finetune.training.run import train
from asr_finetune.training.sampling import (
    assumed_sampling,
    expected_utterances,
    micro_batch_limits,
    sampling_of,
    units,
)
from dpkernels.privacy import Sampling, plan_noise
from tests.asr_finetune import tones

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with tones.one_thread():
        yield


def sampled(count: int, batch_size: int, **privacy: Any) -> Sampling:
    values = {"model": {"name": "m"}, "data": {"train": "d"}, "output": "o", "privacy": privacy}
    return assumed_sampling(Config.from_dict({**values, "train": {"batch_size": batch_size}}), count)


SPEAKERS = {"unit": "speaker", "max_examples_per_speaker": 3}


@pytest.mark.parametrize(
    ("count", "privacy", "most", "hint"),
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
def test_the_largest_batch(count: int, privacy: dict[str, Any], most: int, hint: str) -> None:
    assert sampled(count, most, **privacy).sample_rate == 1
    with pytest.raises(ConfigError, match=rf"train\.batch_size={most + 1} .--batch-size. {hint}"):
        sampled(count, most + 1, **privacy)


def test_sizes() -> None:
    assert [size(value) for value in (10, 2048, 3 * 2**20, 5 * 2**30)] == [
        "10 B",
        "2 KiB",
        "3 MiB",
        "5.00 GiB",
    ]


LENGTH: dict[str, Any] = {"delta": 1e-4, "steps": 20}


@pytest.mark.slow
def test_the_accountant_of_the_configuration() -> None:
    sampling = sampled(1000, 50)
    pld, rdp = (
        plan_noise(sampling, **LENGTH, epsilon=0.5),
        plan_noise(sampling, **LENGTH, epsilon=0.5, accountant="rdp"),
    )
    assert rdp.noise_multiplier == pld.noise_multiplier_other
    assert rdp.noise_multiplier_other == pld.noise_multiplier
    assert rdp.epsilon_other is not None
    assert rdp.epsilon_other < rdp.epsilon <= 0.5
    rows = plan_table(rdp)
    assert str(rows.title).startswith("ε: target 0.5, spends ")
    assert "noise multiplier σ (RDP)" in rows.columns[0]._cells


def test_a_plan_shares_the_noise_of_adaptive_clipping_out(monkeypatch: pytest.MonkeyPatch) -> None:
    of_one_step = plan_noise(sampled(60, 60), delta=1e-4, steps=1, noise_multiplier=1.0, accountant="rdp")
    monkeypatch.setattr("asr_finetune.planning.command.plan_noise", lambda sampling, **given: of_one_step)
    flags = {"privacy.noise_multiplier": 1.0, "privacy.delta": 1e-4, "train.batch_size": 60, "train.steps": 2}
    (table,) = run(None, flags, ["privacy.clipping=adaptive"], examples=1000)
    said = dict(zip(*(list(column._cells) for column in table.columns), strict=True))
    assert said["  of it on the sums, beside the count that moves C"] == "1.005; 5 on the count"


@pytest.mark.slow
def test_speakers_are_called_so_and_counted_so(tmp_path: Path) -> None:
    made = plan_noise(sampled(1000, 60, **SPEAKERS), **LENGTH, noise_multiplier=1.0)
    assert (made.units, made.sample_rate, made.per_unit) == (1000, 60 / 3000, 3)
    said = [str(cell) for cell in plan_table(made).columns[1]._cells]
    assert any("rate 0.02000 (of 1,000 speakers; at most 3 utterances of each" in cell for cell in said)
    assert any("each speaker is drawn 0.4 times" in cell for cell in said)
    tones.write_manifest(tmp_path, 10)  # 4 speakers: 3, 3, 2, 2 recordings
    changes = {f"privacy__{key}": value for key, value in SPEAKERS.items()}
    config = Config.from_dict(tones.settings(tmp_path, **changes))
    corpus = load_corpus(str(tmp_path / "tones.jsonl"), data=config.data)
    assert units(config, corpus) == 4
    assert units(config.with_values("privacy", enabled=False), corpus) == 10
    assert sampling_of(config, corpus).sample_rate == 8 / 12
    # of a speaker drawn with probability 8/12, all 3 or all 2
    assert expected_utterances(config, corpus) == pytest.approx(8 / 12 * 10)
    assert expected_utterances(config, None) == 8
    assert expected_utterances(config.with_values("privacy", max_examples_per_speaker=2), corpus) == 8
    assert expected_utterances(config.with_values("privacy", unit="example"), corpus) == 8
    with pytest.raises(ConfigError, match=r"train\.batch_size=11 .* exceeds the 10 training utterances"):
        sampling_of(config.with_values("train", batch_size=11), corpus)  # 4 · 3 of them would do


def test_micro_batches_are_filled_up_to_so_many_of_the_longest(tmp_path: Path) -> None:
    config = Config.from_dict(tones.settings(tmp_path, train__physical_batch_size=2)).train
    assert micro_batch_limits(config, [10, 40, 20]) == (2, None)
    filled = replace(config, fill_micro_batches=True)
    assert micro_batch_limits(filled, [10, 40, 20]) == (8, 80)  # at most the logical batch


@pytest.mark.slow
def test_training_with_filled_micro_batches_sees_every_example_once(tmp_path: Path) -> None:
    tones.write_model(tmp_path / "model")
    tones.write_manifest(tmp_path, 12)
    changes = {
        "train__batch_size": 12,  # q = 1: every logical batch is the whole set
        "train__physical_batch_size": 2,
        "train__fill_micro_batches": True,
        "train__steps": 1,
        "privacy__noise_multiplier": 4.0,
    }
    result = train(Config.from_dict(tones.settings(tmp_path, **changes)), progress=False)
    assert [entry["examples"] for entry in result.history] == [12]


@pytest.mark.slow
def test_a_plan_without_a_model_loads_no_transformers() -> None:
    size = [
        "--examples",
        "1000",
        "--noise-multiplier",
        "8",
        "--delta",
        "1e-5",
        "--batch-size",
        "10",
        "--steps",
        "5",
    ]
    code = (
        "import sys; from asr_finetune import cli; "
        f"cli.app(['plan', *{size}], standalone_mode=False); "
        "print([name for name in ('transformers', 'peft', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "rate 0.01000" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
