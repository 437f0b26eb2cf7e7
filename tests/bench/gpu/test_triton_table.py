"""The compile table of the Triton kernels: a part of it, and the faults that it must show."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dpkernels.backends import registry
from dpkernels.ops.layers import KINDS

ROOT = Path(__file__).resolve().parents[3]

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

# Planted faults, each with the sign of it: they run in the command's process, where kernels are not interpreted.
TILES = """
from dpkernels.backends.triton_ops import configs
def plant(fault):
    tiles, warps, stages = fault
    configs.CONFIGS["linear_direct"] = {(2, 0): configs.Config(dict(zip(("BT", "BP", "BD"), tiles)), warps, stages)}
"""
SPILLS, TOO_MUCH_SHARED, NO_WGMMA = ((64, 256, 256), 4, 1), ((64, 128, 128), 8, 9), ((32, 32, 32), 4, 1)
ONE_CHAIN = """
import triton, triton.language as tl
from dpkernels.backends.triton_ops import linear_kernels

@triton.jit
def product(a, b, acc, one, UPCAST: tl.constexpr):
    return acc + tl.dot(a, b, input_precision="ieee")

def plant(fault):
    linear_kernels.product = product
"""


def tables(
    folder: Path, architectures: str, fault: str = "def plant(fault): pass", faults: tuple[Any, ...] = (None,)
) -> list[tuple[int, list[dict[str, Any]]]]:
    """(exit status, rows) of the command on the direct kernel in bfloat16, once for each of `faults`."""
    script = folder / "table.py"  # a file: Triton reads a kernel's source
    script.write_text(
        f"import json, sys\n{fault}\nfrom bench.gpu import triton_table\n"
        f"for number, one in enumerate({faults!r}):\n"
        "    plant(one)\n"
        "    print(triton_table.main([*sys.argv[1:], f'--output={number}.json']), file=sys.stderr)\n"
    )
    options = (
        "--families",
        "linear",
        "--kernels",
        "linear_direct",
        "--dtypes",
        "bfloat16",
        "--layouts",
        "aligned",
    )
    environment = {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(folder / "cache"),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, str(script), *options, "--architectures", architectures],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = []
    for number, status in enumerate(done.stderr.split()):
        document = json.loads((folder / f"{number}.json").read_text())
        assert "not timings" in document["what"]
        found.append((int(status), document["rows"]))
    return found


@pytest.mark.slow
def test_the_direct_kernel_compiles_for_every_architecture(tmp_path: Path) -> None:
    [(status, rows)] = tables(tmp_path, "80,90,100")
    assert status == 0
    assert [row["architecture"] for row in rows] == [80, 80, 90, 90, 100, 100]  # with flags, and without
    assert [row["matrix"] for row in rows[::2]] == ["mma.sync", "wgmma", "tcgen05"]
    for row in rows:
        assert row["spilled"] == 0
        assert row["registers"] > 0
        assert 0 < row["shared"] <= row["shared_limit"]
        assert row["cut"] is True


@pytest.mark.slow
def test_a_spill_too_much_shared_memory_and_a_missing_wgmma_fail_the_command(tmp_path: Path) -> None:
    spills, shared, matrix = tables(tmp_path, "90", TILES, (SPILLS, TOO_MUCH_SHARED, NO_WGMMA))
    assert [status for status, _ in (spills, shared, matrix)] == [1, 1, 1]
    # the variant for long samples has tiles of its own, which nothing was planted in
    [of_spills], [of_shared], [of_matrix] = (
        [row for row in rows if "LONG=False" in row["config"]] for _, rows in (spills, shared, matrix)
    )
    assert of_spills["spilled"] > 0
    assert of_shared["shared"] > of_shared["shared_limit"]
    assert of_matrix["matrix"] == "mma.sync"


@pytest.mark.slow
def test_products_in_one_chain_fail_the_command(tmp_path: Path) -> None:
    [(status, rows)] = tables(tmp_path, "90", ONE_CHAIN)
    assert status == 1
    assert {row["cut"] for row in rows} == {False}


def test_every_family_with_triton_kernels_is_in_the_table() -> None:
    from bench.gpu import triton_table

    called = {
        family: {op for op, _, _ in triton_table.examples(family, torch.float32, "aligned")}
        for family in triton_table.families()
    }
    assert called == {family: set(registry.families()[family]) for family in called}
    assert called.keys() >= set(KINDS)


def test_a_16_bit_product_without_tensor_cores_is_a_fault() -> None:
    """The bounds count fewer roundings there than multiply-adds have."""
    from bench.gpu.triton_table import Row

    row = Row("linear_direct", "bfloat16", 80, "aligned", "", 100, 0, 1024, 2048, "fma", True)
    assert len(row.faults) == 1
    assert dataclasses.replace(row, dtype="float32").faults == []
    assert dataclasses.replace(row, matrix="mma.sync").faults == []
