"""torch.compile of a private model: the sums of eager code, in one graph, and no record lost in it.

The fast tests compile with AOTAutograd and without a code generator ("aot_eager"), which removes dead code and
functionalises as inductor does; a slow one generates code.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from dpkernels import nn as ghost
from dpkernels.nn.recording.compiled_calls import Call, CompiledCalls
from tests.nn.recording.compiling import Net, batch, private, records, records_of, same, sums

LIMIT = 4  # forms of one graph: the first shape, any batch and any length, and evaluation


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


class Convolutions(nn.Module):
    """More kinds of layers that a graph holds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(6, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.lora, self.last = ghost.GhostLoRALinear(8, 8, r=2), nn.Linear(8, 3)
        nn.init.normal_(self.lora.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x.transpose(1, 2)))).transpose(1, 2)
        return self.last(x + self.lora(x)).mean(1)


def test_a_compiled_model_has_the_eager_sums_in_one_graph() -> None:
    model = Net()
    tape = private(model)
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(model, backend=counter)
    for size, length in ((4, 5), (6, 7)):
        x, y = batch(size, length)
        assert same(records(model, tape, x, y), records(run, tape, x, y))
    check_graphs(counter, layers=3)


def check_graphs(counter: CompileCounterWithBackend, *, layers: int) -> None:
    """Each graph holds all layers, so none is broken at one of them, and there are few graphs."""
    assert [sum("ghost_layer" in str(node.target) for node in g.graph.nodes) for g in counter.graphs] == [
        layers
    ] * counter.frame_count
    assert counter.frame_count <= LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Net, Convolutions])
def test_batches_and_length_buckets_share_few_graphs(kind: type[nn.Module]) -> None:
    model = kind()
    tape = private(model)
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(model, backend=counter)
    for size, length in ((4, 5), (6, 7), (5, 9), (7, 8), (1, 8), (5, 5), (9, 4)):
        x, y = batch(size, length)
        assert same(records(model, tape, x, y), records(run, tape, x, y))
    check_graphs(counter, layers={Net: 3, Convolutions: 4}[kind])


@pytest.mark.slow
def test_a_graph_without_breaks_can_be_demanded() -> None:
    model = torch.compile(Net(), backend="aot_eager", fullgraph=True)  # before attach: its hooks are outside
    tape = private(model)
    x, y = batch(4)
    assert same(records(model._orig_mod, tape, x, y), records(model, tape, x, y))


@pytest.mark.slow
def test_a_model_compiled_in_place_and_a_compiled_loss_have_the_eager_sums() -> None:
    model = Net()
    tape = private(model)
    x, y = batch(4)
    eager = records(model, tape, x, y)
    loss = torch.compile(lambda x, y: cross_entropy(model(x), y, reduction="none"), backend="aot_eager")
    losses = loss(x, y)
    tape.open(len(losses))
    losses.sum().backward()
    assert same(eager, tape.close())
    model.compile(backend="aot_eager")
    assert same(eager, records(model, tape, x, y))


def test_the_first_layer_is_recorded_though_nobody_needs_its_dx() -> None:
    """Without the anchor a compiler drops every layer's backward, and the records: this is refused by name."""
    model = Net()
    tape = private(model)
    tape.compiled.anchor = tape.compiled.anchor.detach()
    with pytest.raises(
        RuntimeError, match="'first', 'last', 'norm' ran in the compiled forward, and no backward"
    ):
        records(torch.compile(model, backend="aot_eager"), tape, *batch(4))
    assert not tape.is_open


def test_a_backward_that_the_graph_did_not_count_is_refused() -> None:
    tape = private(Net())
    x, _ = batch(4)
    key = tape.compiled.wait(Call("repeated", "", [], [], [x]))
    tape.open(4)
    tape.compiled.take(key, "repeated", "")
    with pytest.raises(
        RuntimeError, match="the backwards of 1 calls of compiled private layers ran, but the graph counted 0"
    ):
        tape.close()


def test_a_lost_record_is_refused_by_name() -> None:
    tape = private(Net())
    x, _ = batch(4)
    tape.compiled.wait(Call("lost", "", [], [], [x]))  # a call whose backward the graph does not run
    tape.open(4)
    with pytest.raises(
        RuntimeError, match="'lost' ran in the compiled forward, and no backward reached them"
    ):
        tape.close()
    assert not tape.is_open
    tape.open(4)
    assert tape.close() == []  # and nothing is left of it in the next backward


def test_a_forward_that_is_gone_is_refused() -> None:
    tape = private(Net())
    x, _ = batch(4)
    key = tape.compiled.wait(Call("first", "", [], [], [x]))
    copy = key.clone()
    del key
    tape.open(4)
    with pytest.raises(
        RuntimeError, match="the forward of a compiled private layer is gone before its backward"
    ):
        tape.compiled.take(copy, "first", "")
    tape.discard()


@pytest.mark.slow
def test_two_forwards_may_wait_for_their_backwards() -> None:
    model = Net()
    tape = private(model)
    run = torch.compile(model, backend="aot_eager")
    (x, y), (x2, y2) = batch(4), batch(4, 7)
    eager = [records(model, tape, x, y), records(model, tape, x2, y2)]
    waiting = [cross_entropy(run(part), labels, reduction="none") for part, labels in ((x, y), (x2, y2))]
    for losses, expected in zip(waiting, eager, strict=True):
        tape.open(len(losses))
        losses.sum().backward()
        assert same(expected, tape.close())
    assert not tape.compiled._waiting


