from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from dpkernels.nn import ExpandedRecord, attach, detach, register_swap, swap, uncovered
from dpkernels.nn.convert.swapping import _ORIGINALS, _SWAPS, ghost_subclass
from dpkernels.nn.layers.linear import GhostLinear
from tests.nn.per_sample import check_private, run_private


def squares(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    y = y if y.dtype is torch.float64 else y.float()
    return (torch.tanh(y) ** 2).flatten(1).sum(1)


class Gain(nn.Module):
    """A leaf: a norm of someone's own."""

    def __init__(self, frozen_bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.bias = nn.Parameter(torch.randn(4), requires_grad=not frozen_bias)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) * self.weight * scale + self.bias


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen_bias", [False, True])
def test_a_leaf_runs_sample_by_sample(dtype: torch.dtype, frozen_bias: bool) -> None:
    model = nn.Sequential(Gain(frozen_bias), nn.Tanh(), Gain(), nn.GroupNorm(1, 3)).to(dtype)
    nn.init.normal_(model[3].weight)
    private = check_private(model, squares, (torch.randn(5, 3, 4).to(dtype),))
    assert all(isinstance(r, ExpandedRecord) for r in private.records)


def test_a_leaf_called_twice_and_with_two_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor, *, other: Tensor) -> tuple[Tensor, Tensor]:
            return x * self.weight, other + self.weight

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.two = Two()

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.two(x, other=x * 2)
            c, d = self.two(a, other=b)
            return c * d

    private = check_private(Model(), squares, (torch.randn(5, 3, 4),))
    assert len(private.records) == 1


