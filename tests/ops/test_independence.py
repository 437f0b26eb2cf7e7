"""What a sample's result may depend on: itself. Not the rest of the batch, padding, unread memory, or the run."""

import pytest
import torch

from tests.ops.cases import FAMILIES, WITH_LENGTHS, make
from tests.ops.checks import alone_is_the_same


@pytest.mark.thinned(5)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_norm_does_not_depend_on_the_rest_of_the_batch(backend: str, family: str) -> None:
    for size in ((5, 33, 24, 12), (3, 7, 5, 3), (2, 1, 3, 1)):
        alone_is_the_same(make(family, *size))
    frames = 70 if backend == "triton" else 150  # interpreted kernels are slow
    alone_is_the_same(make(family, 3, frames, 48, 40, dtype=torch.bfloat16))


@pytest.mark.thinned(5)
@pytest.mark.parametrize("family", WITH_LENGTHS)
def test_a_norm_does_not_depend_on_padding(backend: str, family: str) -> None:
    lengths = torch.tensor([150, 1, 129, 0, 64])
    alone_is_the_same(make(family, 5, 150, 37, 29, lengths=lengths))


@pytest.mark.thinned(5)
@pytest.mark.parametrize("method", ["auto", "gram", "direct"])
def test_large_linear_norms_do_not_depend_on_the_rest_of_the_batch(bounded_backend: str, method: str) -> None:
    """Sizes at which BLAS blocks, threads and aligns; the odd width moves the alignment of each sample."""
    lengths, size = torch.tensor([200, 131, 17]), (3, 200, 515, 260)
    if bounded_backend == "triton":  # a few of its tiles each way; interpreted kernels are slow
        lengths, size = torch.tensor([100, 65, 17]), (3, 100, 131, 70)
    alone_is_the_same(make("linear", *size, lengths=lengths), method=method)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_with_factor_zero_is_not_read(backend: str, family: str) -> None:
    case, factors = make(family, 4, 40, 21, 18), torch.tensor([0.5, 0.0, 1.0, -0.0])
    expected = case.sums(factors)
    for name, tensor in case.tensors.items():
        tensor[[1, 3]] = 0 if name == "ids" else torch.nan
    for given, clean in zip(case.sums(factors), expected, strict=True):
        assert torch.equal(given, clean)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_inputs_give_the_same_bits(backend: str, family: str) -> None:
    size = (2, 70, 40, 33) if backend == "triton" else (2, 140, 64, 48)  # interpreted kernels are slow
    case, factors = make(family, *size), torch.rand(2)
    first = case.norms() + case.sums(factors)
    clutter = [torch.randn(n) for n in (1001, 77, 4099)]  # other addresses for the second run's memory
    second = case.norms() + case.sums(factors)
    assert len(clutter) == 3
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def poisoned() -> object:
    """torch.empty is filled with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_uninitialised_memory_is_used(backend: str, family: str, request: pytest.FixtureRequest) -> None:
    factors = torch.tensor([0.5, 0.0, 1.0])
    case = make(family, 3, 40, 21, 18, lengths=torch.tensor([40, 7, 0]) if family in WITH_LENGTHS else None)
    expected = case.norms() + case.sums(factors)
    request.getfixturevalue("poisoned")
    given = case.norms() + case.sums(factors)
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
