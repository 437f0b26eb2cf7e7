"""privacy.md 1, 3, 6, 10: speakers clipped as speakers. One speaker changes the sum by at most C, not k·C."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dpkernels import PrivacyEngine
from dpkernels.privacy import back_propagate
from dpkernels.privacy.sampling.units import Units
from dpkernels.privacy.self_check.findings import SelfCheckError
from tests.privacy.private_run import Net, Run, norm_of, private_run
from tests.privacy.strategy_models import KINDS, auto_materialises, small
from tests.slow import covering

K = 3
SPEAKERS = [f"s{number}" for number in range(8) for _ in range(5)]
"""Of 40 examples: five of each of eight speakers."""
COUNTS = (3, 3, 1, 2, 3, 2, 0, 1)
"""How many of each are in the logical batch of these tests."""
STRATEGIES = ("bookkeeping", "mixed", "two_pass", "per_layer", "auto")
FLAT = tuple(name for name in STRATEGIES if name != "per_layer")


@pytest.fixture(autouse=True)
def auto_materialises_small_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    auto_materialises(monkeypatch)


def speaker_run(**arguments: Any) -> Run:
    of_speakers = {"unit": "speaker", "speakers": SPEAKERS, "max_examples_per_speaker": K}
    arguments = of_speakers | {"clipping_unit": "speaker"} | arguments
    return private_run(**{"sigma": 0, "clip": 0.5, "batch_size": 12, "physical_batch_size": 6} | arguments)


def drawn() -> np.ndarray:
    return np.concatenate([5 * speaker + np.arange(count) for speaker, count in enumerate(COUNTS)])


def batch_of(run: Run, indices: np.ndarray) -> Any:
    """The loader's logical batch of these examples, as if the sampler had drawn them."""
    run.loader._sampler = type("Drawn", (), {"draw": staticmethod(lambda: indices)})()
    return next(iter(run.loader))


def take(run: Run, logical: Any) -> dict[str, Tensor]:
    """A step over a logical batch: the released gradient, in float64."""
    for batch in logical:
        run.optimizer.backward(run.loss_fn(run.model, batch))
    run.optimizer.step()
    released = {name: p.grad.double() for name, p in run.model.named_parameters() if p.requires_grad}
    run.optimizer.zero_grad()
    return released


def speaker_gradients(run: Run, indices: np.ndarray) -> list[dict[str, Tensor]]:
    """The gradient of each speaker's summed losses, in float64, by plain autograd."""
    rows = run.gradients(indices.tolist())
    speakers = [SPEAKERS[index] for index in indices]
    return [
        {
            name: sum(row[name] for row, of in zip(rows, speakers, strict=True) if of == speaker)
            for name in rows[0]
        }
        for speaker in dict.fromkeys(speakers)
    ]


def clipped_sum(run: Run, indices: np.ndarray) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for gradient in speaker_gradients(run, indices):
        factor = min(1.0, run.optimizer.max_grad_norm / norm_of(gradient))
        for name, part in gradient.items():
            total[name] = total.get(name, 0) + factor * part
    return total


def check_clipped_sum(run: Run) -> None:
    expected = clipped_sum(run, drawn())
    released = take(run, batch_of(run, drawn()))
    for name, total in expected.items():
        torch.testing.assert_close(
            released[name], total / 12, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("strategy", "kind", "clip"), covering(FLAT, KINDS, [1e-3, 0.5, 100.0]), ids=str)
def test_the_sum_is_that_of_speakers_one_by_one(strategy: str, kind: str, clip: float) -> None:
    check_clipped_sum(speaker_run(clip=clip, strategy=strategy, model=small(kind)))


