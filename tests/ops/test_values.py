"""Every op on every backend against autograd of the layer in float64: values, bias, layouts, lengths."""

from dataclasses import replace

import pytest
import torch

from dpkernels import ops
from tests.ops.cases import FAMILIES, WITH_LENGTHS, cancelling, make
from tests.ops.checks import added_within, not_far_above, sums_match, within
from tests.ops.tolerances import DTYPES, MEAN_EXCESS

SIZES = [(3, 7, 5, 4), (1, 1, 1, 1), (2, 1, 33, 17), (2, 300, 33, 65), (3, 129, 16, 7)]
OF_FRAMES = [family for family in FAMILIES if family != "depthwise_conv1d"]  # tensors [B, T, *] or [B, T]
GRID = [(torch.float32, size) for size in SIZES] + [(dtype, (2, 139, 33, 17)) for dtype in DTYPES[1:]]


@pytest.mark.thinned(15)
@pytest.mark.parametrize(("dtype", "size"), GRID, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_norms_and_sums(backend: str, family: str, dtype: torch.dtype, size: tuple[int, ...]) -> None:
    case = make(family, *size, dtype=dtype)
    within(case, dtype)
    sums_match(case, dtype, torch.rand(case.batch) - 0.3, start=1.5)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_bound_costs_little(backend: str, family: str) -> None:
    """Signed bias: always above, and on average by less than the table says."""
    case = make(family, *((2, 150, 48, 40) if backend == "triton" else (4, 300, 64, 48)))
    assert 0.0 <= not_far_above(case, torch.float32) <= MEAN_EXCESS


@pytest.mark.parametrize("method", ["gram", "direct"])
@pytest.mark.parametrize("size", [(2, 300, 33, 65), (2, 40, 200, 100)], ids=str)
def test_linear_methods_agree(backend: str, size: tuple[int, ...], method: str) -> None:
    case = make("linear", *size)
    within(case, torch.float32, method=method)


@pytest.mark.parametrize("empty", [(0, 5, 3, 2), (2, 0, 3, 2), (2, 4, 0, 2)], ids=["B", "T", "d"])
@pytest.mark.parametrize("family", OF_FRAMES)
def test_empty_is_zero(backend: str, family: str, empty: tuple[int, ...]) -> None:
    case = make(family, *empty)
    for norm_sq in case.norms():
        if 0 in empty[:2] or family not in ("bias", "lora"):  # without d these have a gradient left
            assert torch.equal(norm_sq, torch.zeros(empty[0]))
    sums_match(case, torch.float32, torch.ones(case.batch), start=2.0)


def test_an_empty_convolution_is_zero(backend: str) -> None:
    for batch, frames in ((0, 9), (2, 0)):
        case = make("depthwise_conv1d", batch, frames)
        assert torch.equal(case.norms()[0], torch.zeros(batch))


@pytest.mark.parametrize("family", WITH_LENGTHS)
def test_frames_beyond_a_length_are_not_read(backend: str, family: str) -> None:
    lengths = torch.tensor([150, 0, 1, 77])
    case = make(family, 4, 150, 21, 18, lengths=lengths)
    for tensor in case.tensors.values():
        for i, n in enumerate(lengths.tolist()):
            tensor[i, n:] = torch.nan
    within(case, torch.float32)
    sums_match(case, torch.float32, torch.tensor([0.5, 1.0, -1.0, 0.25]))


def test_padding_ids_are_not_read(backend: str) -> None:
    case = make("embedding", 3, 20)
    case.tensors["ids"][0] = 1
    case.tensors["g"][case.tensors["ids"] == 1] = torch.nan
    norm_sq = case.norms()[0]
    assert norm_sq[0] == 0.0
    assert norm_sq[1:].isfinite().all()
    assert case.sums(torch.ones(3))[0].isfinite().all()
    for none in (None, -1):
        assert case.norms(padding_idx=none)[0].isnan().all()


@pytest.mark.thinned(5)
@pytest.mark.parametrize("family", FAMILIES)
def test_layout_does_not_matter(backend: str, family: str) -> None:
    """Transposed, strided and offset inputs, such as a pointwise convolution's."""
    case = make(family, 2, 65, 20, 12)
    strided = case.map(lambda t: torch.stack([t, t + 1], -1)[..., 0])
    transposed = case.map(lambda t: t.transpose(1, 2).contiguous().transpose(1, 2))
    for other in (strided, transposed):
        within(other, torch.float32)
        sums_match(other, torch.float32, torch.tensor([0.5, 1.0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_strided_out_is_added_to_in_place(backend: str, family: str) -> None:
    case, factors = make(family), torch.tensor([0.5, 0.0, 1.0])
    outs = [torch.zeros(*shape, 2, dtype=torch.float64)[..., 0] for shape in case.out_shapes]
    function = getattr(ops, f"{family}_weighted_sum")
    function(*case.tensors.values(), factors, *outs, **case.sum_options)
    for out, expected in zip(outs, case.sums(factors), strict=True):
        assert torch.allclose(out, expected, rtol=1e-6)
        assert out.abs().sum() > 0


@pytest.mark.thinned(5)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_float32_out_is_rounded_once(backend: str, family: str) -> None:
    """Many samples into float32: off by one rounding, not by one for each sample."""
    case, factors = make(family, 64, 3, 4, 3), torch.ones(64)
    wide, narrow = case.sums(factors), case.sums(factors, dtype=torch.float32)
    for exact, rounded in zip(wide, narrow, strict=True):
        assert ((rounded.double() - exact).abs() <= 2.0**-23 * exact.abs() + 1e-30).all()


@pytest.mark.thinned(5)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_sample_adds_is_within_the_clipping_norm(backend: str, family: str) -> None:
    batch = 3 if backend == "triton" else 6  # a sum for each sample: interpreted kernels are slow
    for dtype in (torch.float32, torch.bfloat16):
        added_within(make(family, batch, 50, 24, 12, dtype=dtype), 0.1)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("family", OF_FRAMES)
def test_cancellation(bounded_backend: str, family: str) -> None:
    """A true norm of 10⁻⁶ of the terms is not under-estimated, nor does what is added exceed C."""
    size = (
        (2, 50, 24, 20) if bounded_backend == "triton" else (8, 150, 24, 20)
    )  # interpreted kernels are slow
    case = cancelling(family, *size)
    if family == "embedding":
        case = replace(case, norm_options={"padding_idx": None}, sum_options={})
    within(case, torch.float32)
    added_within(case, 1e-3)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("epsilon", [2.0**-20, 2.0**-8])
@pytest.mark.parametrize("method", ["auto", "gram", "direct"])
def test_cancellation_by_either_method(bounded_backend: str, method: str, epsilon: float) -> None:
    case = cancelling("linear", 4, 30, 160, 120, epsilon)
    within(case, torch.float32, method=method)
