from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dpkernels
from dpkernels.nn import BiasRecord, GhostLinear, LinearRecord, Tape, attach, detach, swap, uncovered, unswap
from tests.nn.per_sample import assert_same_module, check_private, run_private


def squares(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return (y * y).flatten(1).float().sum(1) if y.dtype != torch.float64 else (y * y).flatten(1).sum(1)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("shape", [(5, 6), (5, 3, 6), (5, 2, 3, 6), (5, 1, 6), (1, 3, 6)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_records_give_the_per_sample_gradients(
    shape: tuple[int, ...], bias: bool, dtype: torch.dtype
) -> None:
    model = nn.Sequential(nn.Linear(6, 4, bias=bias), nn.Tanh(), nn.Linear(4, 3, bias=bias)).to(dtype)
    check_private(model, squares, (torch.randn(shape).to(dtype),))


def test_constructor_state_and_forward_are_torchs() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(6, 4)
    torch.manual_seed(0)
    ghost = dpkernels.GhostLinear(6, 4)
    assert_same_module(plain, ghost)
    assert isinstance(ghost, nn.Linear)
    for shape in ((6,), (5, 6), (5, 7, 6), (2, 3, 4, 6), (0, 6), (2, 0, 6)):
        x = torch.randn(shape)
        assert torch.equal(plain(x), ghost(x))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("shape", [(5, 6), (5, 7, 6), (2, 3, 4, 6), (6,)])
def test_private_forward_and_dx_are_bit_equal_to_torchs(shape: tuple[int, ...], autocast: bool) -> None:
    plain = nn.Linear(6, 4)
    ghost = swap(copy.deepcopy(plain))
    tape = attach(ghost)
    x1, x2 = (
        torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y1, y2 = plain(x1), ghost(x2)
    assert y1.dtype == y2.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert torch.equal(y1, y2)
    tape.open(1 if len(shape) == 1 else shape[0])
    (y1 * y1).sum().backward()
    (y2 * y2).sum().backward()
    assert x1.grad is not None
    assert x2.grad is not None
    assert torch.equal(x1.grad, x2.grad)
    for record in tape.close():
        assert record.norm_sq().dtype == torch.float32


def test_autocast_does_not_hide_a_later_ordinary_use_of_the_weight() -> None:
    """A cast of the weight made by the private path must not be handed to a use that autograd should see."""
    layer = GhostLinear(3, 3, bias=False)
    tape = attach(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(torch.randn(2, 3)) + torch.nn.functional.linear(torch.randn(2, 3), layer.weight)
    tape.open(2)
    y.sum().backward()
    assert layer.weight.grad is not None


def test_frozen_parameters_are_neither_recorded_nor_kept() -> None:
    layer = GhostLinear(3, 2)
    layer.weight.requires_grad_(False)
    tape = attach(layer)
    tape.needs_to_ask = False
    saved: list[Tensor] = []
    x = torch.randn(4, 5, 3, requires_grad=True)

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = layer(x)
    assert [t.shape for t in saved] == [layer.weight.shape]
    tape.open(4)
    y.sum().backward()
    (record,) = tape.close()
    assert isinstance(record, BiasRecord)
    assert record.g.shape == (4, 2)

    layer.bias.requires_grad_(False)
    assert type(layer(x).grad_fn).__name__ != "_LinearBackward"


def test_input_without_gradient_still_records() -> None:
    layer = GhostLinear(3, 2)
    private = run_private(layer, squares, (torch.randn(4, 3),))
    assert [type(r) for r in private.records] == [LinearRecord, BiasRecord]


def test_output_may_be_modified_in_place() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            y *= 2
            return y

    check_private(Masked(), squares, (torch.randn(4, 5, 3),))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    torch.manual_seed(0)
    check_private_with_backward(Checkpointed(), torch.randn(4, 5, 3))


def check_private_with_backward(model: nn.Module, x: Tensor) -> None:
    """As check_private, with expected values from backward(): reentrant checkpoints refuse autograd.grad."""
    plain = copy.deepcopy(model)
    private = run_private(swap(model), squares, (x,))
    total = torch.zeros(x.shape[0], dtype=torch.float64)
    for i in range(x.shape[0]):
        plain.zero_grad()
        squares(plain, x[i : i + 1]).sum().backward()
        total[i] = sum(
            float(p.grad.double().square().sum()) for p in plain.parameters() if p.grad is not None
        )
    torch.testing.assert_close(private.norm_sq, total, rtol=1e-3, atol=1e-6)


def test_double_backward_is_refused() -> None:
    layer = GhostLinear(3, 2)
    tape = attach(layer)
    x = torch.randn(4, 3, requires_grad=True)
    y = layer(x)
    tape.open(4)
    (dx,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_backward_outside_the_engine_is_refused() -> None:
    layer = GhostLinear(3, 2)
    attach(layer)
    with pytest.raises(RuntimeError, match=r"optimizer\.backward"):
        layer(torch.randn(4, 3)).sum().backward()


@pytest.mark.parametrize("rows", [1, 3])
def test_an_input_that_examples_share(rows: int) -> None:
    class Broadcast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table(torch.ones(rows, 3).to(x)).sum(0, keepdim=True)

    for batch in (1, 3, 4):
        check_private(Broadcast(), squares, (torch.randn(batch, 2),))


def test_empty_batch() -> None:
    private = run_private(GhostLinear(3, 2), squares, (torch.randn(0, 4, 3),))
    assert private.norm_sq.shape == (0,)
    assert not any(bool(s.any()) for s in private.sums.values())


def test_swap_keeps_parameters_hooks_and_subclasses() -> None:
    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return -super().forward(input) * self.weight.detach().mean()

    model = nn.Sequential(nn.Linear(2, 2), Own(2, 2))
    weight = model[0].weight
    seen: list[int] = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    assert swap(model) is model
    assert type(model[0]) is GhostLinear
    assert type(model[1]) is Own
    assert model[0].weight is weight
    model(torch.randn(1, 2))
    assert seen == [1]
    assert type(unswap(model)[0]) is nn.Linear


def test_attach_names_what_has_no_rule() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"'0\.weight' \(Linear\).*swap"):
        attach(model)
    assert [u.name for u in uncovered(model)] == ["0.weight", "0.bias"]
    assert uncovered(swap(model)) == []
    attach(model)
    with pytest.raises(RuntimeError, match="detach"):
        attach(model)
    detach(model)
    attach(model)


def test_a_copy_of_a_private_model_is_an_ordinary_one() -> None:
    model = GhostLinear(2, 2)
    attach(model)
    copied = copy.deepcopy(model)
    assert type(copied) is nn.Linear
    copied(torch.randn(3, 2)).sum().backward()
    assert copied.weight.grad is not None


def test_paused_tape_is_ordinary_training() -> None:
    model = GhostLinear(2, 2)
    tape = attach(model)
    with tape.paused():
        model(torch.randn(3, 2)).sum().backward()
    assert model.weight.grad is not None


def test_gradcheck_in_the_plain_path() -> None:
    layer = GhostLinear(3, 2).double()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w, b: torch.func.functional_call(layer, {"weight": w, "bias": b}, (x,)),
        (x, layer.weight, layer.bias),
    )


class TestTape:
    def test_streaming_hands_over_single_uses_and_keeps_reused(self) -> None:
        class Reused(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.once, self.twice = nn.Linear(3, 3), nn.Linear(3, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.twice(self.once(self.twice(x)))

        model = swap(Reused())
        tape = attach(model)
        losses = squares(model, torch.randn(4, 2, 3))
        streamed: list[str] = []
        tape.open(4, sink=lambda r: streamed.append(r.layer))
        losses.sum().backward()
        kept = tape.close()
        assert streamed == ["once", "once"]
        assert [r.layer for r in kept] == ["twice", "twice"]

    def test_streaming_refuses_a_second_record_of_a_consumed_parameter(self) -> None:
        model = GhostLinear(3, 3)
        tape = attach(model)
        first = squares(model, torch.randn(4, 3))
        tape.open(4)
        tape.discard()  # forgets that forward
        second = squares(model, torch.randn(4, 3))
        tape.open(4, sink=lambda _: None)
        with pytest.raises(RuntimeError, match="already consumed"):
            (first + second).sum().backward()

    def test_open_close_order(self) -> None:
        tape = Tape()
        with pytest.raises(RuntimeError, match="not open"):
            tape.close()
        tape.open(2)
        with pytest.raises(RuntimeError, match="already open"):
            tape.open(2)
        tape.discard()
        tape.discard()