class Zoo(nn.Module):
    """Layers whose records have each another form: convolutions, attention, recurrence, norms, tables, scalars."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 4, 3, padding=1)
        self.depthwise = nn.Conv1d(4, 4, 3, stride=2, padding=1, groups=4, bias=False)
        self.grouped = nn.Conv1d(4, 6, 2, padding=1, groups=2)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.lstm = nn.LSTM(6, 5, batch_first=True)
        self.norm = nn.GroupNorm(1, 5)
        self.table = nn.Embedding(7, 5)
        self.bag = nn.EmbeddingBag(7, 5, mode="sum")
        self.slope = nn.PReLU()
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.grouped(self.depthwise(torch.tanh(self.conv(x.transpose(1, 2)))))
        h = h.transpose(1, 2)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        h = self.lstm(h)[0]
        h = self.norm(h.transpose(1, 2)).mean(2)
        ids = (x.abs() * 3).long().clamp(max=6)
        return self.last(self.slope(h + self.table(ids[:, 0]).mean(1) + self.bag(ids[:, 1])))


@pytest.mark.parametrize("strategy", FLAT)
def test_every_kind_of_record_has_a_form_for_speakers(strategy: str) -> None:
    torch.manual_seed(3)
    check_clipped_sum(speaker_run(clip=0.3, strategy=strategy, model=Zoo()))


def test_each_layer_of_a_speaker_is_clipped_on_its_own() -> None:
    run = speaker_run(strategy="per_layer", clip=0.2)
    count = len([p for p in run.model.parameters() if p.requires_grad])
    total: dict[str, Tensor] = {}
    for gradient in speaker_gradients(run, drawn()):
        for name, part in gradient.items():
            norm = float(part.norm())
            factor = min(1.0, 0.2 / count**0.5 / norm) if norm else 1.0
            total[name] = total.get(name, 0) + factor * part
    released = take(run, batch_of(run, drawn()))
    for name, part in total.items():
        torch.testing.assert_close(released[name], part / 12, rtol=1e-4, atol=1e-6)


# --- what a speaker adds


def excess(run: Run) -> float:
    """Largest ‖what one speaker adds to the float64 sums‖ / C."""
    worst = 0.0
    for speaker in range(8):
        batch = batch_of(run, 5 * speaker + np.arange(K))
        for part in batch:
            run.optimizer.backward(run.loss_fn(run.model, part))
        added = torch.cat([total.flatten() for total in run.optimizer._batch.sums.values()]).norm()
        worst = max(worst, float(added) / run.optimizer.max_grad_norm)
        run.optimizer.zero_grad()
        run.optimizer._batch.close()
    return worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_speaker_adds_more_than_c(strategy: str, dtype: torch.dtype) -> None:
    assert 0.4 < excess(speaker_run(clip=0.05, strategy=strategy, dtype=dtype)) <= 1.0


def test_no_speaker_adds_more_than_c_in_automatic_clipping() -> None:
    assert 0.9 < excess(speaker_run(clip=0.05, clipping="automatic")) <= 1.0


def test_examples_clipped_apart_add_up_to_more_than_c() -> None:
    """The old way, for which S is k·C."""
    assert excess(speaker_run(clip=0.05, clipping_unit="example")) > 1.5


def test_sensitivity_and_noise_are_those_of_one_gradient(tmp_path: Path) -> None:
    deviations = {}
    for unit in ("speaker", "example"):
        run = speaker_run(sigma=2.0, clipping_unit=unit, ledger=tmp_path / unit)
        if unit == "speaker":
            run.engine.self_check(run.loss_fn)
        assert run.optimizer.sensitivity == pytest.approx(0.5 if unit == "speaker" else K * 0.5, rel=1e-5)
        noise = torch.cat([part.flatten() for part in run.release(()).values()])
        deviations[unit] = float(noise.square().mean().sqrt())
        assert f'"clipping_unit": "{unit}"' in (tmp_path / unit).read_text(encoding="utf-8")
    assert deviations["example"] / deviations["speaker"] == pytest.approx(K, rel=0.2)


def test_epsilon_does_not_depend_on_what_is_clipped() -> None:
    taken = []
    for unit in ("speaker", "example"):
        run = speaker_run(sigma=2.0, clipping_unit=unit)
        if unit == "speaker":
            run.engine.self_check(run.loss_fn)
        run.release(())
        taken.append(run.engine.get_epsilon(1e-3))
    assert taken[0] == taken[1]


# --- micro-batches of whole speakers


def test_micro_batches_hold_whole_speakers_with_equally_many_examples() -> None:
    generator = np.random.default_rng(0)
    units = Units(SPEAKERS)
    lengths = generator.integers(1, 50, 40)
    for trial in range(200):
        chosen = np.sort(generator.choice(40, generator.integers(0, 41), replace=False))
        size, frames = int(generator.integers(1, 9)), (None if trial % 2 else int(generator.integers(1, 200)))
        sizes = lengths if trial % 3 else None
        parts = units.micro_batches(chosen, size, sizes, frames)
        assert sorted(index for part in parts for index in part) == chosen.tolist()
        counts = units.drawn(parts)
        for part in parts:
            each = units.size_of(part, counts)  # raises unless they are whole speakers
            assert len(part) <= max(size, each)
            if sizes is not None and frames is not None:
                assert len(part) * max(sizes[part]) <= frames or len(part) == each
        assert sum(counts.values()) == len(chosen)


def test_ranks_get_whole_speakers() -> None:
    units = Units(SPEAKERS)
    for ranks in (1, 2, 3, 9):
        shares = units.share(drawn(), None, ranks)
        assert sorted(np.concatenate(shares).tolist()) == drawn().tolist()
        owners = [{SPEAKERS[index] for index in share} for share in shares]
        assert sum(map(len, owners)) == len(set.union(*owners))


@pytest.mark.parametrize(
    "part",
    [[0, 1], [0, 1, 2, 5, 6], [0, 5, 1, 6, 2, 7], [0, 1, 2, 10], [1, 2, 5, 6, 7]],
    ids=["a part of a speaker", "and of another", "mixed", "unequal", "the end of one"],
)
def test_parts_of_speakers_are_refused(part: list[int]) -> None:
    run = speaker_run()
    logical = batch_of(run, drawn())
    with pytest.raises(ValueError, match="all examples of each of its speakers"):
        logical.collate(part)


def test_the_private_loop_trains(tmp_path: Path) -> None:
    run = speaker_run(sigma=1.0, ledger=tmp_path / "ledger", steps=5)
    run.engine.self_check(run.loss_fn)
    taken = 0
    for logical in run.loader:
        take(run, logical)
        taken += 1
    assert taken == run.engine.steps == 5


def test_a_micro_batch_is_back_propagated_whole_and_in_turn() -> None:
    run = speaker_run()
    logical = iter(batch_of(run, drawn()))
    first = next(logical)
    with pytest.raises(RuntimeError, match="back-propagated whole"):
        run.optimizer.backward(run.loss_fn(run.model, first)[:3])
    with pytest.raises(RuntimeError, match="before the last one was back-propagated"):
        next(logical)


def test_losses_of_no_micro_batch_are_refused() -> None:
    run = speaker_run()
    run.begin(6)
    with pytest.raises(RuntimeError, match="the micro-batch at hand is none"):
        run.optimizer.backward(run.loss_fn(run.model, run.data[[0, 1, 2, 5, 6, 7]]))


def test_memory_that_runs_out_never_splits_a_speaker(monkeypatch: pytest.MonkeyPatch) -> None:
    run, whole = speaker_run(), speaker_run()
    expected = take(whole, batch_of(whole, drawn()))
    sizes: list[int] = []

    def short_of_memory(batch: Any) -> Tensor:
        sizes.append(len(batch[0]))
        if len(batch[0]) > K:
            raise torch.OutOfMemoryError("no memory")
        return run.loss_fn(run.model, batch)

    logical = batch_of(run, drawn())
    back_propagate(run.optimizer, logical, short_of_memory, say=lambda line: None)
    run.optimizer.step()
    for name, parameter in run.model.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), expected[name], rtol=1e-5, atol=1e-7)
    assert max(sizes) > K
    logical = batch_of(run, drawn())

    def no_memory(batch: Any) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    run.optimizer.zero_grad()
    with pytest.raises(torch.OutOfMemoryError, match=f"one speaker alone .{K} examples"):
        back_propagate(run.optimizer, logical, no_memory, say=lambda line: None)


# --- the order of rows, which the engine cannot see


def test_no_step_without_a_self_check() -> None:
    run = speaker_run(sigma=1.0)
    steps = run.engine.steps
    with pytest.raises(RuntimeError, match=r"engine\.self_check"):
        run.release(())
    assert run.engine.steps == steps


class Clips(Dataset):
    """Padded clips of 6 features, with their lengths and labels. `sorts`: many are read in the order of their index."""

    def __init__(self, sorts: bool = False) -> None:
        self.x = torch.randn(40, 5, 6)
        self.lengths = torch.tensor([5, 4, 3, 5, 2] * 8)
        self.y = torch.arange(40) % 3
        if sorts:
            self.__getitems__ = lambda places: [self[place] for place in sorted(places)]

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.x[index], self.lengths[index], self.y[index]


def stacked(items: list[Any]) -> Any:
    return tuple(torch.stack(parts) for parts in zip(*items, strict=True))


def summed(model: nn.Module, batch: Any) -> Tensor:
    x, lengths, _ = batch
    return (model(x) * (torch.arange(5) < lengths[:, None])).square().sum(1)


def sorted_inside(model: nn.Module, batch: Any) -> Tensor:
    """As for pack_padded_sequence, without undoing it."""
    order = batch[1].argsort(descending=True, stable=True)
    return summed(model, [part[order] for part in batch])


class Tokens(nn.Linear):
    """One score a frame."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., 0]