class Attention(nn.Module):
    """Raw parameters beside children, in the ways real models read them."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.bias_u = nn.Parameter(torch.randn(2, 2))
        self.bias_v = nn.Parameter(torch.randn(2, 2))
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.places = nn.Parameter(torch.randn(1, 8, 4))
        self.gain = nn.Parameter(torch.randn(4))
        self.unused = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        q = self.proj(x).view(len(x), -1, 2, 2).transpose(1, 2)
        q = q + self.bias_u.view(1, 2, 1, 2)
        q = torch.tanh(q) - self.bias_v[None, :, None, :]
        x = q.transpose(1, 2).flatten(2) * self.gain
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1)
        x = x + self.places[:, : x.shape[1]]
        x = 2 * self.gain.unsqueeze(0).unsqueeze(0).transpose(0, 1) * x
        return self.gain.to(x.dtype).reshape(1, 1, -1) + x / (3 + self.gain * 0.1)


def test_raw_parameters_of_a_module_with_children() -> None:
    private = check_private(Attention(), squares, (torch.randn(5, 3, 4),))
    names = {r.layer for r in private.records if isinstance(r, ExpandedRecord)}
    assert any("bias_u" in name for name in names)
    assert not bool(private.sums["unused"].any())


USES: dict[str, Any] = {
    "softmax": lambda p, x: torch.softmax(p, 0),
    "sum": lambda p, x: p.sum(),
    "sigmoid": lambda p, x: p.sigmoid() * x + p.exp(),
    "matrix product": lambda p, x: x @ (p[:, None] * p.repeat(4, 1)),
    "vector product": lambda p, x: (x @ p)[..., None],
    "linear": lambda p, x: nn.functional.linear(x, p.unsqueeze(0)),
    "einsum": lambda p, x: torch.einsum("btd,d->bt", x, p)[..., None],
    "layer_norm": lambda p, x: nn.functional.layer_norm(x, (4,), p),
    "index": lambda p, x: p[0] * x + p[[1, 0, 3, 2]],
    "iteration": lambda p, x: sum(part * x for part in p),
    "two parameters": lambda p, x: torch.add(p, p) * p.flip(0),
    "repeat": lambda p, x: p.view(1, 1, 4).repeat(len(x), 1, 1),
    "cat": lambda p, x: torch.cat([p.view(1, 1, 4)] * len(x)) * x,
    "where": lambda p, x: torch.where(x > 0, x, p),
    "masked write": lambda p, x: _with_row(x * 2, x[..., 0] > 0, p),
    "in place": lambda p, x: (x * 2).add_(p),
    "chunk": lambda p, x: torch.cat(p.chunk(2)[::-1]),
    "norm": lambda p, x: p / p.norm(),
    "detached": lambda p, x: x * p.detach() + p.data,
    "attention bias": lambda p, x: nn.functional.scaled_dot_product_attention(
        x[:, None], x[:, None], x[:, None], p[:3].view(1, 1, 3, 1) * p[:3]
    )[:, 0],
    "without gradient": lambda p, x: x * _no_grad_norm(p),
    "transposed": lambda p, x: (x.transpose(0, 1) + p).transpose(0, 1),
}


def _with_row(x: Tensor, mask: Tensor, row: Any) -> Tensor:
    x[mask] = row
    return x


def _no_grad_norm(p: Any) -> Any:
    with torch.no_grad():
        return p.norm()


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Any) -> Any:
        return p * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


class Using(nn.Module):
    def __init__(self, use: Any) -> None:
        super().__init__()
        self.use = use
        self.child = nn.Linear(4, 4)
        self.raw = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.child(x) * self.use(self.raw, x)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("batch", [1, 3, 4, 5])
@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_uses_of_a_raw_parameter_of_a_module_with_children(use: Any, batch: int) -> None:
    check_private(Using(use).double(), squares, (torch.randn(batch, 3, 4).double(),))


class Positions(nn.Module):
    """A trained table that all examples share, through trained layers, added to what carries the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 4))
        self.proj, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.proj(self.table))


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_a_raw_parameter_through_layers(batch: int) -> None:
    check_private(Positions().double(), squares, (torch.randn(batch, 3, 4).double(),))


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda p, x: p.mul_(2), "mul_, which writes"),
        (lambda p, x: (x * 2).masked_scatter_(x > 0, p.repeat(15)), "masked_scatter_, which writes"),
        (
            lambda p, x: Twice.apply(p) * x,
            r"a custom autograd\.Function, through which its gradient would be lost",
        ),
        (lambda p, x: torch.cat([p.view(1, 1, 4), x])[1:], "cat along the batch"),
        (
            lambda p, x: nn.functional.batch_norm(x.flatten(1), None, None, p.repeat(3), training=True),
            "batch_norm",
        ),
    ],
)
def test_other_uses_of_a_raw_parameter_are_refused_by_name(use: Any, says: str) -> None:
    with pytest.raises(NotImplementedError, match=f"'Using.raw': .*{says}.*freeze"):
        run_private(swap(Using(use)), squares, (torch.randn(5, 3, 4),))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention()
        self.gains = nn.ParameterList([torch.randn(4), torch.randn(1, 3, 1)])
        self.named = nn.ParameterDict({"shift": nn.Parameter(torch.randn(4))})

    def forward(self, x: Tensor) -> Tensor:
        for gain in self.gains:
            x = x * gain
        return x * self.inner.gain + self.named["shift"] * self.gains[0]


@pytest.mark.parametrize("batch", [1, 3, 4, 5])
def test_raw_parameters_that_another_module_reads(batch: int) -> None:
    check_private(Outer().double(), squares, (torch.randn(batch, 3, 4).double(),))


def test_a_raw_parameter_read_past_the_models_forward_fills_grad() -> None:
    """Nothing is recorded then, and .grad is how the engine notices."""
    with pytest.raises(AssertionError, match=r"\.grad"):
        run_private(swap(Outer()), lambda m, x: squares(m, x) + m.inner.gain.sum(), (torch.randn(5, 3, 4),))


@pytest.mark.parametrize("batch", [1, 3])
def test_an_in_place_use_does_not_reach_the_parameter(batch: int) -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child = nn.Linear(4, 4)
            self.raw = nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            rows = self.raw.view(1, -1)
            rows += self.child(x)
            return rows

    model = swap(InPlace())
    attach(model)
    with pytest.raises(
        (RuntimeError, NotImplementedError), match=r"augmented assignment|in-place|broadcast|size"
    ):
        model(torch.randn(batch, 4))
    assert not bool(model._parameters["raw"].any())


