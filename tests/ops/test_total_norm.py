"""total_norm_sq: the squared norms of many layers' gradients in one call."""

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from dpkernels import ops
from dpkernels.backends import native, registry
from dpkernels.backends.native_ops import grouped as native_grouped
from dpkernels.backends.torch_ops import grouped as torch_grouped
from dpkernels.ops import layers
from tests.ops.cases import Case, as_lists, cancelling, make, served
from tests.ops.conftest import TRITON_DEVICE

CUDA = TRITON_DEVICE == "cuda"


def total(cases: list[Case]) -> Tensor:
    return ops.total_norm_sq(**as_lists(cases, norms=True))


def exact(cases: list[Case], i: int) -> Fraction:
    squares = [part.double().square().sum() for case in cases for part in case.gradients(i)]
    return sum((Fraction(float(square)) for square in squares), Fraction(0))


def never_below_nor_far_above(cases: list[Case], far: float = 5e-3) -> None:
    found = total(cases)
    assert found.dtype == torch.float32
    assert found.shape == (cases[0].batch,)
    for i in range(cases[0].batch):
        truth = exact(cases, i) * Fraction(1 - 1e-12)  # the truth is rounded, too
        assert truth <= Fraction(float(found[i])) <= truth * Fraction(1 + far)


def varied(dtype: torch.dtype = torch.float32) -> list[Case]:
    """Every family; of LoRA and narrow linear layers several shapes, aligned and not; vectors; a layer alone."""
    cases = [make(family, 3, 9 + i, dtype=dtype) for i, family in enumerate(served())]
    cases += [
        make("lora", 3, 70, d, p, rank=r, dtype=dtype) for d, p, r in ((32, 48, 8), (70, 33, 3), (64, 64, 40))
    ]
    cases += [make("linear", 3, 20, 80, 16, dtype=dtype), make("linear", 3, 20, 6, 90, dtype=dtype)]
    cases += [make("bias", 3, 1, p=n, dtype=dtype) for n in (5, 1100)]
    return [*cases, make("linear", 3, 40, 50, 60, dtype=dtype)]


@pytest.mark.thinned(10)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_sum_of_all_layers(backend: str, dtype: torch.dtype) -> None:
    never_below_nor_far_above(varied(dtype))


@pytest.mark.parametrize("sizes", [{"batch": 1}, {"frames": 1}, {"d": 1, "p": 1}], ids=str)
def test_single_samples_frames_and_columns(backend: str, sizes: dict[str, int]) -> None:
    never_below_nor_far_above(
        [make(family, **sizes) for family in ("lora", "linear", "bias") for _ in range(2)]
    )


def test_empty_batches_and_layers(backend: str) -> None:
    assert total([make("lora", 0), make("bias", 0, 1)]).shape == (0,)
    cases = [make("lora", 2, 0), make("linear", 2, 0, 40, 3), make("bias", 2, 1)]
    torch.testing.assert_close(total(cases), total(cases[2:]))


@pytest.mark.thinned(3)
def test_nothing_that_cancels_is_missed(bounded_backend: str) -> None:
    """The true norm is a thousandth of its terms."""
    cases = [
        cancelling(family, 8, 60, *sizes, epsilon=2.0**-8)
        for family, *sizes in (("lora", 24, 20), ("linear", 60, 12))
    ]
    found = total(cases)
    for i in range(8):
        assert Fraction(float(found[i])) >= exact(cases, i) * Fraction(1 - 1e-9)


def test_not_finite_stays_so(backend: str) -> None:
    cases = [make("lora"), make("bias", frames=1)]
    cases[0].tensors["g"][1] = torch.nan
    cases[1].tensors["g"][2] = torch.inf
    found = total(cases)
    assert found.isfinite().tolist() == [True, False, False]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("family", ["lora", "linear", "bias"])
def test_a_sample_does_not_depend_on_the_rest_of_its_batch(triton_backend: str, family: str) -> None:
    frames = 1 if family == "bias" else 70
    cases = [make(family, 4, frames, 40, 24) for _ in range(3)]
    together = total(cases)
    for i in range(4):
        assert torch.equal(total([case.alone(i) for case in cases])[0], together[i])


