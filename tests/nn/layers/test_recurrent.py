from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import weight_norm
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import dpkernels
from dpkernels.nn import (
    BiasRecord,
    GhostGRU,
    GhostLSTM,
    GhostRNN,
    LinearRecord,
    RowError,
    Tape,
    attach,
    detach,
    swap,
    uncovered,
    unswap,
)
from dpkernels.nn.layers import recurrent, recurrent_gates
from tests.nn.per_sample import assert_same_module, check_private, run_private

KINDS: dict[str, Callable[..., nn.RNNBase]] = {
    "lstm": nn.LSTM,
    "projected lstm": partial(nn.LSTM, proj_size=2),
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": partial(nn.RNN, nonlinearity="relu"),
}
GHOSTS = {nn.LSTM: GhostLSTM, nn.GRU: GhostGRU, nn.RNN: GhostRNN}
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)  # a failing draw is small as it is
ANY_KIND = pytest.mark.parametrize("kind", KINDS)
# torch says once that oneDNN has no projections.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")


def states_of(layer: nn.RNNBase, batch: int) -> tuple[Tensor, ...]:
    """First states [B, layers·directions, n]: the batch leads, as the checker wants it."""
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = [layer.proj_size or layer.hidden_size, layer.hidden_size][: 1 + isinstance(layer, nn.LSTM)]
    return tuple(torch.randn(batch, rows, size) for size in sizes)


def arguments(
    layer: nn.RNNBase, packed: str, x: Tensor, lengths: Tensor, first: tuple[Tensor, ...]
) -> tuple[Any, ...]:
    """x [B,T,d], lengths and first states as the layer takes them. packed: "", "sorted" or "any order"."""
    data: Any = x if layer.batch_first else x.transpose(0, 1)
    if packed:
        data = pack_padded_sequence(data, lengths, layer.batch_first, enforce_sorted=packed == "sorted")
    swapped = tuple(state.transpose(0, 1).contiguous() for state in first)
    return (data, swapped if isinstance(layer, nn.LSTM) else swapped[0]) if first else (data,)


def losses(out: Any, hidden: Any, batch_first: bool) -> Tensor:
    """One loss an example, of all outputs and all last states."""
    if isinstance(out, PackedSequence):
        out, batch_first = pad_packed_sequence(out, batch_first=True)[0], True
    parts = [out if batch_first else out.transpose(0, 1)]
    parts += [state.transpose(0, 1) for state in (hidden if isinstance(hidden, tuple) else (hidden,))]
    wide = [part if part.dtype is torch.float64 else part.float() for part in parts]
    return torch.stack([((part + 0.3) ** 2).flatten(1).sum(1) for part in wide]).sum(0)


