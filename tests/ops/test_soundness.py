"""Extremes, precision settings, and faults planted to see that the checks of this folder catch them."""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpkernels import ops
from dpkernels.backends import bounds, registry
from dpkernels.backends.torch_ops import linear as torch_linear
from dpkernels.backends.torch_ops import samples
from tests.ops.cases import FAMILIES, cancelling, make
from tests.ops.checks import (
    added_within,
    alone_is_the_same,
    factors_within,
    never_below,
    not_far_above,
    sums_match,
    within,
)
from tests.slow import in_turns

LARGEST_HALF = 65504.0


@pytest.mark.thinned(5)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_largest_half_precision_values_do_not_overflow(backend: str, family: str) -> None:
    case = make(family, 2, 70, 8, 6, dtype=torch.float16).map(
        lambda t: torch.full_like(t, LARGEST_HALF) * t.sign()
    )
    assert all(norm_sq.isfinite().all() for norm_sq in case.norms())
    within(case, torch.float16)
    added_within(case, 1.0)


@pytest.mark.thinned(5)
@pytest.mark.parametrize(("scale", "family"), in_turns([1e-42, 1e-25, 1e-15, 1e9, 1e18, 1e30], FAMILIES))
def test_tiny_and_huge_values_stay_within_the_clipping_norm(backend: str, family: str, scale: float) -> None:
    """Squares and products leave float32's range here: upwards the sample is dropped, downwards never short."""
    case = make(family, 2, 9, 5, 4).map(lambda t: t * scale)
    added_within(case, 1.0)
    for norm_sq in case.norms():
        assert not norm_sq.isnan().any() or scale > 1e17
    if scale < 1e17:
        never_below(case)


@pytest.mark.thinned(15)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_that_is_not_finite_gets_factor_zero(backend: str, family: str, bad: float) -> None:
    for name in make(family).tensors:
        case = make(family, 3, 9)
        if not case.tensors[name].is_floating_point():
            continue
        if family == "embedding":
            case.tensors["ids"][1] = 2
        case.tensors[name][1].view(-1)[3] = bad
        squares = torch.stack(case.norms()).sum(0)
        factors = ops.clip_factors(squares, 1.0)
        assert not squares[1].isfinite()
        assert factors[1] == 0.0
        assert squares[[0, 2]].isfinite().all()
        assert (factors[[0, 2]] > 0.0).all()
        assert all(out.isfinite().all() for out in case.sums(factors))


def test_a_zero_gradient_does_not_hide_a_nan(backend: str) -> None:
    """0·NaN is NaN in the sum, so a norm that skipped zero rows of g would let it in."""
    case = make("linear", 2, 9)
    case.tensors["g"][0] = 0.0
    case.tensors["x"][0, 4, 1] = torch.nan
    assert ops.clip_factors(case.norms()[0], 1.0)[0] == 0.0


# ---- precision settings --------------------------------------------------------------------------------------


class BFloat16Products(TorchDispatchMode):
    """A device that takes the permission: float32 products on bfloat16 inputs unless precision is "highest"."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        products = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
        if func in products and args[0].dtype == torch.float32 and bounds.reduced_precision("cpu"):
            args = tuple(a.bfloat16().float() for a in args)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def medium_precision() -> Any:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def _check_under_reduced_precision() -> None:
    for method in ("direct", "gram"):
        case = make("linear", 4, 60, 24, 16)
        with BFloat16Products():
            squares = torch_linear.linear_norm_sq(case.tensors["x"], case.tensors["g"], method=method)
            out = torch.zeros(16, 24, dtype=torch.float64)
            torch_linear.linear_weighted_sum(case.tensors["x"], case.tensors["g"], torch.ones(4), out)
        exact = torch.stack([case.gradients(i)[0] for i in range(4)])
        assert (squares.double() >= exact.square().sum((1, 2))).all()
        assert (out - exact.sum(0)).norm() <= 1e-5 * exact.norm()


@pytest.mark.usefixtures("medium_precision")
def test_reduced_precision_products_are_not_used() -> None:
    assert bounds.reduced_precision("cpu")
    _check_under_reduced_precision()


@pytest.mark.usefixtures("medium_precision")
def test_the_check_catches_a_missing_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_linear, "exact_products", lambda like: nullcontext(torch.float32))
    with pytest.raises(AssertionError):
        _check_under_reduced_precision()


@pytest.mark.usefixtures("medium_precision")
def test_the_guard_changes_no_setting_that_other_threads_see() -> None:
    inside, settings = threading.Barrier(4), []

    def work() -> None:
        with bounds.exact_products(torch.zeros(1)) as dtype:
            inside.wait(timeout=30)
            settings.append((dtype, torch.get_float32_matmul_precision()))
            inside.wait(timeout=30)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert settings == [(torch.float64, "medium")] * 4
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.thinned(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_changes_no_bit(backend: str, family: str) -> None:
    case, factors = make(family, 2, 50, 24, 12), torch.tensor([0.5, 1.0])
    expected = case.norms() + case.sums(factors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = case.norms() + case.sums(factors)
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


# ---- planted faults ------------------------------------------------------------------------------------------


@pytest.fixture
def plant(torch_backend: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[..., Any]], None]:
    """Puts a faulty function in an op's place."""

    def put(op: str, function: Callable[..., Any]) -> None:
        entry = registry.OpBackend(op, "cpu", torch_backend, "a fault")
        monkeypatch.setitem(registry._chosen, (op, "cpu", torch_backend), (entry, function))

    return put


