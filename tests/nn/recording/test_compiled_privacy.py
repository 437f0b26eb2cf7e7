"""A compiled graph that loses, repeats or exchanges records is refused: it never sums a gradient that has no norm.

The slow tests change graphs as a wrong compiler would; the fast ones call the ops of a graph without a compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from dpkernels import nn as ghost
from dpkernels.nn.recording.compiled import call_in_graph
from dpkernels.nn.recording.compiled_calls import CompiledCalls
from tests.nn.recording.compiling import Net, batch, private, records_of, same


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


class Twice(nn.Module):
    """One layer that is called twice with the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(torch.sin(self.layer(h)) + torch.cos(self.layer(h))).mean(1)


def in_ops(model: nn.Module, x: Tensor) -> Tensor:
    """The model's forward with its layers' ops, as a graph calls them."""
    first, layer, last = (getattr(model, name) for name in ("first", "layer", "last"))
    h = torch.tanh(op(first, x))
    return op(last, torch.sin(op(layer, h)) + torch.cos(op(layer, h))).mean(1)


def op(layer: Any, x: Tensor) -> Tensor:
    found: Tensor = call_in_graph(layer, (x,), {})
    return found


def losses_in_ops(model: nn.Module, tape: ghost.Tape, size: int, length: int = 5) -> Tensor:
    x, y = batch(size, length)
    tape.enter_forward(size)
    losses = cross_entropy(in_ops(model, x), y, reduction="none")
    tape.leave_forward()
    return losses


@pytest.fixture
def twice() -> tuple[nn.Module, ghost.Tape]:
    model = Twice()
    return model, private(model)


def test_each_use_of_a_layer_is_expected(twice: tuple[nn.Module, ghost.Tape]) -> None:
    """A second use has a record of its own, and its loss is noticed though the layer has one."""
    model, tape = twice
    losses = losses_in_ops(model, tape, 4)
    assert tape.compiled._present.calls == {"first": 1, "layer": 2, "last": 1}
    tape.compiled._present.calls["layer"] += 1
    with pytest.raises(
        RuntimeError, match="'layer' ran in the compiled forward, and no backward reached them"
    ):
        records_of(tape, losses)


def test_a_record_too_many_is_refused(twice: tuple[nn.Module, ghost.Tape]) -> None:
    model, tape = twice
    losses = losses_in_ops(model, tape, 4)
    tape.compiled._present.calls["layer"] -= 1
    with pytest.raises(RuntimeError, match="'layer' left more records than there were calls"):
        records_of(tape, losses)


def test_a_waiting_forward_is_checked_when_its_backward_comes(twice: tuple[nn.Module, ghost.Tape]) -> None:
    """The first backward ends nothing that the second forward has to bring."""
    model, tape = twice
    first = losses_in_ops(model, tape, 4)
    tape.compiled._present.calls["first"] += 1
    second = losses_in_ops(model, tape, 6)
    tape.compiled._present.calls["last"] += 1
    for losses, name in ((first, "first"), (second, "last")):
        with pytest.raises(RuntimeError, match=f"'{name}' ran in the compiled forward, and no backward"):
            records_of(tape, losses)


def test_two_forwards_in_one_backward_are_checked_together(twice: tuple[nn.Module, ghost.Tape]) -> None:
    model, tape = twice
    x, y = batch(4)
    expected = records_of(tape, cross_entropy(model(x) + model(x), y, reduction="none"))
    tape.enter_forward(4)
    one = in_ops(model, x)
    tape.leave_forward()
    tape.enter_forward(4)
    losses = cross_entropy(one + in_ops(model, x), y, reduction="none")
    tape.leave_forward()
    assert same(expected, records_of(tape, losses))


def test_the_first_of_two_backwards_is_checked_too(twice: tuple[nn.Module, ghost.Tape]) -> None:
    """Its records are the norms of strategy="two_pass"."""
    model, tape = twice
    losses = losses_in_ops(model, tape, 4)
    tape.compiled._present.calls["first"] += 1
    tape.open(4)
    losses.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="'first' ran in the compiled forward"):
        tape.close(again=True)
    assert not tape.is_open


def test_the_key_of_another_call_is_refused(twice: tuple[nn.Module, ghost.Tape]) -> None:
    model, tape = twice
    arguments = [*model.layer.parameters()], tape.compiled.anchor, model.layer.ghost_number
    x = batch(4)[0]
    calls = [
        torch.ops.dpkernels.ghost_layer([x], *arguments, "((0,), {})", site, [False], None) for site in "ab"
    ]
    tape.open(4)
    with pytest.raises(RuntimeError, match="the graph exchanged two calls"):
        torch.ops.dpkernels.ghost_backward(
            [torch.ones(4, 5, 6)], [], calls[0][-1], model.layer.ghost_number, "b"
        )
    tape.discard()


def test_a_forward_whose_graph_is_gone_is_forgotten() -> None:
    calls = CompiledCalls()
    calls._present.calls["first"] += 1
    calls.begin_forward()
    assert list(calls._forwards) == [calls._present]


# ---- graphs as a wrong compiler would change them


def _backwards(graph: Any) -> list[Any]:
    return [node for node in graph.graph.nodes if "ghost_backward" in str(node.target)]


