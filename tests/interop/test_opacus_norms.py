"""dpkernels.opacus: the same norms as float64 one-by-one gradients, and where Opacus's own are not."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("opacus", reason="opacus is installed with the [bench] extra only")

import opacus
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from torch.utils.data import DataLoader, TensorDataset

import dpkernels.opacus
from tests.interop.ghost import exact_norms, ghost_norms
from tests.ops.tolerances import MEAN_EXCESS, TRUTH_ROUNDING

B, T, D, P = 4, 64, 32, 48


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    dpkernels.opacus.unregister()


def normal(*shape: int) -> Tensor:
    return torch.randn(shape)


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 3, shape)


@dataclass(frozen=True)
class Case:
    """A layer, its input and its output's shape; batch first unless said otherwise."""

    layer: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    output: tuple[int, ...]
    frozen: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def made(self, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
        layer, x = self.layer().to(dtype), self.x()
        for name in self.frozen:
            getattr(layer, name).requires_grad_(False)
        return layer, x.to(dtype) if x.is_floating_point() else x, torch.randn(self.output).to(dtype)


def sequence() -> Tensor:
    return normal(B, T, D)


def channels() -> Tensor:
    return normal(B, D, T)


CASES = {
    "linear [B,T,d]": Case(lambda: nn.Linear(D, P), sequence, (B, T, P)),
    "linear [B,d]": Case(lambda: nn.Linear(D, P), lambda: normal(B, D), (B, P)),
    "linear [B,H,T,d]": Case(lambda: nn.Linear(D, P), lambda: normal(B, 4, 8, D), (B, 4, 8, P)),
    "linear, no bias": Case(lambda: nn.Linear(D, P, bias=False), sequence, (B, T, P)),
    "linear, frozen weight": Case(lambda: nn.Linear(D, P), sequence, (B, T, P), ("weight",)),
    "linear, frozen bias": Case(lambda: nn.Linear(D, P), sequence, (B, T, P), ("bias",)),
    "linear, long": Case(lambda: nn.Linear(8, 8), lambda: normal(2, 600, 8), (2, 600, 8)),
    "linear, one example": Case(lambda: nn.Linear(D, P), lambda: normal(1, T, D), (1, T, P)),
    "linear, batch second": Case(
        lambda: nn.Linear(D, P), lambda: normal(T, B, D), (T, B, P), options={"batch_first": False}
    ),
    "embedding": Case(lambda: nn.Embedding(7, D), lambda: ids(B, T), (B, T, D)),
    "embedding, one id": Case(lambda: nn.Embedding(7, D), lambda: ids(B), (B, D)),
    "embedding, padding": Case(lambda: nn.Embedding(7, D, padding_idx=1), lambda: ids(B, T), (B, T, D)),
    "embedding, batch second": Case(
        lambda: nn.Embedding(7, D), lambda: ids(T, B), (T, B, D), options={"batch_first": False}
    ),
    "layer norm": Case(lambda: nn.LayerNorm(D), sequence, (B, T, D)),
    "layer norm [B,d]": Case(lambda: nn.LayerNorm(D), lambda: normal(B, D), (B, D)),
    "layer norm, two sizes": Case(lambda: nn.LayerNorm((8, D)), lambda: normal(B, 5, 8, D), (B, 5, 8, D)),
    "layer norm, no bias": Case(lambda: nn.LayerNorm(D, bias=False), sequence, (B, T, D)),
    "layer norm, frozen weight": Case(lambda: nn.LayerNorm(D), sequence, (B, T, D), ("weight",)),
    "rms norm": Case(lambda: nn.RMSNorm(D), sequence, (B, T, D)),
    "group norm": Case(lambda: nn.GroupNorm(4, D), channels, (B, D, T)),
    "group norm [B,C]": Case(lambda: nn.GroupNorm(4, D), lambda: normal(B, D), (B, D)),
    "group norm [B,C,H,W]": Case(lambda: nn.GroupNorm(4, D), lambda: normal(B, D, 5, 3), (B, D, 5, 3)),
    "conv1d": Case(lambda: nn.Conv1d(D, P, 3, stride=2, dilation=2), channels, (B, P, 30)),
    "conv1d, pointwise": Case(lambda: nn.Conv1d(D, P, 1), channels, (B, P, T)),
    "conv1d, depthwise": Case(lambda: nn.Conv1d(D, D, 9, padding=4, groups=D), channels, (B, D, T)),
    "conv1d, depthwise strided": Case(
        lambda: nn.Conv1d(D, D, 5, stride=3, padding=2, dilation=2, groups=D), channels, (B, D, 20)
    ),
    "conv1d, grouped": Case(lambda: nn.Conv1d(D, P, 3, groups=4), channels, (B, P, T - 2)),
    "conv1d, same": Case(lambda: nn.Conv1d(D, P, 4, padding="same"), channels, (B, P, T)),
    "conv1d, circular": Case(
        lambda: nn.Conv1d(D, P, 3, padding=1, padding_mode="circular"), channels, (B, P, T)
    ),
    "conv2d": Case(lambda: nn.Conv2d(3, 5, 3, padding=1), lambda: normal(B, 3, 9, 7), (B, 5, 9, 7)),
    "conv2d, reflect": Case(
        lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"),
        lambda: normal(B, 3, 9, 7),
        (B, 5, 9, 7),
    ),
    "conv2d, depthwise": Case(
        lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), lambda: normal(B, 4, 9, 7), (B, 8, 9, 7)
    ),
}