def constant(model: nn.Module, batch: Any) -> Tensor:
    return 0 * summed(model, batch) + 1


@pytest.mark.parametrize(
    ("data", "collate", "losses", "message"),
    [
        (Clips(sorts=True), stacked, summed, "not in that order"),
        (
            Clips(),
            lambda items: stacked(sorted(items, key=lambda item: -int(item[1]))),
            summed,
            "not in that order",
        ),
        (
            Clips(),
            lambda items: stacked(sorted(items, key=lambda item: int(item[2]))),
            summed,
            "not in that order",
        ),
        (Clips(), stacked, sorted_inside, "self-check|not in that order"),
        (Clips(), stacked, lambda model, batch: summed(model, batch).flip(0), "self-check|not in that order"),
        (Clips(), stacked, constant, "too alike"),
        (Clips(), stacked, summed, ""),
    ],
    ids=[
        "the data set sorts",
        "collate_fn sorts by length",
        "collate_fn sorts by label",
        "the loss sorts",
        "the loss turns them round",
        "losses that are all alike",
        "in order",
    ],
)
def test_losses_in_another_order_are_refused(
    data: Any, collate: Callable, losses: Callable, message: str
) -> None:
    model = Tokens(6, 1)
    with closing(PrivacyEngine()) as engine:
        engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=DataLoader(data, batch_size=12, collate_fn=collate),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            unit="speaker",
            speakers=SPEAKERS,
            max_examples_per_speaker=K,
            clipping_unit="speaker",
        )
        if not message:
            engine.self_check(losses)
            return
        with pytest.raises(SelfCheckError, match=message):
            engine.self_check(losses)


