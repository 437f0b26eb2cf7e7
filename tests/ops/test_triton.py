"""Triton kernels: what only they have. Everything else runs on them too, in the other files of this folder.

On a machine without a GPU they are interpreted (`tests/conftest.py`); with one these tests carry the mark `gpu`.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dpkernels.backends import registry
from dpkernels.backends.triton_ops import availability
from tests.ops.cases import cancelling, make
from tests.ops.checks import added_within, alone_is_the_same, never_below, not_far_above, sums_match, within
from tests.ops.conftest import TRITON_DEVICE
from tests.ops.test_total_norm import total

if availability.unavailable_reason(TRITON_DEVICE):
    pytest.skip(availability.unavailable_reason(TRITON_DEVICE), allow_module_level=True)
from dpkernels.backends import triton_ops
from dpkernels.backends.triton_ops import (
    bias,
    bounds,
    configs,
    device,
    frame_kernels,
    launching,
    linear,
    linear_kernels,
    lora,
    tensor_cores,
    vectors,
)
from dpkernels.backends.triton_ops.linear_kernels import GRAM_OPERATIONS

pytestmark = pytest.mark.usefixtures("triton_backend")
HALVES = (torch.bfloat16, torch.float16)
CUDA = TRITON_DEVICE == "cuda"


def served() -> list[str]:
    """Families that have Triton kernels."""
    return [f for f, found in registry.families().items() if all(hasattr(triton_ops, op) for op in found)]


def test_these_families_are_served_by_triton_and_not_by_a_fallback() -> None:
    assert {"linear", "bias", "lora"} <= set(served())
    for family in served():
        for op in registry.families()[family]:
            assert registry.implementation(op, TRITON_DEVICE) is getattr(triton_ops, op)


def test_float64_goes_to_the_torch_composition_norm_and_sum_alike() -> None:
    case = make("linear", 2, 9, dtype=torch.float64)
    within(case, torch.float64)
    sums_match(case, torch.float64, torch.ones(2))


# ---- which samples are computed how --------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...]]]:
    """(kernel, arguments) of every launch, which still happens."""
    seen: list[tuple[str, tuple[Any, ...]]] = []
    honest = launching.execute

    def watch(function: Any, programs: int, device: Any, arguments: Any, keywords: Any) -> None:
        honest(function, programs, device, arguments, keywords)
        seen.append((function.__name__, arguments))

    monkeypatch.setattr(launching, "execute", watch)
    return seen


def again(launched: list[tuple[str, tuple[Any, ...]]]) -> list[int]:
    """The flags of the samples that direct computes."""
    names = [name for name, _ in launched]
    parameters = list(inspect.signature(linear_kernels.finish_gram.fn).parameters)
    flags: Tensor = launched[names.index("finish_gram")][1][parameters.index("again")]
    return [int(flag) for flag in flags.cpu()]


def test_the_method_follows_each_samples_own_length(launched: list[tuple[str, tuple[Any, ...]]]) -> None:
    """d = p = 32: half-Gram below 32 frames. Equal frames keep its bound tight, so none is redone."""
    assert GRAM_OPERATIONS == 1.0
    lengths = torch.tensor([31, 32, 0, 5, 70])
    case = make("linear", 5, 70, 32, 32, lengths=lengths)
    for tensor in case.tensors.values():
        tensor[:] = tensor[:, :1] + 0.001 * tensor
    never_below(case)
    not_far_above(case, torch.float32, method="auto")
    assert again(launched) == [0, 1, 0, 0, 1]


def test_a_loose_gram_bound_is_redone_by_direct(launched: list[tuple[str, tuple[Any, ...]]]) -> None:
    """Cancelling frames: the bound, relative to what is left, passes 1 %."""
    case = cancelling("linear", 3, 20, 64, 48)
    within(case, torch.float32, method="gram")
    assert again(launched) == [1, 1, 1]


def test_no_gram_kernel_where_every_sample_is_long(launched: list[tuple[str, tuple[Any, ...]]]) -> None:
    """And no kernel for row norms where every sample is short."""
    always = {"frames_that_count", "order_frames", "linear_direct", "finish_direct"}
    make("linear", 2, 40, 8, 8).norms(method="direct")
    assert {name for name, _ in launched} == always | {"linear_rows"}
    launched.clear()
    make("linear", 2, 4, 32, 32).norms()
    assert {name for name, _ in launched} == always | {"linear_gram", "finish_gram"}


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("rank", "dtype"), [(1, torch.bfloat16), (16, torch.float32), (40, torch.bfloat16)])
def test_every_lora_rank(rank: int, dtype: torch.dtype) -> None:
    """Below, at and above what one program takes of the narrow matrix."""
    case = make("lora", 2, 40, 17, 70, rank=rank, dtype=dtype)
    within(case, dtype)
    sums_match(case, dtype, torch.tensor([0.5, -1.0]))
    alone_is_the_same(case)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("family", ["linear", "lora", "bias"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_aligned_loads_change_nothing(family: str, dtype: torch.dtype) -> None:
    """Multiples of 16 take the wide loads; a start that is no multiple of 16 bytes is copied first."""
    lengths = torch.tensor([70, 3])
    case = make(family, 2, 70, 48, 32, dtype=dtype, rank=16, lengths=lengths)
    offset = case.map(lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape))
    if not CUDA:
        assert all(t.data_ptr() % 16 for t in offset.tensors.values())
    for one in (case, offset):
        within(one, dtype)
        sums_match(one, dtype, torch.tensor([0.5, 1.0]))
    assert all(torch.equal(a, b) for a, b in zip(case.norms(), offset.norms(), strict=True))


# ---- bounds --------------------------------------------------------------------------------------------------


MAKERS = {"linear": ("linear_sum", "grouped_sums"), "lora": ("lora_pieces", "grouped_sums")}
"""The kernels that may make a family's sum: written down here once more, so that one left out there is noticed."""


