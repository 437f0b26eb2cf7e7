from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dpkernels.nn import BiasRecord, GhostLoRALinear, LinearRecord, LoRARecord, attach
from tests.nn.per_sample import assert_same_module, check_private, run_private


def squares(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x).float() if x.dtype is not torch.float64 else model(x)
    return (y * y).flatten(1).sum(1)


def lora(dtype: torch.dtype = torch.float32, dropout: float = 0.0, bias: bool = True) -> GhostLoRALinear:
    torch.manual_seed(0)
    layer = GhostLoRALinear(6, 5, r=2, alpha=3, dropout=dropout, bias=bias, dtype=dtype)
    nn.init.normal_(layer.lora_B)
    return layer


@pytest.mark.thinned(5)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6), (4, 2, 3, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_records_give_the_per_sample_gradients(
    dtype: torch.dtype, shape: tuple[int, ...], bias: bool
) -> None:
    model = nn.Sequential(lora(dtype, bias=bias), nn.Tanh(), GhostLoRALinear(5, 6, 2, dtype=dtype))
    nn.init.normal_(model[2].lora_B)
    private = check_private(model, squares, (torch.randn(shape).to(dtype),))
    assert [type(r) for r in private.records] == [LoRARecord, LoRARecord]


@pytest.mark.parametrize(
    "trained", ["lora_A", "lora_B", "lora_B bias", "weight", "weight bias lora_A lora_B"]
)
@pytest.mark.parametrize("first", [True, False])
def test_any_part_may_be_frozen(trained: str, first: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 6), lora())
    model[0].requires_grad_(not first)
    for name, p in model[1].named_parameters():
        p.requires_grad_(name in trained.split())
    private = check_private(model, squares, (torch.randn(4, 3, 6),))
    kinds = {type(r) for r in private.records if r.layer == "1"}
    expected = {
        "lora_A": {LinearRecord},
        "lora_B": {LinearRecord},
        "lora_B bias": {LinearRecord, BiasRecord},
        "weight": {LinearRecord},
    }
    assert kinds == expected.get(trained, {LinearRecord, BiasRecord, LoRARecord})


def test_dp_rp_keeps_h_but_not_x() -> None:
    layer = lora()
    layer.lora_A.requires_grad_(False)
    attach(layer).needs_to_ask = False
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        layer(torch.randn(4, 3, 6))
    assert saved == [(4, 3, 2)]


def test_a_new_layer_computes_its_base() -> None:
    linear = nn.Linear(6, 5)
    layer = GhostLoRALinear.from_linear(linear, r=2, alpha=4)
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer(x), linear(x))
    assert layer.weight is linear.weight
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    assert sorted(layer.state_dict()) == ["bias", "lora_A", "lora_B", "weight"]
    missing = layer.load_state_dict(nn.Linear(6, 5).state_dict(), strict=False)
    assert missing.missing_keys == ["lora_A", "lora_B"]


def test_merged_computes_the_same() -> None:
    layer = lora()
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer.merged()(x), layer(x))
    assert type(layer.merged()) is nn.Linear
    copy = lora()
    copy.load_state_dict(layer.state_dict())
    assert_same_module(layer, copy)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_private_forward_and_dx_agree_with_the_plain_path(autocast: bool, base: torch.dtype) -> None:
    """Also float32 adapters over a bfloat16 base, PEFT's default."""
    layer = lora()
    layer.weight.data, layer.bias.data = layer.weight.data.to(base), layer.bias.data.to(base)
    inputs = [torch.linspace(-1, 1, 72).view(4, 3, 6).to(base).requires_grad_() for _ in range(2)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        plain = layer(inputs[0])
        tape = attach(layer)
        private = layer(inputs[1])
    assert plain.dtype == private.dtype == (torch.bfloat16 if autocast else base)
    tolerance = 2e-2 if plain.dtype is torch.bfloat16 else 1e-6
    torch.testing.assert_close(plain, private, rtol=tolerance, atol=tolerance)
    tape.open(4)
    with tape.paused():
        plain.sum().backward()
    private.sum().backward()
    (record,) = tape.close()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=tolerance, atol=tolerance)
    sums = {p: torch.zeros(p.shape, dtype=torch.float64) for p in record.parameters}
    record.add_weighted_sum(torch.ones(4), sums)
    for parameter, total in sums.items():
        assert parameter.grad is not None
        want = parameter.grad.double()
        assert float((total - want).norm()) <= 10 * tolerance * float(want.norm())


def test_dropout_draws_once_and_its_mask_is_in_both_gradients() -> None:
    layer = lora(dropout=0.5)
    x = torch.randn(4, 3, 6, requires_grad=True)
    torch.manual_seed(3)
    squares(layer, x).sum().backward()
    expected = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
    dx, x.grad = x.grad, None
    layer.zero_grad()
    torch.manual_seed(3)
    private = run_private(layer, squares, (x,))
    torch.testing.assert_close(x.grad, dx)
    for name in ("lora_A", "lora_B"):
        torch.testing.assert_close(private.sums[name].float(), expected[name])


def test_reused_layer_merges() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = GhostLoRALinear(6, 6, 2)
            nn.init.normal_(self.layer.lora_B)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x))[:, :2])

    private = check_private(Twice(), squares, (torch.randn(4, 3, 6),))
    assert len(private.records) == 1


@pytest.mark.parametrize("alphas", [(2.0, 2.0), (2.0, 6.0)])
def test_layers_that_share_their_factors_keep_their_scalings(alphas: tuple[float, float]) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (GhostLoRALinear(6, 6, 2, alpha) for alpha in alphas)
            nn.init.normal_(self.one.lora_B)
            self.two.lora_A, self.two.lora_B = self.one.lora_A, self.one.lora_B

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.tanh(self.one(x)))

    if alphas[0] == alphas[1]:
        check_private(Shared(), squares, (torch.randn(4, 3, 6),))
    else:  # right, or refused by name
        with pytest.raises(TypeError, match=r"'two' .* and 'one' .* cannot be combined"):
            check_private(Shared(), squares, (torch.randn(4, 3, 6),))


@pytest.mark.parametrize(("keyword", "value"), [("r", 0), ("dropout", 1.0), ("dropout", -0.1)])
def test_bad_arguments_are_named(keyword: str, value: float) -> None:
    with pytest.raises(ValueError, match=keyword):
        GhostLoRALinear(3, 3, **{"r": 2, keyword: value})  # type: ignore[arg-type]


def test_gradcheck_in_the_plain_path() -> None:
    layer = lora(torch.float64)
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"lora_A": a, "lora_B": b}, (x,))

    assert torch.autograd.gradcheck(function, (x, layer.lora_A, layer.lora_B))
