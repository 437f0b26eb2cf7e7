"""How tensor cores round: the GPU here is no coarser than assumed, and the probes that say so find what is planted."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from triton.runtime.interpreter import TensorHandle

from bench.gpu import tensor_cores as probes
from bench.gpu.tensor_core_model import CUTS, Model
from bench.gpu.tensor_core_search import Dots, random_rows
from dpkernels import ops
from dpkernels.backends import registry
from dpkernels.backends.triton_ops import bounds, launching, linear_kernels, tensor_cores
from tests.ops.cases import Case, make
from tests.ops.checks import never_below
from tests.slow import covering

HALVES = (torch.bfloat16, torch.float16)
CORES = sorted({*bounds.TENSOR_CORES.values(), bounds.COARSEST}, key=lambda core: core.block)


def measure(
    model: Dots,
    assumed: bounds.TensorCore,
    dtype: torch.dtype = torch.float16,
    chain: int = 64,
    rounds: int = 20,
) -> probes.Found:
    return probes.measure(model, dtype, chain, assumed, rows=100, rounds=rounds)


# ---- the probes, on devices in software ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("core", "dtype"), covering(CORES, HALVES, together=1), ids=str)
def test_an_assumed_device_is_found_out_and_stays_within_its_bound(
    core: bounds.TensorCore, dtype: torch.dtype
) -> None:
    for chain in (16, 64, 128):
        found = measure(Model(core.block, core.extra), core, dtype, chain)
        assert found.faults(core) == []
        assert found.blocks == [core.block] * (chain // core.block)
        assert found.in_order
        assert {bits for bits in found.kept if bits is not None} == {23 + core.extra}
        assert (found.align, found.final) == ("toward zero", "toward zero")
        assert found.accumulator == ("aligned with the products" if chain > core.block else "unknown")
        assert found.subnormals
        assert found.subnormal_exponent == 0
        assert found.antisymmetric
        assert found.model_agrees == 1.0
        # the bound is not far from what such a device can do, or the search not far from the worst
        assert found.worst >= 0.6


@pytest.mark.thinned(10)
@pytest.mark.parametrize(("late", "final", "align"), covering([False, True], CUTS, CUTS))
def test_every_property_of_a_device_is_told_from_the_others(align: str, final: str, late: bool) -> None:
    for block, extra in ((4, 0), (16, 3), (32, 2)):
        device = Model(block, extra, align, final, late)
        found = measure(device, bounds.COARSEST, rounds=1)
        assert (found.block, found.extra) == (block, extra)
        assert (found.align, found.final) == (align, final)
        assert found.antisymmetric == ("down" not in (align, final))
        assert found.accumulator == ("added to their sum" if late else "aligned with the products")
        assert found.model_agrees == 1.0


def test_the_order_of_the_products_is_found() -> None:
    """Blocks of every fourth product, as a device or a compiler might form them."""
    order = torch.arange(64).view(16, 4).T.flatten()

    def device(a: Tensor, b: Tensor) -> Tensor:
        return Model(16, 2)(a[:, order], b[:, order])

    found = measure(device, bounds.TensorCore(16, 2), rounds=5)
    assert found.blocks == [16, 16, 16, 16]
    assert not found.in_order
    assert found.faults(bounds.TensorCore(16, 2)) == []


def short(a: Tensor, b: Tensor) -> Tensor:
    """A device as assumed of sm_90, but for the last bit of its results."""
    return (Model(16, 2)(a, b).view(torch.int32) & -2).view(torch.float32)


# ---- planted: devices that are coarser than assumed ----------------------------------------------------------


@pytest.mark.thinned(5)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("block", "extra"), [(4, 0), (16, 1), (8, 1), (16, 0)])
def test_catches_a_coarser_device_by_its_properties_and_by_its_error(
    dtype: torch.dtype, block: int, extra: int
) -> None:
    assumed = bounds.tensor_core(90)
    found = measure(Model(block, extra), assumed, dtype)
    assert any("extra bits" in fault for fault in found.faults(assumed))
    assert any("blocks" in fault for fault in found.faults(assumed)) == (block < assumed.block)
    assert found.worst > 1.0


def test_catches_lost_subnormals_a_lost_last_bit_and_a_chain_that_is_summed_one_by_one() -> None:
    found = measure(Model(16, 2, subnormals=False), bounds.COARSEST, rounds=1)
    assert [fault.split(": ")[1] for fault in found.faults(bounds.COARSEST)] == ["subnormal factors are lost"]
    found = measure(short, bounds.tensor_core(90), rounds=1)
    assert any("the last place of a sum" in fault for fault in found.faults(bounds.tensor_core(90)))
    found = measure(Model(1, 0), bounds.COARSEST, rounds=1)
    assert any("blocks of 1" in fault for fault in found.faults(bounds.COARSEST))


def test_a_zero_that_moves_the_alignment_is_seen() -> None:
    """It is no fault: the bound counts it as the smallest normal number."""
    found = measure(Model(16, 2, zeros=True), bounds.COARSEST, rounds=1)
    assert found.zero_counts
    assert found.faults(bounds.COARSEST) == []


def test_the_exit_status_and_the_file_say_what_was_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the experiments; the search for the worst error is above."""
    honest = probes.measure
    monkeypatch.setattr(probes, "measure", lambda *given, **named: honest(*given, **{**named, "rounds": 1}))
    file = tmp_path / "found.json"
    assert probes.main(["--model", "16,2", "--architecture", "90", "--output", str(file)]) == 0
    assert json.loads(file.read_text(encoding="utf-8"))["found"][0]["kept"] == [25, 25, 25]
    assert probes.main(["--model", "8,1", "--architecture", "90"]) == 1
    assert json.loads(capsys.readouterr().out.partition("\n}\n")[2])["faults"]


