"""The transducer loss with a trained output layer: norms, sums, memory budgets, and targets that are impossible."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpkernels import ops
from dpkernels.losses import IGNORED, transducer_loss_per_example
from dpkernels.nn import BiasRecord, GhostLoRALinear, JointRecord, RowError, attach, detach, swap
from dpkernels.nn.layers import joint_records
from tests.nn.per_sample import check_private, run_private

FEATURES, WIDTH, CLASSES, BLANK = 4, 6, 9, 8
TDT = (0, 1, 2)
LENGTHS = torch.tensor([7, 4, 5])
LABELS = torch.tensor([[1, 0, 5], [7, IGNORED, IGNORED], [2, 2, IGNORED]])


class Transducer(nn.Module):
    """A linear encoder, an embedding and an LSTM, and the joint network's output layer."""

    def __init__(
        self, durations: tuple[int, ...] = (), *, bias: bool = True, activation: str = "relu"
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"blank": BLANK, "durations": durations, "activation": activation}
        self.encoder = nn.Linear(FEATURES, WIDTH)
        self.table = nn.Embedding(CLASSES, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, CLASSES + len(durations), bias=bias)

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        known = labels.masked_fill((labels < 0) | (labels >= CLASSES), 0)
        return self.encoder(x), self.lstm(self.table(F.pad(known, (1, 0), value=BLANK)))[0]


def losses_of(model: Any, x: Tensor, lengths: Tensor = LENGTHS, labels: Tensor = LABELS) -> Tensor:
    return transducer_loss_per_example(model.head, *model(x, labels), lengths, labels, **model.options)


