"""What docs/benchmarks.md says of single kernels, from made-up results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.cases.optim import FUSED, NON_PRIVATE, PHILOX, PLAIN
from bench.reports import kernel as kernel_report
from bench.reports import report

ABOUT = {
    "device": "A GPU 80GB",
    "slug": "nvidia-80gb",
    "versions": {"torch": "2.11.0"},
    "commit": "abc1234",
    "dirty": False,
    "date": "2026-01-02T03:04:05+00:00",
}


def of_step(milliseconds: float, bytes_: float) -> dict[str, float]:
    return {"queued": milliseconds / 1e3, "iqr": 4e-6, "called": milliseconds / 1e3, "bytes": bytes_}


SAVED: dict[str, dict[str, Any]] = {
    "sweep": {
        "about": ABOUT,
        "checks": {"sweep, torch.float32": True, "3 normals": True},
        "copy_bytes_per_s": 3e12,
        "tensors": 100,
        "sweeps": {
            "200000000": {FUSED: of_step(3.0, 8e9), NON_PRIVATE: of_step(2.0, 5.6e9)},
            "20000000": {
                FUSED: of_step(0.3, 8e8),
                PHILOX: of_step(0.29, 8e8),
                NON_PRIVATE: of_step(0.2, 5.6e8),
                PLAIN: of_step(0.9, 8.8e8),
            },
        },
        "normals_count": 10**8,
        "normals": {"chacha20_normal": 8e-4, "torch.randn": 2.5e-4},
    },
    "many_normals": {
        "about": ABOUT,
        "draws": 10**10,
        "dtype": "float64",
        "largest": 6.51,
        "figures": [{"name": "moment 1", "sound": True}, {"name": "lag 3", "sound": True}],
    },
    "tensor_cores": {
        "about": ABOUT,
        "assumed": {"block": 16, "extra": 2, "roundings": 0.65625},
        "faults": [],
        "found": [{"worst": 0.85}, {"worst": 0.8792}],
    },
}
SAVED["tune"] = ABOUT | {
    "ceilings": {"flops": 8e14, "bandwidth": 3e12},
    "rows": [
        {"kernel": "linear_gram", "shape": {"B": 2, "T": 9}, "config": config, "microseconds": microseconds,
         "teraflops": 400.0, "gigabytes_a_second": None, "share": 0.5}
        for config, microseconds in (("plain torch", 30.0), ("BT=128", 10.0), ("BT=64", 9.0))
    ],
}  # fmt: skip
SAVED["peaks"] = {
    "about": ABOUT,
    "rows": [
        {"case": "a-model", "strategy": "bookkeeping", "shape": {"B": 8, "T": 9}, "predicted": 2**30,
         "measured": 2**30 * 1.02, "error": -0.0196},
        {"case": "a-model", "strategy": "two_pass", "shape": {"B": 8, "T": 9}, "predicted": 2**30, "reason": "out"},
    ],
}  # fmt: skip
TABLE: dict[str, Any] = {
    "triton": "3.6.0",
    "architectures": [80, 90],
    "kernels": 21,
    "compiled": 1234,
    "spilling": 0,
    "faulty": 0,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "nvidia-80gb").mkdir()
    for name, saved in SAVED.items():
        (tmp_path / "nvidia-80gb" / f"{name}.json").write_text(json.dumps(saved), encoding="utf-8")
    (tmp_path / "triton_table.json").write_text(json.dumps(TABLE), encoding="utf-8")
    return tmp_path


def test_the_fused_steps_table_has_time_share_and_ratio() -> None:
    text = kernel_report.fused_step(SAVED["sweep"])
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[0].count("|") == rows[1].count("|") == 6
    assert rows[2] == "| 20,000,000 | **dpkernels** | **0.300 ± 0.002** | **88.9%** | **1.50×** |"
    assert rows[3] == f"|  | {PHILOX} | 0.290 ± 0.002 | 92.0% | 1.45× |"
    assert rows[5] == f"|  | {PLAIN} | 0.900 ± 0.002 | 32.6% | 4.50× |"
    assert rows[6].startswith("| 200,000,000 | **dpkernels** | **3.000")
    assert "A GPU 80GB" in text
    assert "torch 2.11.0; commit abc1234, 2026-01-02" in text
    assert "3.00 TB/s" in text
    assert "2 checks of its bits passed" in text
    assert "100,000,000 float32 normals take 0.800 ms, torch.randn's 0.250 ms (3.2×)" in text


def test_what_failed_is_named() -> None:
    wrong = SAVED["sweep"] | {"checks": {"bits": True, "others": False}}
    assert "**wrong bits: others**" in kernel_report.fused_step(wrong)
    unsound = SAVED["many_normals"] | {"figures": [{"name": "lag 3", "sound": False}]}
    assert "**1 of 1 figures are out of their limits: lag 3**" in kernel_report.many_normals(unsound)
    coarse = SAVED["tensor_cores"] | {"faults": ["blocks of 8"]}
    assert "**coarser than assumed: blocks of 8**" in kernel_report.tensor_cores(coarse)
    assert "**2 spill**, **3 have faults**" in kernel_report.triton_table(
        TABLE | {"spilling": 2, "faulty": 3}
    )


def test_a_sentence_each() -> None:
    assert "10,000,000,000 draws of the noise in float64 on A GPU 80GB" in kernel_report.many_normals(
        SAVED["many_normals"]
    )
    assert "all 2 figures" in kernel_report.many_normals(SAVED["many_normals"])
    text = kernel_report.tensor_cores(SAVED["tensor_cores"])
    assert "2 experiments: as assumed or finer (blocks of 16 products, 2 extra bits, 0.66 roundings" in text
    assert "0.88 of the bound" in text
    assert (
        "compiles 1,234 variants of 21 kernels for sm_80, sm_90: none spills"
        in kernel_report.triton_table(TABLE)
    )


def test_files_that_are_absent_leave_no_trace(folder: Path) -> None:
    assert len(kernel_report.section(folder)) == 6
    assert len(kernel_report.section(folder, "another")) == 1
    (folder / "triton_table.json").unlink()
    (folder / "nvidia-80gb" / "many_normals.json").unlink()
    assert len(kernel_report.section(folder)) == 4
    assert kernel_report.section(folder / "nowhere") == []


def test_the_report_has_it_without_any_benchmark(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--results", str(folder), "--print"]) == 0
    text = capsys.readouterr().out
    assert "**dpkernels**" in text
    assert "variants of 21 kernels" in text
    assert report.main(["--results", str(folder / "nowhere"), "--print"]) == 1


def test_a_kernels_row_is_that_of_the_configuration_in_use() -> None:
    text = kernel_report.tune(SAVED["tune"])
    assert "| `linear_gram` | B = 2, T = 9 | 10.0 | 50% of matrix rate | 3.0× |" in text
    assert text.count("`linear_gram`") == 1


def test_predicted_peaks_stand_beside_measured_ones() -> None:
    text = kernel_report.peaks(SAVED["peaks"])
    assert "the largest error is 2.0%" in text
    assert "| a-model | bookkeeping | B = 8, T = 9 | 1,024 | 1,044 | -2.0% |" in text
    assert "two_pass" not in text