# ---- what is assumed, and what is asked at the first use -----------------------------------------------------


def test_every_architecture_has_the_roundings_that_are_published_and_others_the_coarsest() -> None:
    published = {80: 1.375, 86: 1.375, 89: 1.375, 90: 0.65625, 100: 0.65625, 120: 0.65625}
    for architecture in (0, 70, 75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121):
        for dtype in HALVES:
            roundings = bounds.roundings(dtype, architecture)
            assert roundings == published.get(architecture, 3.0)
            # a kernel's constants are float32
            assert (
                float(torch.tensor(roundings * bounds.CHAIN + 1.0, dtype=torch.float32)) == roundings * 64 + 1
            )
        assert bounds.roundings(torch.float32, architecture) == 1.0


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_questions_at_first_use_are_answered_by_what_is_assumed_or_better(dtype: torch.dtype) -> None:
    for core in CORES:
        for better in (
            Model(core.block, core.extra),
            Model(2 * core.block, core.extra + 1),
            Model(core.block, core.extra, final="to nearest"),
            Model(core.block, core.extra, late=True),
        ):
            assert tensor_cores.answers_as_assumed(core, dtype, better)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_questions_at_first_use_catch_what_is_coarser(dtype: torch.dtype) -> None:
    core = bounds.tensor_core(90)
    for block, extra in ((4, 0), (8, 1), (16, 1), (8, 2), (4, 2), (16, 0), (1, 25)):
        assert not tensor_cores.answers_as_assumed(core, dtype, Model(block, extra))
    assert not tensor_cores.answers_as_assumed(core, dtype, Model(16, 2, subnormals=False))
    assert not tensor_cores.answers_as_assumed(core, dtype, short)
    assert not tensor_cores.answers_as_assumed(bounds.tensor_core(80), dtype, Model(4, 0))