@pytest.mark.slow
def test_two_backwards_over_one_forward_have_the_same_records() -> None:
    """As strategy="two_pass" and the row check run them."""
    model = Net()
    tape = private(model)
    x, y = batch(4)
    losses = cross_entropy(torch.compile(model, backend="aot_eager")(x), y, reduction="none")
    tape.open(len(losses))
    losses.sum().backward(retain_graph=True)
    first = tape.close(again=True)
    tape.open(len(losses))
    losses.sum().backward()
    assert same(first, tape.close())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.layer(torch.tanh(self.layer(x))))).mean(1)


@pytest.mark.slow
def test_the_uses_of_a_layer_are_merged_with_their_cross_terms() -> None:
    model = Tied()
    tape = private(model)
    x, y = batch(4)
    eager, run = records(model, tape, x, y), torch.compile(model, backend="aot_eager")
    assert same(eager, records(run, tape, x, y))


class Outside(nn.Module):
    """Layers that a graph does not hold: an embedding, a recurrent layer, a raw parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.lstm = nn.Embedding(9, 6), nn.LSTM(6, 6, batch_first=True)
        self.gain, self.last = nn.Parameter(torch.ones(6)), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(self.lstm(self.table(ids))[0] * self.gain).mean(1)


@pytest.mark.slow
def test_layers_outside_of_the_graph_have_the_eager_sums_too() -> None:
    model = Outside()
    tape = private(model)
    ids, y = torch.arange(20).view(4, 5) % 9, torch.arange(4) % 3
    eager = records(model, tape, ids, y)
    assert same(eager, records(torch.compile(model, backend="aot_eager"), tape, ids, y))


@pytest.mark.slow
def test_autocast_and_frozen_layers_are_those_of_eager_code() -> None:
    model = Net()
    model.first.requires_grad_(False)
    tape = private(model)
    x, y = batch(4)
    with torch.autocast("cpu", torch.bfloat16):
        eager = records(model, tape, x, y)
        found = records(torch.compile(model, backend="aot_eager"), tape, x, y)
    assert same(eager, found)
    assert {r.g.dtype for r in found if "conv" in r.layer} == {r.g.dtype for r in eager if "conv" in r.layer}
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), model(x))


class Chain(nn.Module):
    """Tensors of one size that generated code computes one after another, in as little memory as it can."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(layer(torch.cos(x) * 1.5)) + x
        return x.mean(1)[:, :3]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Net, Convolutions, Chain])
def test_generated_code_has_the_eager_sums(kind: type[nn.Module]) -> None:
    """Generated code writes over tensors that its graph no longer reads; the records are copies."""
    model = kind()
    tape = private(model)
    run = torch.compile(model)
    for size, length in ((4, 5), (6, 7), (5, 9)):
        x, y = batch(size, length)
        assert same(records(model, tape, x, y), records(run, tape, x, y))


def test_a_record_does_not_change_with_the_tensors_of_the_graph() -> None:
    """What generated code does to its tensors after their last use in the graph."""
    model = Net()
    tape = private(model)
    x, g = batch(4)[0], torch.ones(4, 5, 8)
    number = model.first.ghost_number
    arguments = [*model.first.parameters()], tape.compiled.anchor, number, "((0,), {})", "", [True], None
    _, kept, key = torch.ops.dpkernels.ghost_layer([x], *arguments)
    tape.open(4)
    torch.ops.dpkernels.ghost_backward([g], [kept], key, number, "")
    found = tape._records
    before = sums(found)
    x.zero_()
    g.zero_()
    after = sums(found)
    tape.discard()
    assert all(torch.equal(after[p], before[p]) and before[p].any() for p in model.first.parameters())


def test_a_forward_that_is_not_trained_on_keeps_nothing() -> None:
    tape = private(Net())
    x, _ = batch(4)
    key = tape.compiled.wait(Call("first", "", [], [], [x]))
    assert len(tape.compiled._waiting) == 1
    del key  # the graph is gone
    assert not tape.compiled._waiting


class Recomputed(nn.Module):
    """A layer with dropout of its own under a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.lora = ghost.GhostLoRALinear(8, 8, r=2, dropout=0.5)
        nn.init.normal_(self.lora.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.lora, self.first(x), use_reentrant=False)).mean(1)


class Mixed(Net):
    """Its rows are wrong whatever draws them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).cumsum(0)


def check_named(model: nn.Module, run: Callable[..., Tensor]) -> None:
    tape = private(model)
    x, y = batch(4)
    losses = cross_entropy(run(x), y, reduction="none")
    check = ghost.RowCheck(tape).checking(losses)
    with (
        pytest.raises(ghost.RowError, match=r"a checkpointed layer with dropout.*without torch\.compile"),
        check,
    ):
        records_of(tape, losses)


def test_a_compiled_graph_is_a_likely_cause_of_wrong_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CompiledCalls, "in_use", True)
    model = Mixed()
    check_named(model, model)


@pytest.mark.slow
def test_dropout_under_a_compiled_checkpoint_is_drawn_as_in_the_forward() -> None:
    """The row check finds rows that another mask made."""
    model = Recomputed()
    tape = private(model)
    x, y = batch(4)
    losses = cross_entropy(torch.compile(model, backend="aot_eager")(x), y, reduction="none")
    with ghost.RowCheck(tape).checking(losses):
        records_of(tape, losses)