Plant = Callable[[str, Callable[..., Any]], None]


def test_catches_a_norm_in_bfloat16(plant: Plant) -> None:
    plant("linear_norm_sq", lambda x, g, **_: (g.mT.bfloat16() @ x.bfloat16()).float().square().sum((1, 2)))
    with pytest.raises(AssertionError):
        never_below(make("linear", 8, 50, 24, 12))


def test_catches_a_norm_without_its_bound(torch_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 products, float64 squares, rounded to nearest: off by 10⁻⁷ of the terms, but either way."""
    monkeypatch.setattr(torch_linear, "upper_square", lambda square, error: square.float())
    with pytest.raises(AssertionError):
        never_below(cancelling("linear", 8, 150, 24, 20, epsilon=2.0**-8), method="direct")


def test_catches_rounding_down(torch_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "upper_square", lambda square, error: bounds.round_down(square))
    with pytest.raises(AssertionError):
        never_below(make("bias", 8, 9, 24, 12))


def test_catches_a_norm_that_is_far_above(torch_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_linear, "upper_square", lambda square, error: (square * 1.01).float())
    with pytest.raises(AssertionError):
        not_far_above(make("linear", 8, 9, 24, 12), torch.float32)


def test_catches_a_sum_in_bfloat16(plant: Plant) -> None:
    def faulty(x: Tensor, g: Tensor, factors: Tensor, out: Tensor, **_: Any) -> None:
        weighted = (factors[:, None, None] * g).bfloat16()
        out += torch.einsum("btp,btd->pd", weighted.float(), x)

    plant("linear_weighted_sum", faulty)
    case = make("linear", 32, 1, 24, 12)
    with pytest.raises(AssertionError):
        added_within(case, 0.1)
    with pytest.raises(AssertionError):
        sums_match(case, torch.float32, torch.ones(32))


def test_catches_a_sum_that_multiplies_by_zero(plant: Plant) -> None:
    def faulty(x: Tensor, g: Tensor, factors: Tensor, out: Tensor, **_: Any) -> None:
        out += torch.einsum("b,btp,btd->pd", factors, g, x)

    plant("linear_weighted_sum", faulty)
    with pytest.raises(AssertionError):
        test_a_sample_that_is_not_finite_gets_factor_zero("torch", "linear", torch.nan)


def test_catches_reading_beyond_the_lengths(torch_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = torch.tensor([3, 5])
    case = make("linear", 2, 9, lengths=lengths)
    within(case, torch.float32)
    monkeypatch.setattr(torch_linear, "frames_of", lambda lengths, batch, frames: [frames] * batch)
    with pytest.raises(AssertionError):
        not_far_above(case, torch.float32)


def test_catches_a_method_chosen_for_the_batch(plant: Plant) -> None:
    honest = torch_linear.linear_norm_sq

    def faulty(x: Tensor, g: Tensor, **options: Any) -> Tensor:
        return honest(x, g, **{**options, "method": "gram" if len(x) > 1 else "direct"})

    plant("linear_norm_sq", faulty)
    with pytest.raises(AssertionError):
        alone_is_the_same(make("linear", 6, 50, 24, 12))


def test_catches_a_clip_factor_rounded_to_nearest(plant: Plant) -> None:
    plant("clip_factors", lambda norm_sq, limit: (limit / norm_sq.sqrt()).clamp(max=1.0).float())
    with pytest.raises(AssertionError):
        factors_within(torch.linspace(1.0, 50.0, 400), 1.0)
