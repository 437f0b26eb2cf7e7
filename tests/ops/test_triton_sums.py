"""Weighted sums by Triton's kernels: how many float32 additions a term meets, and what examples do to each other's."""

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpkernels import ops
from dpkernels.backends.triton_ops import availability
from tests.ops.conftest import TRITON_DEVICE

if availability.unavailable_reason(TRITON_DEVICE):
    pytest.skip(availability.unavailable_reason(TRITON_DEVICE), allow_module_level=True)
import triton.language as tl

from dpkernels.backends.triton_ops import (
    bounds,
    configs,
    grouped,
    grouped_kernels,
    launching,
    linear_kernels,
)
from dpkernels.backends.triton_ops.device import add_sample, renewed
from dpkernels.backends.triton_ops.launching import kernel
from dpkernels.privacy.step.clipping import rounding_slack

pytestmark = pytest.mark.usefixtures("triton_backend")


def summed(way: str, x: Tensor, g: Tensor, factors: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Σ_i c_i g_iᵀx_i [p, d] by the kernel of one layer, without and with lengths, or by that of many layers."""
    out = torch.zeros(g.shape[2], x.shape[2], dtype=torch.float64)
    if way == "grouped":
        monkeypatch.setattr(grouped, "_FEWEST_PROGRAMS", 0)
        ops.weighted_sums([ops.GroupedLayer("linear", (x, g), outs=(out,))], factors)
    else:
        lengths = torch.full((len(x),), x.shape[1]) if way == "lengths" else None
        ops.linear_weighted_sum(x, g, factors, out, lengths=lengths)
    return out


@pytest.mark.parametrize("way", ["single", "lengths", "grouped"])
def test_a_long_sample_meets_no_more_roundings_than_its_norm_counts(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first piece of 2²⁴ takes the 1 of every piece that float32 adds to it: all of them, if nothing cut the sum."""
    frames = configs.config("linear_sum", torch.float32, 0).tiles["BT"]
    assert frames == configs.config("grouped_sums", torch.float32, 0).tiles["BT"]
    pieces = 4 * bounds.PIECES
    g = torch.zeros(1, pieces * frames, 16)
    g[0, ::frames] = 1.0
    g[0, 0] = 2.0**24
    given = summed(way, torch.ones(1, pieces * frames, 16), g, torch.ones(1), monkeypatch)
    lost = 2.0**24 + pieces - 1 - given
    assert (lost >= 1).all()  # the first pieces do meet in float32
    assert (lost <= bounds.PIECES).all()


@kernel
def pairs_of(values, factors, out, samples: int, one):
    """out [2, 16] float64: both numbers of the pair of Σ_i factors_i·values_i, values [samples, 16]."""
    columns = tl.arange(0, 16)
    total, rest = tl.zeros((16,), tl.float32), tl.zeros((16,), tl.float32)
    for i in range(0, samples):
        sample = i + tl.zeros((), tl.int64)
        value = tl.load(values + sample * 16 + columns)
        total, rest = add_sample(total, rest, tl.load(factors + sample), value, one, True)
        total, rest = renewed(total, rest, sample, True)
    tl.store(out + columns, total.to(tl.float64))
    tl.store(out + 16 + columns, rest.to(tl.float64))


def pairs(values: Tensor, factors: Tensor) -> Tensor:
    """[2, 16]: the pair of each column."""
    out = torch.zeros(2, 16, dtype=torch.float64)
    launching.execute(pairs_of, 1, values.device, (values, factors, out, len(values), 1.0), {})
    return out


def exact_sum(values: Tensor, factors: Tensor) -> Tensor:
    """Σ_i fl(c_i v_i) [16], of which only the last place of a float64 is rounded."""
    addends = (factors[:, None] * values).double().cpu()
    return torch.tensor([math.fsum(column) for column in addends.T.tolist()], dtype=torch.float64)


def most_off(samples: int) -> float:
    """What `bounds` derives for `samples` of norm 1."""
    return 20.2 * samples**2 * 2.0**-48


@pytest.mark.parametrize("samples", [1, 15, 16, 90])
@given(seed=st.integers(0, 2**31), spread=st.sampled_from([0, 1, 12, 24, 40]), cancel=st.booleans())
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_pair_holds_the_sum_of_any_examples(samples: int, seed: int, spread: int, cancel: bool) -> None:
    """Clipped vectors of norm 1 and of any smaller ones, in any order, each of which may take back the one before."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(samples, 16, generator=generator)
    values /= values.norm(dim=1, keepdim=True) * 2.0 ** (torch.rand(samples, 1, generator=generator) * spread)
    if cancel:
        values[1::2] = -values[: samples // 2 * 2 : 2] * (1 + 2.0**-22)
    factors = torch.rand(samples, generator=generator)
    off = pairs(values, factors).cpu().sum(0) - exact_sum(values, factors)
    assert float(off.norm()) <= most_off(samples)


def test_a_pair_is_renewed() -> None:
    """Roundings of one sign leave a rest of several units in the last place, unless it is brought back to the total."""
    samples = bounds.RENEWED
    values = torch.full((samples, 16), 1.0 + 3 * 2.0**-23)
    total, rest = pairs(values, torch.ones(samples))
    assert (rest.abs() <= bounds.UNIT * total).all()
    longer = torch.full((samples - 1, 16), 1.0 + 3 * 2.0**-23)
    total, rest = pairs(longer, torch.ones(samples - 1))
    assert (rest.abs() > bounds.UNIT * total).all()  # so the first assertion can fail


@pytest.mark.parametrize("way", ["single", "lengths", "grouped"])
def test_samples_that_are_left_out_do_not_put_the_renewal_off(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An example whose factor is 0 may stand wherever a pair is due."""
    if TRITON_DEVICE == "cuda":
        pytest.skip("what kernels call is seen in the interpreter")
    seen: list[int] = []

    def watch(total: Any, rest: Any, sample: Any, pairs: Any) -> tuple[Any, Any]:
        seen.append(int(sample))
        return total, rest

    for module in (linear_kernels, grouped_kernels):
        monkeypatch.setattr(module, "renewed", watch)
    factors = torch.tensor([1.0, 0.0, 1.0, 0.0])
    summed(way, torch.ones(4, 1, 16), torch.ones(4, 1, 16), factors, monkeypatch)
    assert seen == list(range(4))


@pytest.mark.parametrize("way", ["single", "lengths", "grouped"])
def test_sums_are_in_pairs_where_float64_is_slow(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No sum of float32 numbers comes as close; an example that is left out leaves no NaN behind."""
    samples = 20
    x, g = torch.ones(samples, 1, 16), torch.randn(samples, 1, 16)
    g[3] = torch.nan
    factors = torch.rand(samples).index_fill(0, torch.tensor([3]), 0.0)
    monkeypatch.setattr(bounds, "FLOAT64", ())
    given = summed(way, x, g, factors, monkeypatch)
    exact = exact_sum(g[:, 0].nan_to_num(), factors)
    assert float((given[:, 0].cpu() - exact).norm()) <= most_off(samples) * float(
        g[:, 0].nan_to_num().norm(dim=1).max()
    )


@pytest.mark.parametrize("way", ["single", "lengths", "grouped"])
def test_examples_of_several_pieces_are_never_in_pairs(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that cancel are far above C, and so would be the rounding that others share with them."""
    monkeypatch.setattr(bounds, "FLOAT64", ())
    said: list[bool] = []
    monkeypatch.setattr(launching, "execute", lambda *arguments: said.append(arguments[-1]["PAIRS"]))
    kernel_name = "grouped_sums" if way == "grouped" else "linear_sum"
    longest = bounds.PIECES * configs.config(kernel_name, torch.float32, 0).tiles["BT"]
    for frames in (longest, longest + 1):
        summed(way, torch.ones(1, frames, 16), torch.ones(1, frames, 16), torch.ones(1), monkeypatch)
    assert said == [True, False]


def test_the_slack_covers_pairs() -> None:
    """Neighbouring sums are each off by what `bounds` derives from the number of samples between renewals."""
    assert most_off(1) >= (1 + 3 / bounds.RENEWED) * (bounds.RENEWED + 1) * 2.0**-48
    for samples in (1, 2**10, 2**15, 2**20):
        assert 2 * most_off(samples) <= rounding_slack(samples)


@pytest.mark.parametrize("float64", [bounds.FLOAT64, ()], ids=["float64", "pairs"])
def test_every_kernel_adds_to_the_same_bits(
    float64: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles and launches are no part of a sum: each entry has its samples in order."""
    monkeypatch.setattr(bounds, "FLOAT64", float64)
    x, g, factors = torch.randn(18, 2, 16), torch.randn(18, 2, 16), torch.rand(18)
    single, lengths, many = (
        summed(way, x, g, factors, monkeypatch) for way in ("single", "lengths", "grouped")
    )
    assert torch.equal(single, lengths)
    assert torch.equal(single, many)