def batch(dtype: torch.dtype = torch.float32, frames: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(3, frames, FEATURES).to(dtype), LENGTHS, LABELS


def by_logits(model: Any, x: Tensor, lengths: Tensor = LENGTHS, labels: Tensor = LABELS) -> Tensor:
    """The plain model's loss: all logits, then every path."""
    encoder, predictor = model(x, labels)
    act = torch.relu if model.options["activation"] == "relu" else torch.tanh
    logits = model.head(act(encoder[:, :, None] + predictor[:, None])).float()
    losses = []
    for row, n, own in zip(logits, lengths.tolist(), labels, strict=True):
        m = int((own != IGNORED).sum())
        tokens = row[..., :CLASSES].log_softmax(-1)
        steps = row[..., CLASSES:].log_softmax(-1)
        alpha = {(0, 0): tokens.new_zeros(())}
        for t, u in product(range(n), range(m + 1)):
            if (t, u) not in alpha:
                continue
            durations = model.options["durations"]
            for kind in (0, 1) if u < m else (0,):
                token = tokens[t, u, int(own[u]) if kind else BLANK]
                arcs = [(1 - kind, token)] if not durations else []
                arcs += [(d, token + steps[t, u, i]) for i, d in enumerate(durations) if d or kind]
                for ahead, score in arcs:
                    place = (t + ahead, u + kind)
                    if place[0] < n or (place == (n, m) and not kind):
                        reached = alpha[t, u] + score
                        alpha[place] = torch.logaddexp(alpha[place], reached) if place in alpha else reached
        losses.append(-alpha[n, m])
    return torch.stack(losses)


@pytest.fixture
def small_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells of 2 frames of one utterance at a time; no gradient is kept from norm to sum."""
    monkeypatch.setattr(joint_records, "CELLS_BYTES", 2 * 4 * (WIDTH + CLASSES) * 4)
    monkeypatch.setattr(joint_records, "GRADIENTS_BYTES", 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("durations", "bias"), [((), True), (TDT, True), (TDT, False)])
def test_norms_and_sums_are_those_of_each_example_alone(
    durations: tuple[int, ...], bias: bool, dtype: torch.dtype
) -> None:
    model = Transducer(durations, bias=bias, activation="tanh" if bias else "relu").to(dtype)
    private = check_private(model, losses_of, batch(dtype))
    assert sum(isinstance(record, JointRecord) for record in private.records) == 1


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_a_part_of_the_layer_alone(trained: str) -> None:
    model = Transducer(TDT)
    model.head.requires_grad_(False).get_parameter(trained).requires_grad_()
    private = check_private(model, losses_of, batch())
    assert isinstance(private.records[0], JointRecord if trained == "weight" else BiasRecord)
    model.head.requires_grad_(False)
    private = check_private(model, losses_of, batch())
    assert not any(isinstance(record, JointRecord) for record in private.records)


@pytest.mark.usefixtures("small_budgets")
@pytest.mark.parametrize("durations", [(), TDT])
def test_cells_in_pieces_and_gradients_made_twice(durations: tuple[int, ...]) -> None:
    check_private(Transducer(durations), losses_of, batch())


def records_of(model: Any, x: Tensor, labels: Tensor = LABELS) -> list[Any]:
    private = run_private(swap(copy.deepcopy(model)), losses_of, (x, LENGTHS, labels))
    return [record for record in private.records if isinstance(record, JointRecord)]


def test_no_more_cells_than_the_budget_are_made_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    (record,) = records_of(Transducer(), torch.randn(3, 7, FEATURES))
    cell, made = (WIDTH + CLASSES) * 4, []

    def cells(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        x, g = ops.transducer_cells(*args, **options)
        made.append((x.numel() + g.numel()) * 4)
        return x, g

    monkeypatch.setattr(joint_records, "ops", type("", (), {"transducer_cells": staticmethod(cells)}))
    for budget, calls in ((3 * 28 * cell, 1), (2 * 28 * cell, 2), (28 * cell, 3), (12 * cell, 9), (1, 21)):
        monkeypatch.setattr(joint_records, "CELLS_BYTES", budget)
        made.clear()
        record.norm_sq()
        assert len(made) == calls
        assert max(made) <= max(budget, 4 * cell)  # one frame of one utterance is the least


@pytest.mark.parametrize("budget", [1 << 28, 12 * (WIDTH + CLASSES) * 4])
def test_a_unit_of_several_utterances_has_the_norm_of_their_sum(
    monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    (record,) = records_of(Transducer(), torch.randn(3, 7, FEATURES))
    expected = [part.g.sum(0) for part in record.materialised()]
    monkeypatch.setattr(joint_records, "CELLS_BYTES", budget)
    unit = record.of_units(3)
    assert unit.batch_size == 1
    square = sum(float(total.square().sum()) for total in expected)
    # the norm is rounded up as a sum of any length is
    assert float(unit.norm_sq()) == pytest.approx(square, rel=5e-5)
    sums = {p: torch.zeros(p.shape, dtype=torch.float64) for p in record.parameters}
    unit.add_weighted_sum(torch.tensor([0.5]), sums)
    for total, one in zip(sums.values(), expected, strict=True):
        torch.testing.assert_close(total, 0.5 * one.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("keeps", [True, False])
def test_cells_are_made_once_or_twice(monkeypatch: pytest.MonkeyPatch, keeps: bool) -> None:
    (record,) = records_of(Transducer(), torch.randn(3, 7, FEATURES))
    entries = sum(parameter.numel() for parameter in record.parameters)
    monkeypatch.setattr(joint_records, "GRADIENTS_BYTES", 3 * 4 * entries - (not keeps))
    calls = []
    original = JointRecord._cells
    monkeypatch.setattr(JointRecord, "_cells", lambda self, rows: calls.append(rows) or original(self, rows))
    sums = {p: torch.zeros(p.shape, dtype=torch.float64) for p in record.parameters}
    record.norm_sq()
    record.add_weighted_sum(torch.ones(3), sums)
    rows = sum(one.stop - one.start for one in calls)
    assert rows == (3 if keeps else 6)


@pytest.mark.usefixtures("small_budgets")
@pytest.mark.parametrize("scale", [3.0, torch.nan])
def test_an_example_adds_at_most_its_norm_whatever_the_second_product(
    monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    (record,) = records_of(Transducer(), torch.randn(3, 7, FEATURES))
    norm = record.norm_sq().double().sqrt()
    original = JointRecord._cells

    def other(self: JointRecord, rows: slice) -> Iterator[tuple[Tensor, Tensor]]:
        return ((x, g * scale) for x, g in original(self, rows))

    monkeypatch.setattr(JointRecord, "_cells", other)
    for i in range(3):
        sums = {p: torch.zeros(p.shape, dtype=torch.float64) for p in record.parameters}
        record.add_weighted_sum(F.one_hot(torch.tensor(i), 3).float(), sums)
        added = torch.cat([total.flatten() for total in sums.values()]).norm()
        assert float(added) <= float(norm[i])
        assert (float(added) > 0.9 * float(norm[i])) == (scale == 3.0)


@pytest.mark.parametrize(("durations", "activation"), [((), "relu"), (TDT, "tanh")])
def test_the_loss_is_that_of_the_plain_layer(durations: tuple[int, ...], activation: str) -> None:
    model, x = Transducer(durations, activation=activation), torch.randn(3, 7, FEATURES)
    plain = by_logits(model, x)
    torch.testing.assert_close(losses_of(model, x), plain)
    with torch.autocast("cpu", torch.bfloat16):
        half = losses_of(model, x)
        torch.testing.assert_close(half, by_logits(model, x), rtol=2e-2, atol=2e-2)
    assert half.dtype == torch.float32
    assert not torch.equal(half, losses_of(model, x)), "autocast reaches the products"
    ghost: Any = swap(copy.deepcopy(model))
    attach(ghost)
    # the prediction network's LSTM differs from torch's in the last place
    torch.testing.assert_close(losses_of(ghost, x), losses_of(model, x), rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(losses_of(ghost, x), half, rtol=1e-2, atol=1e-2)


def test_under_autocast_norms_and_sums_are_those_of_each_example_alone() -> None:
    def losses(model: Any, *args: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=args[0].dtype == torch.float32):
            return losses_of(model, *args)

    check_private(Transducer(TDT), losses, batch(), tolerance=6e-2)


IMPOSSIBLE = {
    "a label outside the classes": (4, [CLASSES, IGNORED, IGNORED]),
    "a label far outside": (4, [10**12, 1, IGNORED]),
    "a negative label": (4, [-1, 1, IGNORED]),
    "a blank": (4, [BLANK, IGNORED, IGNORED]),
    "padding before a label": (4, [1, IGNORED, 2]),
    "more frames than there are": (8, [7, IGNORED, IGNORED]),
    "a negative length": (-1, [7, IGNORED, IGNORED]),
    "no frames": (0, [7, IGNORED, IGNORED]),
}


@pytest.mark.parametrize("kind", IMPOSSIBLE)
@pytest.mark.parametrize("durations", [(), TDT])
def test_an_impossible_target_adds_exactly_nothing(durations: tuple[int, ...], kind: str) -> None:
    frames, row = IMPOSSIBLE[kind]
    lengths, labels = LENGTHS.clone(), LABELS.clone()
    lengths[1], labels[1] = frames, torch.tensor(row)
    options = {"blank": BLANK, "durations": durations}
    head = nn.Linear(WIDTH, CLASSES + len(durations))
    states = [torch.randn(3, 7, WIDTH), torch.randn(3, 4, WIDTH)]

    def results(*given: Tensor) -> tuple[Tensor, ...]:
        leaves = [state.clone().requires_grad_() for state in states]
        losses = transducer_loss_per_example(head, *leaves, *given, **options)
        return losses.detach(), *torch.autograd.grad(losses[losses.isfinite()].sum(), leaves)

    def infinite(*given: Tensor) -> tuple[Tensor, ...]:
        leaves = [state.clone().requires_grad_() for state in states]
        return torch.autograd.grad(
            transducer_loss_per_example(head, *leaves, *given, **options).sum(), leaves
        )

    usual, strange = results(LENGTHS, LABELS), results(lengths, labels)
    assert strange[0][1] == torch.inf
    for before, after in zip(usual, strange, strict=True):
        assert torch.equal(before[[0, 2]], after[[0, 2]])
    for grad in infinite(lengths, labels):
        assert not grad[1].any()
    model = Transducer(durations)
    private = run_private(swap(model), losses_of, (torch.randn(3, 7, FEATURES), lengths, labels))
    (record,) = [record for record in private.records if isinstance(record, JointRecord)]
    assert float(record.norm_sq()[1]) == 0.0
    assert all(not part.g[1].any() for part in record.materialised())


def test_frames_that_no_durations_fill_are_impossible() -> None:
    head, states = nn.Linear(WIDTH, CLASSES + 1), [torch.randn(2, n, WIDTH) for n in (5, 2)]
    lengths, labels = torch.tensor([5, 4]), torch.tensor([[1], [1]])
    losses = transducer_loss_per_example(head, *states, lengths, labels, blank=BLANK, durations=(2,))
    assert losses.isinf().tolist() == [True, False]


@pytest.mark.parametrize("durations", [(), TDT])
def test_padding_and_the_rest_of_the_batch_change_nothing(durations: tuple[int, ...]) -> None:
    model = Transducer(durations)
    x = torch.randn(3, 7, FEATURES)
    noisy, more = x.clone(), F.pad(LABELS, (0, 2), value=IGNORED)
    noisy[1, 4:], noisy[2, 5:] = 1e3, -1e3
    noisy = F.pad(noisy, (0, 0, 0, 3), value=7.0)
    (record,) = records_of(model, x)
    (padded,) = records_of(model, noisy, more)
    assert torch.equal(losses_of(model, x), losses_of(model, noisy, labels=more))
    for ours, theirs in zip(record.materialised(), padded.materialised(), strict=True):
        torch.testing.assert_close(ours.g, theirs.g, rtol=1e-5, atol=1e-6)
    for i in range(3):
        n, m = int(LENGTHS[i]), int((LABELS[i] != IGNORED).sum())
        alone = (x[i : i + 1, :n], LENGTHS[i : i + 1], LABELS[i : i + 1, :m])
        private = run_private(swap(copy.deepcopy(model)), losses_of, alone)
        (own,) = [one for one in private.records if isinstance(one, JointRecord)]
        for ours, theirs in zip(record.materialised(), own.materialised(), strict=True):
            torch.testing.assert_close(ours.g[i], theirs.g[0], rtol=1e-5, atol=1e-6)


def test_rows_of_another_order_are_refused() -> None:
    def losses(model: Any, *args: Tensor) -> Tensor:
        return losses_of(model, *args)[[1, 2, 0]]

    model: Any = swap(Transducer().requires_grad_(False))
    model.head.requires_grad_()
    with pytest.raises(RowError, match="head"):
        run_private(model, losses, batch())


def test_an_empty_batch() -> None:
    model, x = Transducer(TDT), torch.randn(0, 7, FEATURES)
    private = run_private(swap(model), losses_of, (x, LENGTHS[:0], LABELS[:0]))
    assert private.losses.shape == (0,)
    assert not any(total.any() for total in private.sums.values())


@pytest.mark.parametrize("bias", [False, True])
def test_two_losses_of_one_layer(bias: bool) -> None:
    def losses(model: Any, *args: Tensor) -> Tensor:
        return losses_of(model, *args) + losses_of(model, 2 * args[0], *args[1:])

    check_private(Transducer(bias=bias), losses, batch())


def test_other_output_layers_are_refused_by_name() -> None:
    model: Any = Transducer()
    model.head = GhostLoRALinear.from_linear(model.head)
    with pytest.raises(TypeError, match=r"joint_head: given a .*GhostLoRALinear.*modules_to_save"):
        losses_of(model, batch()[0])
    model.head = nn.Sequential(nn.Linear(WIDTH, CLASSES))
    with pytest.raises(TypeError, match=r"joint_head: given a .*Sequential"):
        losses_of(model, batch()[0])


def test_a_frozen_model_and_one_that_is_detached_need_no_tape() -> None:
    model: Any = swap(Transducer())
    attach(model)
    detach(model)
    losses_of(model, batch()[0]).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        attach(model)
        assert losses_of(model, batch()[0]).isfinite().all()


ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "labels that are no integers": ({"labels": LABELS.float()}, "labels of torch.float32"),
    "lengths that are a list": ({"frame_lengths": [7, 4, 5]}, "frame_lengths: got list"),
    "states that are integers": ({"encoder": torch.ones(3, 7, WIDTH).long()}, "encoder: got a tensor"),
    "states of another type": ({"predictor": torch.ones(3, 4, WIDTH).double()}, "predictor"),
    "a blank that is a truth value": ({"blank": True}, "blank=True"),
    "a blank that is no class": ({"blank": CLASSES}, "blank: given 9"),
    "labels of another batch": ({"labels": LABELS[:2]}, r"labels \(2, 3\)"),
    "lengths of another batch": ({"frame_lengths": LENGTHS[:2]}, r"frame_lengths \(2,\)"),
    "more labels than states": ({"predictor": torch.ones(3, 3, WIDTH)}, "targets"),
    "an unknown activation": ({"activation": "gelu"}, "activation: given 'gelu'"),
}


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_arguments_that_do_not_fit_are_named(kind: str) -> None:
    changed, message = ARGUMENTS[kind]
    given: dict[str, Any] = {
        "encoder": torch.ones(3, 7, WIDTH),
        "predictor": torch.ones(3, 4, WIDTH),
        "frame_lengths": LENGTHS,
        "labels": LABELS,
        "blank": BLANK,
    }
    with pytest.raises((TypeError, ValueError), match=message):
        transducer_loss_per_example(nn.Linear(WIDTH, CLASSES), **{**given, **changed})


def test_small_integer_types_wrap_around_nowhere() -> None:
    head, states = nn.Linear(WIDTH, CLASSES), [torch.ones(3, n, WIDTH) for n in (7, 4)]
    expected = transducer_loss_per_example(head, *states, LENGTHS, LABELS, blank=BLANK)
    given = (LENGTHS.to(torch.uint8), LABELS.to(torch.int8))
    assert torch.equal(transducer_loss_per_example(head, *states, *given, blank=BLANK), expected)