@pytest.mark.parametrize("family", MAKERS)
def test_the_bound_of_the_sum_covers_every_configuration(family: str) -> None:
    """The norm is told the chains of the sum's kernels for any layout; they must be those that run."""
    for dtype in (torch.float32, torch.bfloat16):
        for architecture in (0, 80, 90, 100, 103, 120):
            most = configs.largest(configs.SUMS[family], "BT", dtype, architecture)
            for kernel in MAKERS[family]:
                for aligned in (True, False):
                    tile = configs.config(kernel, dtype, architecture, aligned).tiles["BT"]
                    assert tile <= most <= bounds.CHAIN


def test_a_variant_for_long_samples_has_the_same_bound() -> None:
    """A longer example may send all others there: accumulations and strips, by which S is bounded, stay as they are."""
    variants = {name for name in configs.CONFIGS if name.split(" ")[1:2] == ["long"]}
    assert {name.split(" ")[0] for name in variants} == {
        "linear_direct",
        "lora_pieces",
        "lora_forms",
        "grouped_norms",
    }
    for dtype in (torch.float32, torch.bfloat16):
        for architecture in (0, 80, 90, 100, 103, 120):
            for name in variants:
                usual, long = (
                    configs.config(n, dtype, architecture) for n in (name.replace(" long", ""), name)
                )
                same = {"BT"} if name.startswith("linear_direct") else long.tiles.keys()
                assert all(usual.tiles[tile] == long.tiles[tile] for tile in same), name