def loss_fn(layer: Any, x: Tensor, lengths: Tensor, *first: Tensor, packed: str = "") -> Tensor:
    return losses(*layer(*arguments(layer, packed, x, lengths, first)), layer.batch_first)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), phases=PHASES)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    layers=st.integers(1, 2),
    bidirectional=st.booleans(),
    batch_first=st.booleans(),
    bias=st.booleans(),
    packed=st.sampled_from(["", "sorted", "any order"]),
    with_states=st.booleans(),
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    frozen=st.sets(st.integers(0, 19), max_size=4),
    seed=st.integers(0, 1000),
)
def test_norms_and_sums_are_those_of_each_example_alone(
    kind: str,
    layers: int,
    bidirectional: bool,
    batch_first: bool,
    bias: bool,
    packed: str,
    with_states: bool,
    lengths: list[int],
    frozen: set[int],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    layer = KINDS[kind](
        3, 4, layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional, dtype=torch.float64
    )
    for index, p in enumerate(layer.parameters()):
        p.requires_grad_(index not in frozen or index == 0)
    lengths = sorted(lengths, reverse=True) if packed == "sorted" else lengths
    x = torch.randn(len(lengths), max(lengths), 3).double()
    first = tuple(s.double() for s in states_of(layer, len(lengths))) if with_states else ()
    private = check_private(layer, partial(loss_fn, packed=packed), (x, torch.tensor(lengths), *first))
    assert {type(r) for r in private.records} <= {LinearRecord, BiasRecord}, (
        "a sample's gradient was materialised"
    )


@pytest.mark.thinned(5)
@ANY_KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", ["", "any order"])
def test_narrow_dtypes(kind: str, dtype: torch.dtype, packed: str) -> None:
    layer = KINDS[kind](3, 4, 2, bidirectional=True, batch_first=True).to(dtype)
    batch = (torch.randn(4, 6, 3).to(dtype), torch.tensor([2, 6, 1, 4]))
    private = check_private(layer, partial(loss_fn, packed=packed), batch)
    assert all(r.x.dtype is r.g.dtype is dtype for r in private.records if isinstance(r, LinearRecord))


@ANY_KIND
@pytest.mark.parametrize("sizes", [(1, 1), (1, 4), (4, 1), (3, 3), (0, 3)])
def test_sizes_that_coincide_and_empty_batches(kind: str, sizes: tuple[int, int]) -> None:
    layer = KINDS[kind](3, 4).double()
    x = torch.randn(*sizes, 3).double()
    if sizes[0] == 0:
        private = run_private(swap(layer), loss_fn, (x, torch.ones(0)))
        assert private.norm_sq.shape == (0,)
        assert not any(bool(total.any()) for total in private.sums.values())
    else:
        check_private(layer, loss_fn, (x, torch.ones(len(x))))


def private_and_plain(layer: nn.RNNBase) -> tuple[nn.RNNBase, nn.RNNBase, Tape]:
    ghost: Any = swap(copy.deepcopy(layer))
    return ghost, layer, attach(ghost)


@pytest.mark.thinned(5)
@ANY_KIND
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("packed", ["", "sorted", "any order"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_results_are_torchs(kind: str, autocast: bool, packed: str, batch_first: bool) -> None:
    dropout = 0.0 if packed else 0.4  # packed, the masks are those of the examples, not of their places
    layer = KINDS[kind](3, 4, 3, bidirectional=True, batch_first=batch_first, dropout=dropout)
    ghost, plain, tape = private_and_plain(layer)
    lengths = torch.tensor([6, 4, 2, 1])
    lengths = lengths if packed == "sorted" else lengths.flip(0)
    first = states_of(layer, 4)
    x = torch.randn(4, 6, 3)
    results = []
    tape.open(4)
    for model in (plain, ghost):
        leaves = [t.clone().requires_grad_() for t in (x, *first)]
        torch.manual_seed(5)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out, hidden = model(*arguments(model, packed, leaves[0], lengths, tuple(leaves[1:])))
        losses(out, hidden, batch_first).sum().backward()
        tensors = [*out] if isinstance(out, PackedSequence) else [out]
        tensors += hidden if isinstance(hidden, tuple) else [hidden]
        results.append((type(out), tensors, [leaf.grad for leaf in leaves]))
    (out_type, values, grads), (own_type, own_values, own_grads) = results
    assert out_type is own_type
    for value, own in zip(values, own_values, strict=True):
        assert (value is None and own is None) or (value.dtype is own.dtype and torch.equal(value, own))
    for grad, own_grad in zip(grads, own_grads, strict=True):
        assert grad is not None
        assert own_grad is not None
        assert grad.dtype is own_grad.dtype
        assert (grad - own_grad).norm() <= (5e-2 if autocast else 2e-6) * grad.norm()


def test_autocast_does_not_hide_a_later_ordinary_use_of_a_weight() -> None:
    layer: Any = swap(nn.GRU(3, 3))
    tape = attach(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(torch.randn(5, 2, 3))[0] + nn.functional.linear(torch.randn(2, 3), layer.weight_ih_l0[:3])
        y = y + nn.functional.linear(torch.randn(2, 3), layer.weight_hh_l0).sum()
    tape.open(2)
    y.sum().backward()
    assert layer.weight_hh_l0.grad is not None


@pytest.mark.thinned(2)
@ANY_KIND
def test_gradcheck_of_input_and_first_states(kind: str) -> None:
    layer: Any = swap(KINDS[kind](2, 3, 2, bidirectional=True).double())
    tape = attach(layer)
    lengths = torch.tensor([1, 3])
    leaves = tuple(t.double().requires_grad_() for t in (torch.randn(2, 3, 2), *states_of(layer, 2)))
    tape.open(2)
    for packed in ("", "any order"):
        assert torch.autograd.gradcheck(
            lambda *t, p=packed: loss_fn(layer, t[0], lengths, *t[1:], packed=p), leaves
        )


@ANY_KIND
@pytest.mark.parametrize("bias", [True, False])
def test_constructor_state_and_swap_are_torchs(kind: str, bias: bool) -> None:
    torch.manual_seed(0)
    plain = KINDS[kind](3, 4, 2, bias=bias, bidirectional=True)
    options = {"proj_size": 2} if kind == "projected lstm" else {}
    options |= {"nonlinearity": "relu"} if kind == "relu" else {}
    torch.manual_seed(0)
    ghost: Any = GHOSTS[type(plain)](3, 4, 2, bias=bias, bidirectional=True, **options)
    assert_same_module(plain, ghost)
    swapped: Any = swap(copy.deepcopy(plain))
    assert type(swapped) is type(ghost)
    assert uncovered(swapped) == []
    for shape in ((5, 2, 3), (5, 3)):  # not private: an input without a batch is torch's to take
        x = torch.randn(shape)
        assert torch.equal(ghost(x)[0], plain(x)[0])
    assert type(unswap(swapped)) is type(plain)
    assert type(getattr(dpkernels, type(ghost).__name__)) is type


def test_frozen_parameters_are_not_recorded() -> None:
    layer = nn.LSTM(3, 4, bidirectional=True)
    for name, p in layer.named_parameters():
        p.requires_grad_(name in ("weight_hh_l0", "bias_ih_l0_reverse"))
    private = check_private(layer, loss_fn, (torch.randn(3, 5, 3), torch.ones(3)))
    assert {type(r) for r in private.records} == {LinearRecord, BiasRecord}
    assert len(private.records) == 2


@ANY_KIND
@pytest.mark.parametrize("which", ["output", "last"])
def test_losses_of_a_part_of_the_outputs(kind: str, which: str) -> None:
    def loss(layer: Any, x: Tensor) -> Tensor:
        out, hidden = layer(x.transpose(0, 1))
        last = hidden[-1] if isinstance(hidden, tuple) else hidden
        return ((out[-1] if which == "output" else last[0]) ** 2).sum(1)

    check_private(KINDS[kind](3, 4, 2).double(), loss, (torch.randn(3, 5, 3).double(),))


def test_a_layer_called_twice_is_one_record_of_each_weight() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(4, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x)[0])[0]

    private = check_private(
        Twice().double(), lambda model, x: (model(x) ** 2).sum((1, 2)), (torch.randn(3, 5, 4).double(),)
    )
    assert len(private.records) == 4


@ANY_KIND
def test_an_input_without_a_batch_is_refused_by_name(kind: str) -> None:
    model: Any = swap(nn.ModuleDict({"encoder": KINDS[kind](3, 4)}))
    attach(model)
    with pytest.raises(ValueError, match=r"'encoder': its input has shape \[5, 3\].*\[T, B, d\]"):
        model["encoder"](torch.randn(5, 3))
    first = tuple(state.transpose(0, 1) for state in states_of(model["encoder"], 7))
    with pytest.raises(RuntimeError, match=r"Expected hidden.* size \(1, 2, "):
        model["encoder"](torch.randn(5, 2, 3), first if len(first) == 2 else first[0])
    detach(model)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_a_weight_that_hooks_make_is_refused_by_name() -> None:
    model = nn.Sequential(weight_norm(nn.LSTM(3, 4), "weight_hh_l0"))
    assert {u.name for u in uncovered(swap(model))} == {"0.weight_hh_l0_g", "0.weight_hh_l0_v"}


def test_a_padded_step_leaves_zeros_and_rows_are_examples() -> None:
    layer: Any = nn.LSTM(3, 4, batch_first=True)
    lengths = [2, 5, 1]
    x = torch.randn(3, 5, 3)
    private = run_private(swap(layer), partial(loss_fn, packed="any order"), (x, torch.tensor(lengths)))
    (record,) = (r for r in private.records if r.parameters[0] is layer.weight_ih_l0)
    assert isinstance(record, LinearRecord)
    for row, length in enumerate(lengths):
        assert torch.equal(record.x[row, :length], x[row, :length])
        assert not record.x[row, length:].any()
        assert not record.g[row, length:].any()
        assert record.g[row, :length].any(1).all()


class Faulty:
    """Faults of the backward, each of which the tests above must see."""

    @staticmethod
    def ungated(monkeypatch: pytest.MonkeyPatch) -> None:
        """The new gate's hidden part taken for its input part."""
        honest = recurrent.gru_gates

        def faulty(*args: Any) -> recurrent_gates.Gates:
            gates = honest(*args)
            return recurrent_gates.Gates(gates.ih, gates.ih)

        monkeypatch.setattr(recurrent, "gru_gates", faulty)

    @staticmethod
    def sorted_rows(monkeypatch: pytest.MonkeyPatch) -> None:
        """Row i is the i-th longest example."""
        honest = recurrent.pad_packed_sequence
        monkeypatch.setattr(
            recurrent,
            "pad_packed_sequence",
            lambda packed, **kw: honest(PackedSequence(packed.data, packed.batch_sizes), **kw),
        )

    @staticmethod
    def first_step_only(monkeypatch: pytest.MonkeyPatch) -> None:
        """Examples that start later than the first step of a reversed sequence start from the others' states."""
        honest = recurrent_gates.Steps.before
        monkeypatch.setattr(
            recurrent_gates.Steps,
            "before",
            lambda self, states, initial: honest(self, states, initial if not self.reverse else 0 * initial),
        )

    @staticmethod
    def one_direction(monkeypatch: pytest.MonkeyPatch) -> None:
        """The reversed direction taken for another forward one."""
        monkeypatch.setattr(recurrent, "Steps", lambda sizes, reverse: recurrent_gates.Steps(sizes, False))


@pytest.mark.parametrize(
    "fault", [Faulty.ungated, Faulty.sorted_rows, Faulty.first_step_only, Faulty.one_direction]
)
def test_planted_faults_are_caught(fault: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    layer = nn.GRU(3, 4, 2, bidirectional=True).double()
    batch = (torch.randn(4, 6, 3), torch.tensor([2, 6, 1, 4]), *states_of(layer, 4))
    with pytest.raises((AssertionError, RowError)):
        check_private(
            layer,
            partial(loss_fn, packed="any order"),
            tuple(t.double() if t.dim() > 1 else t for t in batch),
        )
