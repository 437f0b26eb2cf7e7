"""Every kind of layer in a compiled graph has the sums of eager code.

The fast tests run the ops of the graph without a compiler: a layer believes that it is being traced, and calls its op.
The slow ones compile.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from dpkernels import nn as ghost
from dpkernels.nn.recording import compiled
from tests.nn.recording.compiling import Net, batch, private, records, records_of, same

BUCKETS = ((4, 5), (6, 7), (5, 9), (7, 8))


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


class Around(nn.Module):
    """A layer between others, so that its input requires grad: `call(layer, h [B,T,8]) -> [B,T,8]`."""

    def __init__(self, layer: nn.Module, call: Callable[[Any, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(6, 8), layer, nn.Linear(8, 3)
        self.call = call or (lambda layer, h: layer(h))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.call(self.layer, torch.tanh(self.first(x))))).mean(1)


class Lookup(nn.Module):
    """Tokens looked up by a layer: `tied` uses its table as the output layer, too."""

    def __init__(self, layer: nn.Module, *, tied: bool = False) -> None:
        super().__init__()
        self.layer, self.last = layer, nn.Linear(6, 9 if tied else 3)
        if tied:
            self.last.weight = layer.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(torch.tanh(self.layer((x[..., 0].abs() * 3).long() % 9)))
        return y if y.dim() == 2 else y.mean(1)


class Gain(nn.Module):
    """A raw parameter in a module without children, whose backward reads its output."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.gain).softmax(-1)


class GainBeside(Gain):
    """A raw parameter beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.sin(x)) * self.gain


class Positions(nn.Module):
    """Positions that all examples share."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(torch.arange(x.shape[1])[None])


def unrolled(cell: Any, h: Tensor) -> Tensor:
    state, steps = None, []
    for t in range(3):
        state = cell(h[:, t], state)
        steps.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(steps, 1)


def weighted(attention: Any, h: Tensor) -> Tensor:
    y, weights = attention(h, h, h)
    return y + weights.mean((1, 2))[:, None, None]


def crossed(attention: Any, h: Tensor) -> Tensor:
    memory = torch.sin(h)
    return attention(h, memory, memory, key_padding_mask=h[..., 0] > 0.9, need_weights=False)[0]


def by_keyword(attention: Any, h: Tensor) -> Tensor:
    return attention(query=h, key=h, value=h, need_weights=False)[0]


def time_first(layer: Any, h: Tensor) -> Tensor:
    return layer(h.transpose(0, 1)).transpose(0, 1)


def image(layer: Any, h: Tensor) -> Tensor:
    return layer(h[:, None]).mean(1)


def channels(layer: Any, h: Tensor) -> Tensor:
    return layer(h.transpose(1, 2)).transpose(1, 2)


def attention(**options: Any) -> nn.Module:
    return nn.MultiheadAttention(8, 2, batch_first=True, **options)


def encoder(batch_first: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=batch_first)