def test_same_bits_again_and_in_any_layout(triton_backend: str) -> None:
    cases = [make("lora", 3, 20, 32, 48, rank=8) for _ in range(2)]
    first = total(cases)
    assert torch.equal(first, total(cases))
    wider = [case.map(lambda t: torch.cat([t, t], 2)[..., : t.shape[2]]) for case in cases]
    torch.testing.assert_close(total(wider), first, rtol=1e-4, atol=0)


def test_layers_that_read_one_tensor(triton_backend: str) -> None:
    cases = [make("lora", 2, 20, 40, 24) for _ in range(3)]
    for case in cases[1:]:
        case.tensors["x"] = cases[0].tensors["x"]
    never_below_nor_far_above(cases)


@pytest.fixture
def threads() -> Iterator[None]:
    if native.library("cpu").handle is None:
        pytest.skip(native.library("cpu").reason)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_one_native_call_has_the_bits_of_a_call_a_layer(threads: None) -> None:
    """For every number of threads, with a layer that is worth all of them."""
    cases = [*varied(), make("linear", 3, 80, 640, 520)]
    cases[0].tensors["g"][1] = torch.nan
    given = as_lists(cases, norms=True)
    grouped = layers.from_columns(given.pop("xs"), given.pop("gs"), given.pop("kinds"), given)
    apart = torch_grouped.total_norm_sq(grouped)
    assert apart.isfinite().tolist() == [True, False, True]
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        torch.testing.assert_close(
            native_grouped.total_norm_sq(grouped), apart, rtol=0, atol=0, equal_nan=True
        )


def test_refused_by_name() -> None:
    case = make("lora").tensors
    lists = {"hs": [case["h"]], "dhs": [case["dh"]], "scalings": [1.0]}
    with pytest.raises(ValueError, match="given no layer"):
        ops.total_norm_sq([], [], [])
    with pytest.raises(ValueError, match="scalings: expected 1, one a lora layer"):
        ops.total_norm_sq([case["x"]], [case["g"]], ["lora"], **lists | {"scalings": []})
    with pytest.raises(ValueError, match="kinds: given 'conv'"):
        ops.total_norm_sq([case["x"]], [case["g"]], ["conv"])
    with pytest.raises(ValueError, match=r"gs\[1\]: expected a batch of 3"):
        ops.total_norm_sq([case["g"]] * 2, [case["g"], case["g"][:2]], ["bias", "bias"])


# ---- planted faults


def test_catches_a_layer_left_out(monkeypatch: pytest.MonkeyPatch, torch_backend: str) -> None:
    real = torch_grouped.norms_of
    monkeypatch.setattr(torch_grouped, "norms_of", lambda layer: real(layer)[:1])  # A's norm without B's
    with pytest.raises(AssertionError):
        never_below_nor_far_above(varied())


def test_catches_a_layer_left_out_of_the_native_call(monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    real = native_grouped._table
    monkeypatch.setattr(native_grouped, "_table", lambda layers, kept: real(layers[1:], kept))
    with pytest.raises(AssertionError):
        never_below_nor_far_above(varied())


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces what a grouped kernel calls; interpreted kernels only."""
    if CUDA:
        pytest.skip("faults are planted in interpreted kernels")
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "triton")
    return monkeypatch.setattr


def test_catches_a_grouped_norm_without_its_bound(plant: Callable[..., None]) -> None:
    from dpkernels.backends.triton_ops import grouped_kernels

    plant(grouped_kernels, "upper_square", lambda square, error: square.to(grouped_kernels.tl.float32))
    with pytest.raises(AssertionError):
        test_nothing_that_cancels_is_missed("triton")


def test_catches_a_last_piece_that_is_not_added(plant: Callable[..., None]) -> None:
    from dpkernels.backends.triton_ops import grouped

    real = grouped.Problem.fields

    def short(self: Any, first: int) -> list[int]:
        row = real(self, first)
        row[12] = max(1, row[12] - 1)
        return row

    plant(grouped.Problem, "fields", short)
    with pytest.raises(AssertionError):
        never_below_nor_far_above(varied())
