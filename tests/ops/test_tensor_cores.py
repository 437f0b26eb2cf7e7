"""How tensor cores round: the GPU here is no coarser than assumed, and the probes that say so find what is planted."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from bench import tensor_cores
from bench.tensor_core_model import CUTS, Model
from bench.tensor_core_search import random_rows
from dpkernels.backends.triton_ops import bounds

HALVES = (torch.bfloat16, torch.float16)
CORES = sorted({*bounds.TENSOR_CORES.values(), bounds.COARSEST}, key=lambda core: core.block)


def measure(
    model: tensor_cores.Dots,
    assumed: bounds.TensorCore,
    dtype: torch.dtype = torch.float16,
    chain: int = 64,
    rounds: int = 20,
) -> tensor_cores.Found:
    return tensor_cores.measure(model, dtype, chain, assumed, rows=100, rounds=rounds)


# ---- the probes, on devices in software ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("core", CORES, ids=str)
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


@pytest.mark.parametrize("align", CUTS)
@pytest.mark.parametrize("final", CUTS)
@pytest.mark.parametrize("late", [False, True])
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


# ---- planted: devices that are coarser than assumed ----------------------------------------------------------


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


def test_catches_lost_subnormals_and_a_chain_that_is_summed_one_by_one() -> None:
    found = measure(Model(16, 2, subnormals=False), bounds.COARSEST, rounds=1)
    assert [fault.split(": ")[1] for fault in found.faults(bounds.COARSEST)] == ["subnormal factors are lost"]
    found = measure(Model(1, 0), bounds.COARSEST, rounds=1)
    assert any("blocks of 1" in fault for fault in found.faults(bounds.COARSEST))


def test_a_zero_that_moves_the_alignment_is_seen() -> None:
    """It is no fault: the bound counts it as the smallest normal number."""
    found = measure(Model(16, 2, zeros=True), bounds.COARSEST, rounds=1)
    assert found.zero_counts
    assert found.faults(bounds.COARSEST) == []


def test_the_exit_status_and_the_file_say_what_was_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.json"
    assert tensor_cores.main(["--model", "16,2", "--architecture", "90", "--output", str(file)]) == 0
    assert json.loads(file.read_text(encoding="utf-8"))["found"][0]["kept"] == [25, 25, 25]
    assert tensor_cores.main(["--model", "8,1", "--architecture", "90"]) == 1
    assert json.loads(capsys.readouterr().out.partition("\n}\n")[2])["faults"]


# ---- the GPU of this machine ---------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs tensor cores: a GPU")
@pytest.mark.parametrize("case", tensor_cores.CASES, ids=str)
def test_this_gpus_tensor_cores_are_no_coarser_than_assumed(case: tuple[torch.dtype, int, int]) -> None:
    assumed = bounds.tensor_core(
        10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    )
    [found] = tensor_cores.of_this_gpu([case])
    print(found)
    assert found.faults(assumed) == []
    assert found.instruction != "none"


def test_random_rows_reach_subnormals_only_where_asked() -> None:
    for dtype in HALVES:
        for tiny in (False, True):
            a, _ = random_rows(50, 64, dtype, torch.Generator().manual_seed(0), tiny)
            assert bool((a.abs() < torch.finfo(dtype).smallest_normal).any()) == tiny
