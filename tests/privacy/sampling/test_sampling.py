"""privacy.md 10: Poisson sampling over units, truncated where batches have a capacity; never shuffling."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from dpkernels.privacy import plan_sampling
from dpkernels.privacy.rng.streams import SecretStream
from dpkernels.privacy.sampling import samplers as sampling
from dpkernels.privacy.sampling.logical_batch import micro_batches
from dpkernels.privacy.sampling.samplers import (
    ExampleSampler,
    SpeakerSampler,
    inclusion_threshold,
    poisson,
    uniform_subset,
)
from tests.privacy.private_run import KEY, losses_of, private_run, train

DRAWS = 1500


def fixed_stream() -> SecretStream:
    """With the tests' key: statistics that hold once hold always."""
    with pytest.warns(UserWarning, match="noise_key"):
        return SecretStream(KEY)


def check_poisson(sampler: ExampleSampler) -> None:
    """Every example with probability q, independently of the others and of earlier draws; sizes binomial."""
    n, q = sampler.dataset_size, sampler.sample_rate
    joined = np.zeros((DRAWS, n))
    for row in joined:
        row[sampler.draw()] = 1
    tolerance = 5 * math.sqrt(q * (1 - q) / DRAWS)
    assert np.abs(joined.mean(0) - q).max() < tolerance, "an example's probability is not q"
    pairs = joined[:, :-1] * joined[:, 1:]
    assert abs(pairs.mean() - q * q) < 5 * q * math.sqrt(1 / (DRAWS * (n - 1))) + 0.01 * q, (
        "examples join together"
    )
    sizes = joined.sum(1)
    variance = n * q * (1 - q)
    assert abs(sizes.var() / variance - 1) < 5 * math.sqrt(2 / DRAWS), "sizes are not binomial"
    again = (joined[:-1] * joined[1:]).mean()
    assert abs(again - q * q) < 5 * q * math.sqrt(1 / (DRAWS * n)) + 0.01 * q, "draws depend on each other"


def test_inclusion_is_poisson() -> None:
    check_poisson(ExampleSampler(40, 0.1, fixed_stream()))


class Shuffled(ExampleSampler):
    """The planted fault: fixed-size batches of a shuffled order."""

    def draw(self) -> np.ndarray:
        return np.random.default_rng().permutation(self.dataset_size)[
            : round(self.dataset_size * self.sample_rate)
        ]


class Rotating(ExampleSampler):
    """The planted fault: each example once an epoch, batches of varying sizes."""

    def draw(self) -> np.ndarray:
        self.phase = getattr(self, "phase", 0) + 1
        return np.flatnonzero(np.arange(self.dataset_size) % 10 == self.phase % 10)