@pytest.mark.parametrize(
    ("of_large", "of_small", "architecture", "trusted"),
    [
        (Model(16, 2), Model(16, 2), 90, 90),
        (Model(8, 1), Model(16, 2), 90, 0),
        (Model(16, 2), Model(8, 1), 90, 0),
        (Model(8, 1), Model(8, 1), 80, 80),
        (Model(16, 2), Model(16, 2), 103, 0),
    ],
    ids=str,
)
def test_a_gpu_is_trusted_by_its_answers(
    of_large: Model,
    of_small: Model,
    architecture: int,
    trusted: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of both of its instructions; where they are not as assumed, the log says so."""
    monkeypatch.setattr(launching, "architecture", lambda device: architecture)
    monkeypatch.setattr(
        tensor_cores, "row_products_of", lambda a, b, rows: (of_large if rows == 64 else of_small)(a, b)
    )
    assert tensor_cores.trusted.__wrapped__(torch.device("cpu"), torch.float16) == trusted
    assert ("do not round" in caplog.text) == (trusted == 0 and architecture == 90)


@pytest.mark.skipif(torch.cuda.is_available(), reason="reads what interpreted kernels compute")
def test_kernels_take_a_fraction_of_a_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """linear, direct: the root of the norm holds (γ_norm + γ_sum) S, with 64 products in each accumulation."""
    x, g = torch.randn(1, 40, 32).half(), torch.randn(1, 40, 16).half()
    terms = float((x[0].double().norm(dim=1) * g[0].double().norm(dim=1)).sum())
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "triton")
    roots = []
    for roundings in (0.65625, 3.0):
        monkeypatch.setattr(tensor_cores, "roundings", lambda like, n=roundings: n)
        roots.append(float(ops.linear_norm_sq(x, g, method="direct")) ** 0.5)
    expected = 2 * 64 * (3.0 - 0.65625) * bounds.UNIT * terms
    assert roots[1] - roots[0] == pytest.approx(expected, rel=0.02)


def in_place_of_product(device: Dots) -> Callable[..., Any]:
    """`device.product` for interpreted kernels, its accumulations made by a device in software."""

    def product(a: Any, b: Any, acc: Any, one: Any, upcast: bool) -> Any:
        left, right = (torch.from_numpy(t.handle.data.astype("float32")).half() for t in (a, b))
        m, n = len(left), right.shape[1]
        pairs = left.repeat_interleave(n, 0), right.T.repeat(m, 1)
        made = device(*pairs).view(m, n).numpy()
        return acc + acc.__class__(TensorHandle(made, acc.handle.dtype), acc.type)

    return product


def worst_frames(extra: int) -> Case:
    """One frame, and 63 whose products are just below the last place that `extra` bits keep beside it."""
    size = torch.full((64, 1), (2.0 - 2.0**-10) * 2.0 ** -((25 + extra) // 2))
    size[0] = 1.0
    other = size.clone()
    other[1:] *= 2.0 ** -((25 + extra) % 2)
    tensors = {"x": size.expand(1, 64, 16).half(), "g": other.expand(1, 64, 16).half()}
    return dataclasses.replace(make("linear", 1, 64, 16, 16, dtype=torch.float16), tensors=tensors)


@pytest.mark.thinned(4)
@pytest.mark.skipif(torch.cuda.is_available(), reason="puts a device in software into interpreted kernels")
@pytest.mark.parametrize("architecture", [0, 80, 90])
@pytest.mark.parametrize("method", ["direct", "gram"])
def test_no_norm_is_short_on_an_assumed_device_and_on_a_much_coarser_one_it_is(
    architecture: int, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "triton")
    monkeypatch.setattr(launching, "architecture", lambda device: architecture)
    core = bounds.tensor_core(architecture)
    for extra in (core.extra - 1, core.extra, core.extra + 1):
        case = worst_frames(extra)
        monkeypatch.setattr(linear_kernels, "product", in_place_of_product(Model(core.block, core.extra)))
        never_below(case, method=method)
    if architecture == 90 and method == "direct":
        # 13 bits are what sm_90 keeps of float8 products
        for coarser in (Model(4, -1), Model(32, -10)):
            monkeypatch.setattr(linear_kernels, "product", in_place_of_product(coarser))
            with pytest.raises(AssertionError):
                never_below(worst_frames(coarser.extra), method=method)


# ---- the GPU of this machine ---------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs tensor cores: a GPU")
@pytest.mark.parametrize("case", probes.CASES, ids=str)
def test_this_gpus_tensor_cores_are_no_coarser_than_assumed(case: tuple[torch.dtype, int, int]) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    architecture = launching.architecture(device)
    assumed = bounds.tensor_core(architecture)
    [found] = probes.of_this_gpu([case])
    print(found)
    assert found.faults(assumed) == []
    assert found.instruction != "none"
    assert tensor_cores.trusted(device, case[0]) == (
        architecture if architecture in bounds.TENSOR_CORES else 0
    )


def test_random_rows_reach_subnormals_only_where_asked() -> None:
    for dtype in HALVES:
        for tiny in (False, True):
            a, _ = random_rows(50, 64, dtype, torch.Generator().manual_seed(0), tiny)
            assert bool((a.abs() < torch.finfo(dtype).smallest_normal).any()) == tiny
