"""clip_factors: c·√norm_sq ≤ C exactly, as large as that allows, and 0 for what is no norm."""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpkernels import ops
from dpkernels.backends import native, registry
from tests.ops.checks import automatic_factors_within, factors_within

AVAILABLE = [
    b for b in ("reference", "torch", "native") if b != "native" or not native.unavailable_reason("cpu")
]
values = {
    torch.float32: st.floats(width=32),
    torch.float64: st.floats(width=64),
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exactly_within_and_not_smaller_than_needed(dtype: torch.dtype, backend: str) -> None:
    limits = st.floats(min_value=1e-6, max_value=1e6)

    @settings(max_examples=120, deadline=None, database=None, derandomize=True)
    @given(st.lists(values[dtype], min_size=1, max_size=6), limits)
    def check(squares: list[float], limit: float) -> None:
        factors_within(torch.tensor(squares, dtype=dtype), limit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(registry.ENVIRONMENT_VARIABLE, backend)
        check()


def test_near_the_limit_and_at_the_ends(backend: str) -> None:
    for limit in (1.0, 0.1, 3.0, 1e-3, 1e-30, 1e30):
        squares = [limit * limit * (1 + k * 2.0**-52) for k in range(-4, 5)]
        squares += [0.0, -0.0, 5e-324, sys.float_info.max, sys.float_info.min]
        factors_within(torch.tensor(squares, dtype=torch.float64), limit)
        factors_within(torch.tensor(squares, dtype=torch.float64).float(), limit)


def test_what_is_no_norm_gets_exactly_zero(backend: str) -> None:
    squares = torch.tensor([torch.nan, torch.inf, -torch.inf, -1.0, 0.0, 1.0, 4.0])
    factors = ops.clip_factors(squares, 1.0)
    assert torch.equal(factors[:4], torch.zeros(4))
    assert not factors.signbit().any()
    assert torch.equal(factors[4:6], torch.ones(2))
    assert 0.5 - 2.0**-24 <= factors[6] <= 0.5
    assert ops.clip_factors(torch.zeros(0), 1.0).shape == (0,)


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan, math.inf])
def test_a_limit_that_is_no_norm_is_refused(limit: float) -> None:
    with pytest.raises(ValueError, match="max_grad_norm"):
        ops.clip_factors(torch.ones(2), limit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64], ids=str)
def test_coarse_norms_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="norm_sq"):
        ops.clip_factors(torch.ones(2).to(dtype), 1.0)


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_automatic_factors_are_exactly_within_and_hardly_smaller(dtype: torch.dtype, backend: str) -> None:
    limits = st.floats(min_value=1e-6, max_value=1e6)

    @settings(max_examples=60, deadline=None, database=None, derandomize=True)
    @given(st.lists(values[dtype], min_size=1, max_size=6), limits, limits)
    def check(squares: list[float], limit: float, stability: float) -> None:
        automatic_factors_within(torch.tensor(squares, dtype=dtype), limit, stability)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(registry.ENVIRONMENT_VARIABLE, backend)
        check()


def test_automatic_factors_at_the_ends(backend: str) -> None:
    squares = torch.tensor([torch.nan, torch.inf, -torch.inf, -1.0, 0.0, 1.0], dtype=torch.float64)
    factors = ops.automatic_clip_factors(squares, 1.0, 0.01)
    assert torch.equal(factors[:4], torch.zeros(4))
    assert not factors.signbit().any()
    assert 100 * (1 - 2.0**-22) <= factors[4] <= 100
    assert ops.automatic_clip_factors(squares[:0], 1.0, 0.01).shape == (0,)
    # a quotient beyond float32 is its largest number
    assert ops.automatic_clip_factors(squares[4:5], 1e30, 1e-30) == torch.finfo(torch.float32).max
    automatic_factors_within(torch.tensor([5e-324, sys.float_info.max], dtype=torch.float64), 0.1, 0.01)


@pytest.mark.parametrize("stability", [0.0, -1.0, math.nan, math.inf])
def test_a_stability_that_is_no_norm_is_refused(stability: float) -> None:
    with pytest.raises(ValueError, match="stability"):
        ops.automatic_clip_factors(torch.ones(2), 1.0, stability)