def lose(graph: Any) -> None:
    """The first layer's backward does not run, and its token is 1, as it should be."""
    _without(graph, _backwards(graph)[-1], torch.ops.aten.ones.default)


def lose_with_its_token(graph: Any) -> None:
    _without(graph, _backwards(graph)[-1], torch.ops.aten.zeros.default)


def lose_one_of_two(graph: Any) -> None:
    """One of the uses of a layer that has another."""
    _without(graph, _backwards(graph)[1], torch.ops.aten.zeros.default)


def _without(graph: Any, node: Any, token: Any) -> None:
    with graph.graph.inserting_before(node):
        instead = [graph.graph.call_function(torch.ops.aten.zeros_like.default, (x,)) for x in node.args[1]]
        instead.append(graph.graph.call_function(token, ([],)))
    for user in list(node.users):
        user.replace_all_uses_with(instead[user.args[1]])
        graph.graph.erase_node(user)
    graph.graph.erase_node(node)


def repeat(graph: Any) -> None:
    node = _backwards(graph)[0]
    with graph.graph.inserting_before(node):
        graph.graph.call_function(node.target, node.args)


def exchange(graph: Any) -> None:
    """The keys of two layers."""
    _exchange(*_backwards(graph)[:2])


def exchange_uses(graph: Any) -> None:
    """The keys of two uses of one layer."""
    _exchange(*_backwards(graph)[1:3])


def _exchange(one: Any, two: Any) -> None:
    keys = one.args[2], two.args[2]
    one.update_arg(2, keys[1])
    two.update_arg(2, keys[0])


def compiled_by(change: Callable[[Any], None], model: nn.Module) -> Any:
    def backward(graph: Any, _: Any) -> Any:
        change(graph)
        graph.graph.lint()
        graph.recompile()
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=backward)
    return torch.compile(model, backend=backend)


COUNTED = "the backwards of {} calls of compiled private layers ran, but the graph counted 3"
UNREACHED = "{!r} ran in the compiled forward, and no backward reached them"
WRONG: dict[Callable[[Any], None], tuple[type[nn.Module], str]] = {
    lose_one_of_two: (Twice, UNREACHED.format("layer")),
    lose: (Net, COUNTED.format(2)),
    lose_with_its_token: (Net, UNREACHED.format("first")),
    repeat: (Net, COUNTED.format(4)),
    exchange: (Net, "the graph exchanged two calls"),
    exchange_uses: (Twice, "the graph exchanged two calls"),
}


def check_refused(change: Callable[[Any], None]) -> None:
    make, message = WRONG[change]
    model = make()
    tape = private(model)
    x, y = batch(4)
    losses = cross_entropy(compiled_by(change, model)(x), y, reduction="none")
    with pytest.raises(RuntimeError, match=message):
        records_of(tape, losses)


def test_a_graph_that_loses_one_of_two_uses_is_refused() -> None:
    check_refused(lose_one_of_two)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [change for change in WRONG if change is not lose_one_of_two],
    ids=lambda change: change.__name__,
)
def test_a_graph_that_a_compiler_got_wrong_is_refused(change: Callable[[Any], None]) -> None:
    check_refused(change)


class Dropping(nn.Module):
    """A layer with a mask of its own, which a checkpoint computes again."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return checkpoint(
            lambda h: self.attention(h, h, h, need_weights=False)[0], h, use_reentrant=False
        ).mean(1)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager"])
def test_a_checkpoint_draws_again_what_the_forward_drew(backend: str) -> None:
    """The loss is linear in the attention's output projection: its gradient times the weight is the loss."""
    torch.manual_seed(0)
    model = Dropping()
    tape = private(model)
    nn.init.zeros_(model.attention.out_proj.bias)
    x, _ = batch(4)
    losses = torch.compile(model, backend=backend)(x).sum(1)
    tape.open(len(losses))
    losses.sum().backward()
    weight = model.attention.out_proj.weight
    sums = {p: torch.zeros(p.shape, dtype=torch.float64) for p in model.parameters()}
    for record in tape.close():
        record.add_weighted_sum(torch.ones(len(losses)), sums)
    torch.testing.assert_close(
        (sums[weight] * weight).sum().float(), losses.sum().detach(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
def test_two_uses_with_one_input_stay_two_in_the_graph() -> None:
    model = Twice()
    tape = private(model)
    x, y = batch(4)
    expected = records_of(tape, cross_entropy(model(x), y, reduction="none"))
    losses = cross_entropy(compiled_by(lambda graph: None, model)(x), y, reduction="none")
    assert same(expected, records_of(tape, losses))


def test_a_gradient_past_the_records_is_found_in_ops() -> None:
    """As in eager code it lands in `.grad`, where the engine finds it."""
    model = nn.Sequential(nn.Linear(6, 6))
    tape = private(model)
    past = model[0].weight
    model[0].register_forward_hook(lambda layer, args, y: y * past.sum())
    x, _ = batch(4)
    y = op(model[0], x)
    tape.open(4)
    y.sum().backward()
    tape.close()
    assert past.grad is not None
    expected = (torch.nn.functional.linear(x, past, model[0].bias)).sum()
    torch.testing.assert_close(past.grad, expected.detach().expand(6, 6))
