"""A kind of layer that is added here, by its row, its definition and its kernels alone, works in every grouped op.

It scales features, y_t = power · gate_t ⊙ x_t ⊙ w: sample i has the gradient power · Σ_t gate_t ⊙ x_t ⊙ g_t.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpkernels import ops, reference
from dpkernels.backends import bounds, registry
from dpkernels.nn import GhostModule, Record, register_swap
from dpkernels.ops import _check, layers
from tests.ops.cases import make
from tests.privacy.private_run import losses_of, private_run

BATCH, FRAMES, WIDTH, POWER = 3, 5, 4, 0.5
FACTORS = torch.tensor([0.3, 0.0, 1.0])


# ---- what is added: checks, a row, a definition, kernels


def check_norm(x: Tensor, gate: Tensor, g: Tensor, *, power: float) -> None:
    _check.floats(x=x, gate=gate, g=g)
    for name, tensor in (("gate", gate), ("g", g)):
        _check.shape(name, tensor, tuple(x.shape), "[B, T, d]")
    _check.finite("power", power)


def check_sum(x: Tensor, gate: Tensor, g: Tensor, factors: Tensor, out: Tensor, *, power: float) -> None:
    check_norm(x, gate, g, power=power)
    _check.weighted_sum(factors, x, out=(out, (x.shape[2],), "[d]"))


ROW = layers.Kind(("x", "gate", "g"), check_norm, check_sum, options={"power": float})


def gradients(x: Tensor, gate: Tensor, g: Tensor, power: float) -> Tensor:
    return power * (x.double() * gate.double() * g.double()).sum(1)


def gated_norm_sq(x: Tensor, gate: Tensor, g: Tensor, *, power: float) -> Tensor:
    return bounds.round_up(gradients(x, gate, g, power).square().sum(1) * (1 + 2.0**-40))


def gated_weighted_sum(
    x: Tensor, gate: Tensor, g: Tensor, factors: Tensor, out: Tensor, *, power: float
) -> None:
    out += (factors.double()[:, None] * gradients(x, gate, g, power)).sum(0)


def in_a_file(name: str, *functions: Callable[..., Any]) -> ModuleType:
    """The module that a file of these functions would be."""
    module = ModuleType(name)
    for function in functions:
        copy = type(function)(function.__code__, globals(), function.__name__)
        copy.__kwdefaults__, copy.__module__ = function.__kwdefaults__, name
        setattr(module, function.__name__, copy)
    return module


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The kind is added; gives the names of its kernels, call by call."""
    names: list[str] = []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def kernel(*tensors: Tensor, **options: Any) -> Any:
            names.append(function.__name__)
            return function(*tensors, **options)

        return kernel

    functions = (gated_norm_sq, gated_weighted_sum)
    monkeypatch.setitem(layers.KINDS, "gated", ROW)
    definitions = in_a_file("dpkernels.reference.gated", *functions)
    kernels = in_a_file("dpkernels.backends.torch_ops.gated", *functions)
    for function in functions:
        name = function.__name__
        monkeypatch.setitem(reference.DEFINITIONS, name, getattr(definitions, name))
        setattr(kernels, name, counted(getattr(kernels, name)))
    monkeypatch.setitem(sys.modules, kernels.__name__, kernels)
    before = dict(registry._chosen)
    yield names
    registry._chosen.clear()
    registry._chosen.update(before)