class Contiguous(ExampleSampler):
    """The planted fault: neighbours join together."""

    def draw(self) -> np.ndarray:
        return np.concatenate(
            [[2 * i, 2 * i + 1] for i in poisson(self.dataset_size // 2, self.sample_rate, self._stream)]
            or [[]]
        ).astype(int)


@pytest.mark.parametrize("fault", [Shuffled, Rotating, Contiguous])
def test_planted_samplers_are_caught(fault: type[ExampleSampler]) -> None:
    with pytest.raises(AssertionError):
        check_poisson(fault(40, 0.1, fixed_stream()))


def test_threshold_rounds_down_exactly() -> None:
    assert inclusion_threshold(0.5) == 2**63
    assert inclusion_threshold(1.0) == 2**64
    assert inclusion_threshold(2.0**-70) == 0
    assert inclusion_threshold(0.1) == int((0.1).as_integer_ratio()[0] * 2**64 // (0.1).as_integer_ratio()[1])
    for bad in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="sample_rate"):
            inclusion_threshold(bad)


def test_rate_one_takes_everything_and_tiny_rates_nothing() -> None:
    assert poisson(9, 1.0, SecretStream()).tolist() == list(range(9))
    assert poisson(9, 1e-12, SecretStream()).tolist() == []


# --- truncated Poisson


def check_capacity(sampler: ExampleSampler, capacity: int) -> None:
    counts: Counter[int] = Counter()
    full = 0
    for _ in range(DRAWS):
        drawn = sampler.draw().tolist()
        assert len(drawn) == len(set(drawn)) <= capacity
        full += len(drawn) == capacity
        counts.update(drawn)
    assert full > DRAWS / 4
    mean = sum(counts.values()) / 20
    assert all(abs(counts[i] - mean) < 5 * math.sqrt(mean) for i in range(20)), "not a uniform subset"


def test_a_capacity_keeps_a_uniform_subset() -> None:
    check_capacity(ExampleSampler(20, 0.3, fixed_stream(), max_batch_size=6), 6)


@pytest.mark.parametrize(
    "fault", [lambda items, size, stream: items[:size], lambda items, size, stream: items]
)
def test_planted_truncation_is_caught(fault: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "uniform_subset", fault)
    with pytest.raises(AssertionError):
        check_capacity(ExampleSampler(20, 0.3, fixed_stream(), max_batch_size=6), 6)


def test_equal_words_draw_again() -> None:
    class Ties(SecretStream):
        calls = 0

        def words(self, count: int, **_: object) -> np.ndarray:
            self.calls += 1
            return (
                np.zeros(count, np.uint64)
                if self.calls == 1
                else np.arange(count, dtype=np.uint64)[::-1].copy()
            )

    stream = Ties()
    assert uniform_subset(np.arange(10, 15), 2, stream).tolist() == [13, 14]
    assert stream.calls == 2


def test_a_capacity_is_accounted_as_truncated_poisson() -> None:
    run = private_run(max_batch_size=12)
    assert type(run.engine.history[0][0].event()).__name__ == "TruncatedSubsampledGaussianDpEvent"
    assert (
        max(sum(len(b[0]) for b in logical) for logical, _ in zip(_stepping(run), range(5), strict=False))
        <= 12
    )
    with pytest.raises(ValueError, match="truncated Poisson"):
        private_run(max_batch_size=12, accountant="rdp")
    with pytest.raises(ValueError, match="below the expected"):
        private_run(max_batch_size=7)


def _stepping(run: object) -> Iterator[list]:
    for logical in run.loader:  # type: ignore[attr-defined]
        yield list(logical)
        run.optimizer._batch.examples = run.optimizer._batch.drawn  # type: ignore[attr-defined]
        run.optimizer.step()  # type: ignore[attr-defined]


# --- speakers


SPEAKERS = [f"s{i % 5}" for i in range(38)] + ["lone", "lone"]


def check_speakers(sampler: SpeakerSampler, k: int) -> None:
    together: Counter[str] = Counter()
    seen: set[int] = set()
    for _ in range(800):
        drawn = sampler.draw().tolist()
        present = Counter(SPEAKERS[i] for i in drawn)
        assert len(set(drawn)) == len(drawn)
        assert all(count <= k for count in present.values()), "more than k examples of a speaker"
        assert all(count == min(k, SPEAKERS.count(s)) for s, count in present.items()), (
            "a speaker joins in part"
        )
        together.update(present.keys())
        seen.update(drawn)
    assert len(seen) == len(SPEAKERS), "some examples are never chosen"
    for speaker in set(SPEAKERS):
        assert abs(together[speaker] / 800 - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 800), (
            "not q for each speaker"
        )


def test_speakers_are_sampled_with_at_most_k_examples() -> None:
    check_speakers(SpeakerSampler(SPEAKERS, 0.25, 3, fixed_stream()), 3)


def test_planted_example_sampling_for_speakers_is_caught() -> None:
    class Examples(SpeakerSampler):
        def draw(self) -> np.ndarray:
            return poisson(len(SPEAKERS), 0.25, self._stream)

    with pytest.raises(AssertionError):
        check_speakers(Examples(SPEAKERS, 0.25, 3, fixed_stream()), 3)


def test_examples_of_speakers_have_sensitivity_k_c() -> None:
    run = private_run(
        sigma=2.0,
        clip=0.5,
        unit="speaker",
        speakers=SPEAKERS,
        max_examples_per_speaker=3,
        clipping_unit="example",
    )
    assert run.optimizer.sensitivity == pytest.approx(3 * 0.5, rel=1e-5)
    assert run.optimizer.sensitivity > 3 * 0.5
    assert run.engine.sample_rate == 8 / (3 * 6)
    assert run.engine.sampling.units == 6
    assert len(run.loader) == round(18 / 8)
    deviations = [
        float(torch.cat([v.flatten() for v in run.release(()).values()]).square().mean().sqrt())
        for _ in range(3)
    ]
    assert np.mean(deviations) * 8 == pytest.approx(2.0 * 1.5, rel=0.05)
    train(run, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"unit": "speaker", "speakers": SPEAKERS}, "max_examples_per_speaker"),
        ({"unit": "speaker", "max_examples_per_speaker": 2}, "speakers, one id"),
        ({"unit": "speaker", "speakers": SPEAKERS[:-1], "max_examples_per_speaker": 2}, "one id"),
        ({"unit": "speaker", "speakers": SPEAKERS, "max_examples_per_speaker": 1}, "exceeds"),
        (
            {"unit": "speaker", "speakers": SPEAKERS, "max_examples_per_speaker": 3, "max_batch_size": 9},
            "max_batch_size",
        ),
        ({"unit": "person"}, "unit="),
        ({"speakers": SPEAKERS}, "unit='speaker'"),
    ],
)
def test_incomplete_units_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        private_run(**arguments)


# --- loaders that Poisson sampling cannot replace


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(4))