def off(given: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, Tensor]:
    """name -> given/exact − 1, [B]."""
    assert given.keys() == exact.keys()
    return {name: given[name] / exact[name] - 1.0 for name in exact}


@pytest.mark.thinned(5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_norms_are_the_exact_ones_rounded_up(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    layer, x, g = case.made(dtype)
    with dpkernels.opacus.register():
        given = ghost_norms(layer, x, g, **case.options)
    for parameter, excess in off(given, exact_norms(layer, x, g, **case.options)).items():
        assert given[parameter].dtype == torch.float64
        assert float(excess.min()) >= -TRUTH_ROUNDING, parameter
        assert float(excess.max()) <= MEAN_EXCESS, parameter


@pytest.mark.parametrize("name", CASES)
def test_in_float32_opacus_agrees_or_is_known_to_be_off(name: str) -> None:
    """The shapes and layers that Opacus's own norms are wrong or missing for; the day one is fixed, this fails."""
    case = CASES[name]
    layer, x, g = case.made(torch.float32)
    refuses = {
        "linear [B,H,T,d]": AttributeError,  # no norm is made for a fourth dimension
        "layer norm, no bias": AttributeError,  # asks a bias of None whether it is trained
        "embedding, batch second": RuntimeError,  # .view of permuted ids
    }
    if name in refuses:
        with pytest.raises(refuses[name]):
            ghost_norms(layer, x, g, **case.options)
        return
    weight = off(ghost_norms(layer, x, g, **case.options), exact_norms(layer, x, g, **case.options)).get(
        "weight"
    )
    if name == "embedding, padding":  # counts what autograd leaves out
        assert weight is not None
        assert float(weight.min()) > 0.05
    elif name in ("conv1d, circular", "conv2d, reflect"):  # takes zeros for what the layer pads with
        assert weight is not None
        assert float(weight.abs().min()) > 1e-3
    elif weight is not None:
        assert float(weight.abs().max()) < 1e-5


def test_opacus_underestimates_in_bfloat16() -> None:
    for name in ("linear [B,T,d]", "layer norm", "rms norm", "group norm", "conv1d, depthwise", "conv1d"):
        lowest = math.inf
        for _ in range(5):
            layer, x, g = CASES[name].made(torch.bfloat16)
            found = off(ghost_norms(layer, x, g), exact_norms(layer, x, g))
            lowest = min(lowest, *(float(excess.min()) for excess in found.values()))
        assert lowest < -5e-4, name


def test_opacus_overflows_and_underflows_in_float16() -> None:
    layer, x, g = CASES["linear [B,T,d]"].made(torch.float16)
    loud, quiet = g, (g * 1e-5).half()
    assert ghost_norms(layer, x, loud)["weight"].isinf().all()
    found = ghost_norms(layer, x, quiet)
    assert not found["bias"].any()  # norm 0: a factor of 1 whatever the true norm is
    for one in (loud, quiet):
        with dpkernels.opacus.register():
            ours = ghost_norms(layer, x, one)
        for excess in off(ours, exact_norms(layer, x, one)).values():
            assert -TRUTH_ROUNDING <= float(excess.min()) <= float(excess.max()) <= MEAN_EXCESS


def cancelling(dtype: torch.dtype, rest: float) -> tuple[nn.Module, Tensor, Tensor]:
    """x constant in time and g of alternating sign, but for `rest`: Σ_t g_t x_tᵀ and Σ_t g_t cancel."""
    sign = torch.ones(T).view(1, T, 1)
    sign[:, 1::2] = -1
    x = normal(B, 1, D) + rest * normal(B, T, D)
    g = normal(B, 1, P) * sign + rest * normal(B, T, P)
    return nn.Linear(D, P).to(dtype), x.to(dtype), g.to(dtype)


@pytest.mark.parametrize(
    ("dtype", "rest"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)]
)
def test_cancellation_makes_opacus_say_zero(dtype: torch.dtype, rest: float) -> None:
    layer, x, g = cancelling(dtype, rest)
    exact = exact_norms(layer, x, g)
    theirs = ghost_norms(layer, x, g)
    assert any(float(norms.min()) == 0.0 for norms in theirs.values())  # a negative square, clamped
    with dpkernels.opacus.register():
        ours = ghost_norms(layer, x, g)
    for name, norms in ours.items():
        assert bool((norms >= exact[name]).all()), name


class Against(nn.Module):
    """Σ y ⊙ target of each example: its gradient of y is the target. Opacus reads and sets `reduction`."""

    def __init__(self) -> None:
        super().__init__()
        self.reduction = "mean"

    def forward(self, y: Tensor, target: Tensor) -> Tensor:
        losses = (y * target).flatten(1).sum(1)
        return losses if self.reduction == "none" else losses.mean()


def released(layer: nn.Module, x: Tensor, g: Tensor, clip: float) -> float:
    """‖the clipped gradient of the batch x‖ that Opacus's own loop hands to the optimizer, with σ = 0."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # Opacus: no secure generator, an optimizer with lr = 0, full backward hooks
        layer = copy.deepcopy(layer)
        model, optimizer, criterion, _ = opacus.PrivacyEngine().make_private(
            module=layer,
            optimizer=torch.optim.SGD(layer.parameters(), lr=0.0),
            data_loader=DataLoader(TensorDataset(x, g), batch_size=len(x)),
            criterion=Against(),
            noise_multiplier=0.0,
            max_grad_norm=clip,
            poisson_sampling=False,
            grad_sample_mode="ghost",
        )
        criterion(model(x), g).backward()
        optimizer.step()
    return math.sqrt(
        sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.requires_grad)
    ) * len(x)


def test_one_example_cannot_pass_the_clip_norm() -> None:
    layer, x, g = cancelling(torch.float32, 1e-5)
    unclipped = ghost_norms(layer, x, g)["weight"]
    i = int(unclipped.argmin())  # one that Opacus says 0 for
    layer.bias.requires_grad_(False)
    x, g = x[i : i + 1], 1e4 * g[i : i + 1]
    assert released(layer, x, g, clip=1.0) > 1.5
    with dpkernels.opacus.register():
        assert released(layer, x, g, clip=1.0) <= 1.0


def test_the_total_is_not_below_the_exact_one() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(D, P), nn.LayerNorm(P), nn.Tanh(), nn.Linear(P, 3))
    x, g = normal(B, T, D), normal(B, T, 3)
    exact = torch.stack(list(exact_norms(model, x, g).values())).norm(dim=0)
    with dpkernels.opacus.register(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = GradSampleModuleFastGradientClipping(model, loss_reduction="sum", max_grad_norm=0.5)
        wrapped(x).backward(g)
        factors = wrapped.get_clipping_coef()
    total = wrapped.per_sample_gradient_norms
    assert total.dtype == factors.dtype == torch.float64
    # the backward through the layers is float32 here and float64 there
    assert float((total / exact - 1).min()) > 0
    assert float((total / exact - 1).max()) < MEAN_EXCESS
    assert bool((factors * exact <= 0.5).all())


def test_a_norm_does_not_depend_on_the_rest_of_the_batch() -> None:
    for name in ("linear [B,T,d]", "embedding", "layer norm", "group norm", "conv1d", "conv1d, depthwise"):
        layer, x, g = CASES[name].made(torch.float32)
        with dpkernels.opacus.register():
            together = ghost_norms(layer, x, g)
            alone = [ghost_norms(layer, x[i : i + 1], g[i : i + 1]) for i in range(B)]
        for parameter, norms in together.items():
            assert torch.equal(norms, torch.cat([one[parameter] for one in alone])), (name, parameter)


def test_not_a_number_stays_with_its_example() -> None:
    layer, x, g = CASES["linear [B,T,d]"].made(torch.float32)
    changed = g.clone()
    changed[1, 3, 5] = torch.nan
    with dpkernels.opacus.register():
        clean, given = ghost_norms(layer, x, g), ghost_norms(layer, x, changed)
    for name in clean:
        assert given[name][1].isnan()
        keep = torch.arange(B) != 1
        assert torch.equal(given[name][keep], clean[name][keep])


def test_under_autocast_the_input_is_what_the_layer_computed_with() -> None:
    layer, x, g = CASES["linear [B,T,d]"].made(torch.float32)
    with dpkernels.opacus.register(), torch.autocast("cpu", dtype=torch.bfloat16):
        given = ghost_norms(layer, x, g)
    excess = off(given, exact_norms(layer, x.bfloat16(), g.bfloat16()))["weight"]
    assert -TRUTH_ROUNDING <= float(excess.min()) <= float(excess.max()) <= MEAN_EXCESS


def test_an_empty_batch_has_no_norms() -> None:
    for name in ("linear [B,T,d]", "embedding", "layer norm", "conv1d"):
        layer, x, g = CASES[name].made(torch.float32)
        with dpkernels.opacus.register():
            assert all(norms.shape == (0,) for norms in ghost_norms(layer, x[:0], g[:0]).values()), name


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_an_embedding_that_mixes_examples_is_refused(option: dict[str, Any]) -> None:
    layer = nn.Embedding(7, D, **option)
    with (
        dpkernels.opacus.register(),
        pytest.raises(NotImplementedError, match=f"{next(iter(option))}=.*freeze it"),
    ):
        ghost_norms(layer, ids(B, T), normal(B, T, D))