@pytest.mark.parametrize("way", ["single", "grouped"])
@pytest.mark.parametrize("family", MAKERS)
def test_every_norm_is_rounded_up_for_every_kernel_that_sums(
    family: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the last kernel of a norm is given, of one layer and of many; the planted tile is in one sum only."""
    if CUDA:
        pytest.skip("tiles are planted that a GPU may not have the memory for; what is checked is the host's")
    case = make(family, 1, 8, 32, 16, rank=8)
    given: list[dict[str, Any]] = []
    honest = launching.execute

    def watch(function: Any, programs: int, device: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        honest(function, programs, device, arguments, keywords)
        if function.__name__.startswith("finish"):
            given.append(keywords)

    monkeypatch.setattr(launching, "execute", watch)
    for kernel in MAKERS[family]:
        for layout in ("", " unaligned"):
            entry = configs.config(kernel, torch.float32, 0, not layout)
            for frames in (8, 128):
                planted = configs.Config(entry.tiles | {"BT": frames}, entry.warps, entry.stages)
                with monkeypatch.context() as patched:
                    patched.setitem(configs.CONFIGS, kernel + layout, {(4, configs.ANY): planted})
                    given.clear()
                    case.norms() if way == "single" else total([case])
                assert given
                for keywords in given:
                    said = keywords.get("ROUNDINGS", keywords.get("SUM_ROUNDINGS"))
                    assert said >= frames + 1 + bounds.PIECES


@pytest.mark.parametrize("way", ["linear", "lora", "grouped"])
def test_a_norms_float32_sums_end_after_some_pieces(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """1, and behind it pieces that float32 cannot add to 1 one by one: without a bound, the norm shows which it has."""
    if CUDA:
        pytest.skip("a bound of 0 is planted in interpreted kernels")
    for module in (linear_kernels, device):
        monkeypatch.setattr(module, "gamma", lambda roundings: roundings * 0.0)
    case = make("linear" if way == "linear" else "lora", 1, 192, 1, 1, rank=1)
    for tensor in case.tensors.values():
        tensor[:, 0], tensor[:, 1:] = 1.0, 2.0**-15
    direct, given = {"method": "direct"} if way == "linear" else {}, {}
    for pieces in (2, bounds.PIECES):
        for module in (bounds, linear_kernels, lora):
            monkeypatch.setattr(module, "PIECES", pieces)
        given[pieces] = float(total([case]) if way == "grouped" else case.norms(**direct)[0])
    assert given[2] > given[bounds.PIECES] * (1.0 + 2.0**-23)


@pytest.mark.parametrize("method", ["gram", "direct"])
def test_subnormal_halves_count_as_normal_numbers(method: str) -> None:
    """A tensor core may align them by the exponent of the smallest normal number: δ is in the bound, and is needed."""
    case = make("linear", 1, 40, 16, 16, dtype=torch.float16).map(lambda t: t * 2.0**-20)
    never_below(case, method=method)
    delta = 2 * torch.finfo(torch.float16).smallest_normal
    norms = [t[0].double().norm(dim=1) for t in case.tensors.values()]
    terms = float(((norms[0] + delta * 4) * (norms[1] + delta * 4)).sum())
    assert delta > float(norms[0].max()) / 4
    least = tensor_cores.roundings(case.tensors["x"]) * 32 * bounds.UNIT * terms  # of the sum alone
    assert float(case.norms(method=method)[0]) ** 0.5 >= float(case.gradients(0)[0].norm()) + least


# ---- planted faults ------------------------------------------------------------------------------------------

Fault = Callable[[Any, str, Callable[..., Any]], None]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Fault:
    """Replaces what a kernel calls, in the module that the kernel looks it up in; interpreted kernels only."""
    if CUDA:
        pytest.skip("faults are planted in interpreted kernels")
    return lambda module, name, fault: monkeypatch.setattr(module, name, fault)


def test_catches_a_norm_without_its_bound(plant: Fault) -> None:
    def faulty(square: Any, error: Any) -> Any:
        return linear_kernels.tl.sqrt(square * square).to(linear_kernels.tl.float32)

    for module in (linear_kernels, vectors):
        plant(module, "upper_square", faulty)
    for family in ("linear", "lora", "bias"):
        with pytest.raises(AssertionError):
            never_below(cancelling(family, 8, 60, 24, 20, epsilon=2.0**-8))


def test_catches_reading_beyond_the_lengths(plant: Fault) -> None:
    for module in (frame_kernels, lora, bias):
        plant(
            module,
            "frames_of",
            lambda lengths, sample, frames: linear_kernels.tl.zeros((), linear_kernels.tl.int32) + frames,
        )
    for family in ("linear", "lora", "bias"):
        case = make(family, 2, 70, lengths=torch.tensor([3, 5]))
        with pytest.raises(AssertionError):
            not_far_above(case, torch.float32)


def test_catches_off_diagonal_blocks_counted_once(plant: Fault) -> None:
    """Frames of one direction: the blocks below the diagonal hold half of the square."""
    case = make("linear", 2, 130, 40, 40)
    for tensor in case.tensors.values():
        tensor[:] = tensor[:, :1] + 0.001 * tensor
    never_below(case, method="gram")
    plant(linear_kernels, "occurrences", lambda s, t: 1.0)
    plant(linear_kernels, "GRAM_SHARE", 1.0)  # or direct would fix it
    with pytest.raises(AssertionError):
        never_below(case, method="gram")


def test_catches_a_method_that_depends_on_the_batch(plant: Fault) -> None:
    honest = linear.linear_norm_sq

    def faulty(x: Tensor, g: Tensor, **options: Any) -> Tensor:
        return honest(x, g, **{**options, "method": "gram" if len(x) > 1 else "direct"})

    key = ("linear_norm_sq", TRITON_DEVICE, "triton")
    plant(registry, "_chosen", {key: (registry.OpBackend(*key, "a fault"), faulty)})
    with pytest.raises(AssertionError):
        alone_is_the_same(make("linear", 3, 50, 24, 12))


@pytest.mark.parametrize("family", ["linear", "lora", "bias"])
def test_catches_a_sum_that_multiplies_by_zero(plant: Fault, family: str) -> None:
    case = make(family, 2, 9)
    case.tensors["g"][1] = torch.nan
    factors = torch.tensor([1.0, 0.0])
    assert all(out.isfinite().all() for out in case.sums(factors))
    if family == "linear":  # its sum has a branch on the factor where there are no lengths
        case = replace(case, lengths=torch.tensor([9, 9]))
        assert all(out.isfinite().all() for out in case.sums(factors))
    for module in (linear_kernels, lora, bias):
        plant(module, "frames_added", lambda factor, lengths, sample, frames: frames)
    plant(vectors.tl, "where", lambda condition, a, b: a)
    assert not all(out.isfinite().all() for out in case.sums(factors))


def test_the_bound_costs_little_in_half_precision() -> None:
    """A clipping factor loses less than 0.1 % with direct and less than 1 % with gram; squares lose twice that."""
    case = make("linear", 2, 150, 48, 40, dtype=torch.bfloat16)
    assert 0.0 <= not_far_above(case, torch.bfloat16, method="direct") <= 2e-3
    assert 0.0 <= not_far_above(case, torch.bfloat16, method="gram") <= 2e-2


def test_what_a_half_precision_sample_adds_is_within_the_clipping_norm() -> None:
    added_within(make("linear", 2, 150, 40, 36, dtype=torch.float16), 0.1)
    added_within(make("lora", 2, 150, 40, 36, dtype=torch.bfloat16), 0.1)