# The layers of each model that its graph holds; None for those that a graph ends before.
KINDS: dict[str, tuple[Callable[[], nn.Module], int | None]] = {
    "embedding": (lambda: Lookup(nn.Embedding(9, 6, padding_idx=0)), 2),
    "tied": (lambda: Lookup(nn.Embedding(9, 6), tied=True), 2),
    "bag": (lambda: Lookup(nn.EmbeddingBag(9, 6)), 2),
    "rms_norm": (lambda: Around(nn.RMSNorm(8)), 3),
    "conv1d": (lambda: Around(nn.Conv1d(8, 8, 3, padding=1), channels), 3),
    "depthwise": (lambda: Around(nn.Conv1d(8, 8, 3, padding=1, groups=8), channels), 3),
    "conv2d": (lambda: Around(nn.Conv2d(1, 2, 3, padding=1), image), 3),
    "transposed": (lambda: Around(nn.ConvTranspose1d(8, 8, 1), channels), 3),
    "frozen_batch_norm": (lambda: ghost.freeze_batch_norm(Around(nn.BatchNorm1d(8), channels)), 3),
    "attention": (lambda: Around(attention(), weighted), 3),
    "attention_with_frames": (lambda: Around(attention(add_bias_kv=True, add_zero_attn=True), weighted), 3),
    "cross_attention": (lambda: Around(attention(), crossed), 3),
    "attention_by_keyword": (lambda: Around(attention(), by_keyword), 3),
    "encoder": (lambda: Around(encoder(True)), 7),
    "encoder_time_first": (lambda: Around(encoder(False), time_first), 7),
    "lstm_cell": (lambda: Around(nn.LSTMCell(8, 8), unrolled), 5),
    "gru_cell": (lambda: Around(nn.GRUCell(8, 8), unrolled), 5),
    "gain": (lambda: Around(Gain()), 3),
    "gain_beside": (lambda: Around(GainBeside()), None),
    "positions": (lambda: Around(Positions()), None),
    "lstm": (lambda: Around(nn.LSTM(8, 8, batch_first=True), lambda layer, h: layer(h)[0]), None),
    "gru": (lambda: Around(nn.GRU(8, 8, batch_first=True), lambda layer, h: layer(h)[0]), None),
}


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], Callable[..., Any]]:
    """Run a model as its graph would: layers call their ops, as while they are traced."""

    def make(model: nn.Module) -> Callable[..., Any]:
        def run(x: Tensor) -> Any:
            with monkeypatch.context() as patch:
                patch.setattr(torch.compiler, "is_compiling", lambda: True)
                return model(x)

        return run

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_the_ops_of_a_layer_have_the_eager_sums(kind: str, traced: Any) -> None:
    make, held = KINDS[kind]
    model = make()
    tape = private(model)
    for size, length in BUCKETS[:2]:
        x, y = batch(size, length)
        eager = records(model, tape, x, y)
        losses = cross_entropy(traced(model)(x), y, reduction="none")
        if held is not None:
            assert tape.compiled._present.calls.total() == held
        assert same(eager, records_of(tape, losses))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("positions", "gain_beside")])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_compiler_is_told_the_shapes_that_the_op_returns(
    kind: str, dtype: torch.dtype | None, traced: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = KINDS[kind][0]()
    private(model)
    x, _ = batch(4)
    model(x)  # asks for the axes
    calls: list[tuple[Any, ...]] = []
    op = compiled._forward

    def note(*args: Any) -> Any:
        found = op(*args)
        calls.append((args, found))
        return found

    monkeypatch.setattr(compiled, "_forward", note)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        traced(model)(x)
    assert calls
    for args, found in calls:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            as_fake = [[mode.from_tensor(t) for t in part] for part in args[:2]]
            told = op(*as_fake, mode.from_tensor(args[2]), *args[3:])
        form = [(t.shape, t.dtype, t.stride()) for t in found]
        assert [(t.shape, t.dtype, t.stride()) for t in told] == form


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_layer_has_the_eager_sums_in_few_graphs(kind: str) -> None:
    make, held = KINDS[kind]
    model = make()
    tape = private(model)
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(model, backend=counter)
    for size, length in BUCKETS:
        x, y = batch(size, length)
        assert same(records(model, tape, x, y), records(run, tape, x, y))
    if held is not None:  # one graph for the first shape, and one for any other
        ops = [sum("ghost_layer" in str(node.target) for node in g.graph.nodes) for g in counter.graphs]
        assert ops == [held, held]


# torch 2.13 does not evaluate a transposed batch norm in a graph, in a model of its own either.
EVALUATED = [kind for kind in KINDS if kind not in ("lstm", "gru", "frozen_batch_norm")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVALUATED)
def test_an_evaluation_is_one_graph(kind: str) -> None:
    model = torch.compile(
        KINDS[kind][0](), backend="aot_eager", fullgraph=True
    )  # before attach: hooks are outside
    private(model)
    x, _ = batch(4)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model._orig_mod(x))