DATA = TensorDataset(torch.arange(20.0))


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (lambda: DataLoader(Stream(), batch_size=2), "IterableDataset"),
        (
            lambda: DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(DATA), 3, False)),
            "batch_size",
        ),
        (lambda: DataLoader(DATA, batch_size=None), "batch_size"),
        (lambda: DataLoader(DATA, batch_size=4, drop_last=True), "drop_last"),
        (lambda: DataLoader(DATA, batch_size=4, sampler=WeightedRandomSampler([1.0] * 20, 20)), "sampler"),
        (lambda: DataLoader(DATA, batch_size=21), "exceeds"),
    ],
)
def test_other_loaders_are_refused(loader: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_sampling(loader())


def test_shuffling_is_refused_not_accounted_as_poisson() -> None:
    with pytest.raises(ValueError, match="Poisson"):
        private_run(poisson_sampling=False)
    assert plan_sampling(DataLoader(DATA, batch_size=4, shuffle=True)).sample_rate == 0.2


def test_batches_from_elsewhere_are_refused() -> None:
    run = private_run()
    with pytest.raises(RuntimeError, match="loader that make_private returned"):
        run.optimizer.backward(losses_of(run.model, run.data[[0, 1]]))


# --- the loader


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_hands_out_what_was_drawn(workers: int) -> None:
    data = TensorDataset(torch.arange(60))
    drawn: list[list[int]] = []
    loader = _loader(data, workers, drawn, batch_size=1, physical=1, steps=40)
    read = [[int(i) for part in logical for i in part[0]] for logical in loader]
    assert [sorted(batch) for batch in read] == drawn
    assert len(read) == 40
    assert any(not batch for batch in read)  # fails once in 10^8 runs
    again = [[int(i) for part in logical for i in part[0]] for logical in loader]
    assert [sorted(batch) for batch in again] == drawn[40:]


def test_a_batch_left_unread_does_not_shift_the_next() -> None:
    drawn: list[list[int]] = []
    loader = _loader(TensorDataset(torch.arange(60)), 0, drawn, batch_size=20, physical=4, steps=6)
    for number, logical in enumerate(loader):
        assert len(logical) == math.ceil(len(drawn[number]) / 4)
        parts = [sorted(int(i) for i in part[0]) for part, _ in zip(logical, range(number), strict=False)]
        assert all(set(part) <= set(drawn[number]) for part in parts)


def test_a_logical_batch_is_read_once() -> None:
    loader = _loader(TensorDataset(torch.arange(60)), 0, [], batch_size=20, physical=4, steps=1)
    for logical in loader:
        list(logical)
        with pytest.raises(RuntimeError, match="read once"):
            list(logical)


def test_micro_batches_are_bounded_and_of_like_lengths() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 50)
    parts = micro_batches(np.arange(0, 50, 2), 4, lengths)
    assert sorted(i for part in parts for i in part) == list(range(0, 50, 2))
    assert all(len(part) <= 4 for part in parts)
    assert all(min(lengths[a]) >= max(lengths[b]) for a, b in pairwise(parts))
    assert micro_batches(np.array([], dtype=int), 4) == []


def _loader(
    data: TensorDataset, workers: int, drawn: list, *, batch_size: int, physical: int, steps: int
) -> object:
    from dpkernels.privacy.sampling.loader import DPDataLoader

    class Recording(ExampleSampler):
        def draw(self) -> np.ndarray:
            batch = super().draw()
            drawn.append(batch.tolist())
            return batch

    return DPDataLoader(
        DataLoader(data, batch_size=batch_size, num_workers=workers),
        Recording(len(data), batch_size / len(data), SecretStream()),
        physical_batch_size=physical,
        epoch_steps=steps,
        before_pass=lambda: None,
        on_batch=lambda examples, **_: None,
        steps_taken=lambda: 0,
    )


def test_an_epoch_is_round_one_over_q_and_steps_are_a_total() -> None:
    assert len(private_run(examples=40, batch_size=7).loader) == 6
    run = private_run(steps=5)
    assert len(run.loader) == 5
    assert train(run, 2) == 2
    assert train(run) == 3
    assert train(run) == 0
    assert run.engine.steps == 5


def test_micro_batches_within_a_frame_budget() -> None:
    lengths = np.random.default_rng(1).integers(1, 100, 60)
    drawn = np.arange(0, 60, 2)
    parts = micro_batches(drawn, 20, lengths, 200)
    assert sorted(index for part in parts for index in part) == drawn.tolist()
    assert all(len(part) * max(lengths[part]) <= 200 and len(part) <= 20 for part in parts)
    assert all(min(lengths[a]) >= max(lengths[b]) for a, b in pairwise(parts))
    assert len(parts[0]) < len(parts[-2])
    assert micro_batches(drawn, 20, lengths, 200) == parts  # a function of the batch
    assert micro_batches(drawn, 20, lengths, 1) == [[index] for part in parts for index in part]
    assert micro_batches(np.array([], dtype=int), 20, lengths, 200) == []


@pytest.mark.parametrize("kind", [np.uint8, np.uint32, np.int8, np.float32])
def test_the_frame_budget_holds_for_lengths_of_any_kind(kind: type) -> None:
    """Unsigned ones, of which minus is a large number, and fractions, say of seconds."""
    lengths = np.array([0, 9, 2, 9, 9, 5], dtype=kind)
    if kind is np.float32:
        lengths += 0.75
    parts = micro_batches(np.arange(6), 5, lengths, 19)
    assert sorted(index for part in parts for index in part) == list(range(6))
    assert all(len(part) * float(max(lengths[part])) <= 19 for part in parts)
    assert all(min(lengths[a]) >= max(lengths[b]) for a, b in pairwise(parts))