@pytest.mark.parametrize("again", ["recover", "zero_grad"])
def test_a_micro_batch_may_be_repeated_after_a_failure(again: str) -> None:
    run, whole = speaker_run(), speaker_run()
    expected = take(whole, batch_of(whole, drawn()))
    for number, batch in enumerate(batch_of(run, drawn())):
        if number == 0:
            getattr(run.optimizer, again)()
        run.optimizer.backward(run.loss_fn(run.model, batch))
    run.optimizer.step()
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter.grad.double(), expected[name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clipping_unit": "speakers"}, "expected 'example' or 'speaker'"),
        (
            {
                "clipping_unit": "speaker",
                "unit": "example",
                "speakers": None,
                "max_examples_per_speaker": None,
            },
            "with unit='example'",
        ),
        ({"physical_batch_size": 2}, "physical_batch_size=2 is below max_examples_per_speaker=3"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        speaker_run(**arguments)


def test_statistics_are_of_speakers() -> None:
    run = speaker_run()
    take(run, batch_of(run, drawn()))
    stats = run.optimizer.last_step
    assert stats is not None
    assert stats.examples == sum(count > 0 for count in COUNTS)
    norms = [norm_of(gradient) for gradient in speaker_gradients(run, drawn())]
    assert stats.mean_norm == pytest.approx(np.mean(norms), rel=1e-4)


def test_a_model_in_the_default_net_of_the_tests() -> None:
    check_clipped_sum(speaker_run(model=Net()))
