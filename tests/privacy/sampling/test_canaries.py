"""privacy.md 26: an absent canary is never trained on, and nothing else depends on the coins."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from dpkernels.auditing import CanaryDataset, draw_coins
from dpkernels.privacy import PrivacyEngine, plan_sampling, read_ledger
from dpkernels.privacy.rng.streams import SecretStream
from dpkernels.privacy.sampling.canaries import PresentSampler, check_one_process, coins_of
from dpkernels.privacy.sampling.samplers import ExampleSampler
from tests.privacy.private_run import KEY, Net, losses_of

ORDINARY, CANARIES = 20, 12
COINS = np.arange(CANARIES) % 3 == 0


class Watched(Dataset[Any]):
    """Examples of Net, of 2 to 5 frames, that note which of them were read."""

    def __init__(self, size: int = ORDINARY + CANARIES) -> None:
        generator = torch.Generator().manual_seed(7)
        self.rows = torch.randn(size, 4, 6, generator=generator)
        self.read: set[int] = set()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.read.add(int(index))
        return self.rows[index], index % 3


def engine_on(dataset: Any, *, ledger: Path | None = None, batch_size: int = 16, **options: Any) -> Any:
    torch.manual_seed(1)
    model = Net()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="noise_key")
        engine = PrivacyEngine(noise_key=KEY, ledger=ledger)
    arguments = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "steps": 12} | options
    return engine, engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(dataset, batch_size=batch_size),
        **arguments,
    )


def train(made: Any) -> None:
    model, optimizer, loader = made
    for logical_batch in loader:
        for batch in logical_batch:
            optimizer.backward(losses_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()


def of_coins(coins: np.ndarray = COINS) -> tuple[CanaryDataset, set[int]]:
    dataset = CanaryDataset(Watched(), coins)
    return dataset, {ORDINARY + int(place) for place in np.flatnonzero(~coins)}


def test_an_absent_canary_is_never_read_and_every_present_one_is() -> None:
    dataset, absent = of_coins()
    _, made = engine_on(dataset, physical_batch_size=4)
    train(made)
    assert dataset.dataset.read == set(range(len(dataset))) - absent


def test_the_present_are_drawn_as_without_coins() -> None:
    """The draw over all places, without those of the absent: each present example joins with the same q."""
    size = ORDINARY + CANARIES
    dataset, absent = of_coins()
    streams = [SecretStream.with_secret(KEY, fixed=True) for _ in range(2)]
    whole, present = (ExampleSampler(size, 0.4, stream) for stream in streams)
    sampler = PresentSampler(present, dataset)
    for _ in range(20):
        assert sampler.draw().tolist() == [index for index in whole.draw() if index not in absent]


def test_size_rate_and_ledger_are_the_same_for_all_coins(tmp_path: Path) -> None:
    seen = []
    for number, coins in enumerate((COINS, ~COINS, np.zeros(CANARIES, bool))):
        path = tmp_path / f"{number}.jsonl"
        engine, made = engine_on(of_coins(coins)[0], ledger=path)
        engine.close()
        (run,) = read_ledger(path).runs
        settings = {key: value for key, value in run.settings.items() if key not in ("run", "date")}
        seen.append((engine.sampling, run.mechanism, settings, made[1].expected_batch_size))
    assert seen[0] == seen[1] == seen[2]
    sampling, _, settings, divisor = seen[0]
    assert sampling == plan_sampling(DataLoader(Watched(), batch_size=16))
    assert (settings["canaries"], settings["dataset_size"], divisor) == (CANARIES, ORDINARY + CANARIES, 16)


def test_coins_are_fair_and_fresh() -> None:
    stream = SecretStream.with_secret(KEY, fixed=True)
    draws = [coins_of(1000, stream) for _ in range(4)]
    assert len({draw.tobytes() for draw in draws}) == 4
    heads = sum(int(draw.sum()) for draw in draws)
    assert stats.binom.ppf(1e-6, 4000, 0.5) < heads < stats.binom.ppf(1 - 1e-6, 4000, 0.5)
    torch.manual_seed(0)
    np.random.seed(0)
    first = draw_coins(128)
    torch.manual_seed(0)
    np.random.seed(0)
    assert (draw_coins(128) != first).any()


def test_the_coins_have_a_stream_of_their_own() -> None:
    """Else a coin would say whether its example joins a batch."""
    streams = [SecretStream.with_secret(KEY, fixed=True) for _ in range(2)]
    joins = ExampleSampler(256, 0.5, streams[0]).draw()
    assert not np.array_equal(np.flatnonzero(coins_of(256, streams[1])), joins)


def test_reading_an_absent_canary_raises_and_its_source_can_be_read() -> None:
    dataset, absent = of_coins()
    first = min(absent)
    for read in (lambda: dataset[first], lambda: dataset.__getitems__([0, first])):
        with pytest.raises(RuntimeError, match="examples were asked for, among them a canary") as error:
            read()
        assert not {int(number) for number in re.findall(r"\d+", str(error.value))} & absent
    assert dataset.dataset[first][1] == first % 3
    assert len(dataset.__getitems__([0, ORDINARY])) == 2


def test_where_a_wrapper_hides_the_coins_training_stops() -> None:
    dataset, _ = of_coins(np.zeros(CANARIES, bool))
    _, made = engine_on(Subset(dataset, range(len(dataset))))
    with pytest.raises(RuntimeError, match="a canary that its coin left out"):
        train(made)


@pytest.mark.parametrize("known", [True, False], ids=["lengths", "measured"])
def test_the_self_check_reads_no_absent_canary(known: bool) -> None:
    dataset, absent = of_coins()
    lengths = [1 + (index in absent) for index in range(len(dataset))] if known else None
    engine, _ = engine_on(dataset, lengths=lengths)
    dataset.dataset.read.clear()
    engine.self_check(losses_of, samples=2)
    assert dataset.dataset.read
    assert not dataset.dataset.read & absent


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": "speaker", "speakers": list(range(32)), "max_examples_per_speaker": 1}, "unit='speaker'"),
        ({"max_batch_size": 30}, "max_batch_size=30"),
    ],
)
def test_what_would_be_another_claim_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{message} with a CanaryDataset"):
        engine_on(of_coins()[0], **options)


def test_several_processes_are_refused() -> None:
    with pytest.raises(ValueError, match="with 2 processes"):
        check_one_process(of_coins()[0], 2)
    check_one_process(of_coins()[0], 1)
    check_one_process(Watched(), 2)


def test_repetitions_are_seen_through_it() -> None:
    data = TensorDataset(torch.randn(8, 4, 6), torch.zeros(8, dtype=torch.long))
    twice = ConcatDataset([data, Subset(data, [3])])
    with pytest.raises(ValueError, match="repetitions"):
        engine_on(CanaryDataset(twice, np.array([True])), batch_size=4)


@pytest.mark.parametrize(
    ("coins", "message"),
    [
        ([1, 0], "expected a bool for each canary"),
        (np.zeros(0, bool), "from 1 to all 32"),
        (np.ones(33, bool), "from 1 to all 32"),
        (np.zeros(32, bool), "no example is present"),
    ],
)
def test_coins_of_another_kind_are_refused(coins: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CanaryDataset(Watched(), coins)


def test_an_audit_without_canaries_is_refused() -> None:
    with pytest.raises(ValueError, match="canaries=0"):
        draw_coins(0)