@pytest.mark.slow
def test_recurrent_layers_may_be_allowed_in_the_graph() -> None:
    model = KINDS["lstm"][0]()
    tape = private(model)
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(model, backend=counter)
    with torch._dynamo.config.patch(allow_rnn=True):
        for size, length in BUCKETS:
            x, y = batch(size, length)
            assert same(records(model, tape, x, y), records(run, tape, x, y))
    ops = [sum("ghost_layer" in str(node.target) for node in g.graph.nodes) for g in counter.graphs]
    assert ops == [3, 3]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["embedding", "attention", "encoder_time_first", "lstm_cell", "gain"])
def test_generated_code_has_the_eager_sums(kind: str) -> None:
    model = KINDS[kind][0]()
    tape = private(model)
    run = torch.compile(model)
    for size, length in BUCKETS[:3]:
        x, y = batch(size, length)
        assert same(records(model, tape, x, y), records(run, tape, x, y))


@pytest.mark.slow
def test_a_mode_with_cuda_graphs_has_the_eager_sums_on_a_cpu() -> None:
    model = Net()
    tape = private(model)
    run = torch.compile(model, mode="reduce-overhead")
    for size, length in BUCKETS[:2]:
        x, y = batch(size, length)
        assert same(records(model, tape, x, y), records(run, tape, x, y))


@pytest.mark.parametrize("kind", ["positions", "gain_beside"])
def test_a_layer_that_a_graph_ends_before_is_named_once(kind: str, traced: Any) -> None:
    model = KINDS[kind][0]()
    private(model)
    x, _ = batch(4)
    model(x)
    run = traced(model)
    with pytest.warns(UserWarning, match=r"torch.compile: 'layer(\.table)?' \(\w+\) runs as eager code"):
        run(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(x)


def test_an_output_that_the_backward_reads_is_a_copy() -> None:
    """Generated code writes over an output after its last use in the graph."""
    model = Around(Gain())
    tape = private(model)
    x = torch.linspace(-1, 1, 4 * 5 * 8).view(4, 5, 8)
    model(batch(4)[0])  # shows that the layer has one output
    gradients = []
    for overwritten in (False, True):
        tape.enter_forward(4)
        h = x.clone().requires_grad_()
        y = compiled.call_in_graph(model.layer, (h,), {})
        tape.leave_forward()
        g = torch.linspace(0, 1, y.numel()).view(y.shape)
        losses = (y * g).sum((1, 2))
        if overwritten:
            y.data.zero_()  # as generated code, without autograd's notice
        records_of(tape, losses)
        gradients.append(h.grad)
    assert gradients[0].any()
    assert torch.equal(*gradients)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.block, torch.sin(self.first(x)), use_reentrant=False)
        return self.last(torch.tanh(h)).mean(1)


def test_the_ops_of_a_checkpointed_block_are_counted_once(traced: Any) -> None:
    model = Checkpointed()
    tape = private(model)
    x, y = batch(4)
    eager = records(model, tape, x, y)
    model.block.forward = traced(model.block.forward)  # the recomputed forward runs the ops, too
    assert same(eager, records(model, tape, x, y))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_checkpoint_within_the_graph_has_the_eager_sums(backend: str) -> None:
    model = Checkpointed()
    tape = private(model)
    run = torch.compile(model, backend=backend)
    for size, length in BUCKETS[:2]:
        x, y = batch(size, length)
        assert same(records(model, tape, x, y), records(run, tape, x, y))


@pytest.mark.slow
def test_a_compiled_block_within_a_checkpoint_has_the_eager_sums() -> None:
    model = Checkpointed()
    tape = private(model)
    x, y = batch(4)
    eager = records(model, tape, x, y)
    model.block.compile(backend="aot_eager")
    assert same(eager, records(model, tape, x, y))