def test_state_dict_and_parameters_are_untouched_and_detach_restores() -> None:
    model = Attention()
    before = {n: id(p) for n, p in model.named_parameters()}
    keys = list(model.state_dict())
    swap(model)
    attach(model)
    assert type(model) is not Attention
    assert isinstance(model, Attention)
    assert type(model).__name__ == "Attention"
    assert {n: id(p) for n, p in model.named_parameters()} == before
    assert list(model.state_dict()) == keys
    assert model.gain is model._parameters["gain"]
    copied = copy.deepcopy(model)
    copied(torch.randn(5, 3, 4)).sum().backward()
    assert copied.gain.grad is not None
    detach(model)
    assert type(model) is Attention


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight if float(x.sum()) > 0 else x - self.weight


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5) * self.weight


def test_a_leaf_that_vmap_cannot_run_is_asked_example_by_example() -> None:
    check_private(nn.Sequential(Branching()), squares, (torch.rand(5, 4),))


def test_a_leaf_that_draws_is_asked_with_its_own_draws() -> None:
    """Rows that dropout hid in the forward have no gradient in the record."""
    model = swap(nn.Sequential(Noisy()))
    x = torch.rand(6, 3, 4) + 1
    torch.manual_seed(1)
    hidden = nn.functional.dropout(x, 0.5) == 0
    torch.manual_seed(1)
    private = run_private(model, lambda m, x: m(x).flatten(1).sum(1), (x,))
    (record,) = private.records
    expected = torch.where(hidden, 0, 2 * x).sum(1)
    torch.testing.assert_close(record.g, expected)


class OwnLSTM(nn.LSTM):
    def turned(self, input: Any) -> Any:  # which swap does not look into
        return -input

    def forward(self, input: Any, hx: Any = None) -> Any:
        return super().forward(self.turned(input), hx)


REFUSED: list[Any] = [
    (lambda: OwnLSTM(3, 3), "weight_ih_l0", "ghost_subclass"),
    (lambda: nn.Bilinear(64, 64, 64), "weight", "262,144 elements"),
    (
        lambda: parametrizations.weight_norm(nn.Linear(3, 3)),
        "parametrizations.weight.original0",
        "remove_parametrizations",
    ),
    (
        lambda: parametrizations.spectral_norm(nn.Conv2d(3, 3, 3)),
        "parametrizations.weight.original",
        "remove_parametrizations",
    ),
    (lambda: weight_norm(nn.Conv1d(3, 3, 3)), "weight_g", "remove_weight_norm"),
    (lambda: weight_norm(nn.LSTM(3, 3), "weight_hh_l0"), "weight_hh_l0_v", "remove_weight_norm"),
    (lambda: spectral_norm(nn.ConvTranspose1d(3, 3, 3)), "weight_orig", "remove_spectral_norm"),
    (lambda: prune.l1_unstructured(nn.Linear(3, 3), "weight", 2), "weight_orig", "prune.remove"),
    (lambda: prune.l1_unstructured(nn.Linear(3, 3), "bias", 2), "bias_orig", "prune.remove"),
]


@pytest.mark.parametrize(("make", "name", "hint"), REFUSED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_what_has_no_rule_is_named_with_the_fix(make: Any, name: str, hint: str) -> None:
    model = nn.Sequential(make())
    found = {u.name: u.reason for u in uncovered(swap(model))}
    assert hint in found[f"0.{name}"]
    with pytest.raises(ValueError, match=name):
        attach(model)
    model.requires_grad_(False)
    assert uncovered(model) == []


def test_an_own_subclass_can_be_given_a_rule() -> None:
    class Own(nn.Linear):
        def bent(self, input: Tensor) -> Tensor:  # which swap does not look into
            return input.tanh()

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(self.bent(input))

    model = nn.Sequential(Own(400, 400))
    assert [u.name for u in uncovered(swap(model))] == ["0.weight"]  # its bias is small
    ghost = ghost_subclass(Own, GhostLinear)
    register_swap(Own, ghost)
    try:
        check_private(nn.Sequential(Own(4, 4), Own(4, 4)), squares, (torch.randn(5, 4),))
    finally:
        del _SWAPS[Own], _ORIGINALS[ghost]
    with pytest.raises(TypeError, match="subclass"):
        register_swap(Own, GhostLinear)