@pytest.fixture(params=["auto", "torch", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, request.param)
    return str(request.param)


# ---- in the public ops


def gated(outs: tuple[Tensor, ...] = ()) -> ops.GroupedLayer:
    tensors = tuple(torch.randn(BATCH, FRAMES, WIDTH) for _ in ROW.tensors)
    return ops.GroupedLayer("gated", tensors, {"power": POWER}, outs)


def among_others() -> list[ops.GroupedLayer]:
    """Layers of the added kind before and after those of others."""
    return [gated(), make("lora", BATCH).layer(), gated(), make("embedding", BATCH).layer()]


def summed() -> tuple[list[ops.GroupedLayer], list[Tensor]]:
    """The same with outs, and the added kind's sums as they must become."""
    found, exact = [], []
    for layer in among_others():
        shapes = ((WIDTH,),) if layer.kind == "gated" else make(layer.kind, BATCH).out_shapes
        outs = tuple(torch.full(shape, 0.5, dtype=torch.float64) for shape in shapes)
        options = {name: layer.options[name] for name in layers.KINDS[layer.kind].options}
        found.append(layer._replace(options=options, outs=outs))
        if layer.kind == "gated":
            exact.append(0.5 + (FACTORS.double()[:, None] * gradients(*layer.tensors, POWER)).sum(0))
    return found, exact


def check_summed(given: list[ops.GroupedLayer], exact: list[Tensor]) -> None:
    outs = [layer.outs[0] for layer in given if layer.kind == "gated"]
    for out, truth in zip(outs, exact, strict=True):
        torch.testing.assert_close(out, truth, rtol=1e-12, atol=1e-12)


def test_norms(backend: str, called: list[str]) -> None:
    given = among_others()
    exact = sum(gradients(*one.tensors, POWER).square().sum(1) for one in given if one.kind == "gated")
    found = ops.total_norm_sq(given).double() - ops.total_norm_sq([given[1], given[3]]).double()
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    assert called == ([] if backend == "reference" else ["gated_norm_sq"] * 2)


def test_sums(backend: str, called: list[str]) -> None:
    given, exact = summed()
    ops.weighted_sums(given, FACTORS)
    check_summed(given, exact)
    assert called == ([] if backend == "reference" else ["gated_weighted_sum"] * 2)


def test_the_composition_takes_lists_of_the_rows_names(called: list[str]) -> None:
    given, exact = summed()
    given = [layer for layer in given if layer.kind in ("gated", "embedding")]
    by_name = {"xs": [layer.tensors[0] for layer in given], "gs": [layer.tensors[-1] for layer in given]}
    added = [layer for layer in given if layer.kind == "gated"]
    ops.clip_and_noise(
        **by_name,
        kinds=[layer.kind for layer in given],
        factors=FACTORS,
        outs=[layer.outs[0] for layer in given],
        gates=[layer.tensors[1] for layer in added],
        powers=[POWER] * len(added),
        padding_idxs=[1],
    )
    check_summed(given, exact)


def test_the_registered_ops_are_sound_with_it(called: list[str]) -> None:
    given, _ = summed()
    outs = [out for layer in given for out in layer.outs]
    packed = layers.pack(given, norms=False)
    torch.library.opcheck(torch.ops.dpkernels.weighted_sums.default, (*packed, FACTORS, outs))
    torch.library.opcheck(torch.ops.dpkernels.total_norm_sq.default, layers.pack(among_others(), norms=True))


def test_its_own_checks_refuse(called: list[str]) -> None:
    layer = gated()
    with pytest.raises(ValueError, match="power: expected a finite number"):
        ops.total_norm_sq([layer, layer._replace(options={"power": float("nan")})])
    with pytest.raises(ValueError, match=r"layers\[0\].options: expected power; given none"):
        ops.total_norm_sq([layer._replace(options={})])
    with pytest.raises(ValueError, match=r"layers\[0\].tensors: expected 3 \(x, gate, g\); given 2"):
        ops.total_norm_sq([layer._replace(tensors=layer.tensors[:2])])
    with pytest.raises(TypeError, match="gains: no kind of layer takes this"):
        ops.total_norm_sq([layer.tensors[0]], [layer.tensors[2]], ["gated"], gains=[1.0])


def test_without_its_row_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layers\[0\].kind: given 'gated'"):
        ops.total_norm_sq([gated()])


# ---- in a module's private step


@dataclass(eq=False)
class GatedRecord(Record):
    layer: str
    weight: nn.Parameter
    x: Tensor
    gate: Tensor
    g: Tensor

    def norm_sq(self) -> Tensor:
        raise AssertionError("asked alone")

    def add_weighted_sum(self, factors: Tensor, sums: Mapping[nn.Parameter, Tensor]) -> None:
        raise AssertionError("asked alone")

    def share(self) -> ops.GroupedLayer:
        return ops.GroupedLayer("gated", (self.x, self.gate, self.g), {"power": POWER})


class Gated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: Tensor) -> Tensor:
        return POWER * torch.sigmoid(x).detach() * x * self.weight


class GhostGated(GhostModule, Gated):
    ghost_covers = ("weight",)

    def forward(self, x: Tensor) -> Tensor:
        if not self._ghost_active(self.weight):
            return super().forward(x)
        return _Gated.apply(x, self.weight, self)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, layer: GhostGated) -> Tensor:
        ctx.tape, ctx.label, ctx.weight = layer.ghost_tape, layer.ghost_label(), weight
        ctx.save_for_backward(x, weight)
        return POWER * torch.sigmoid(x) * x * weight

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gate = torch.sigmoid(x)
        ctx.tape.add(GatedRecord(ctx.label, ctx.weight, x, gate, g))
        return POWER * gate * weight * g, None, None


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.gated, self.last = nn.Linear(6, 8), Gated(8), nn.Linear(8, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.gated(torch.tanh(self.first(x)))).mean(1)


register_swap(Gated, GhostGated)


def check_private_step() -> None:
    torch.manual_seed(3)
    run = private_run(sigma=0, clip=0.05, model=Net(), loss_fn=losses_of)
    exact = run.clipped_sum((0, 1, 2, 3))
    released = run.release((0, 1), (2, 3))
    for name, truth in exact.items():
        torch.testing.assert_close(released[name], truth / 8, rtol=1e-4, atol=1e-7)
    assert exact["gated.weight"].norm() > 0


def test_a_private_step(called: list[str]) -> None:
    check_private_step()
    assert {"gated_norm_sq", "gated_weighted_sum"} <= set(called)


def test_planted_option_that_is_dropped_is_caught(called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The row without its option: the kernels take another power."""
    real = gradients
    monkeypatch.setitem(globals(), "gradients", lambda x, gate, g, power: real(x, gate, g, 1.0))
    with pytest.raises(AssertionError):
        check_private_step()
