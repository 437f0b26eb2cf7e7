"""bench.host: the kernels are stubs within its context and nowhere else; one run ends in a table and in JSON."""

from __future__ import annotations

import json

import pytest
import torch

from bench import host
from bench.harness.stubs import kernels_stubbed
from bench.names import NON_PRIVATE, ours
from dpkernels import ops
from dpkernels.backends import native


@pytest.fixture(autouse=True)
def library() -> None:
    if native.library("cpu").handle is None:
        pytest.skip(native.library("cpu").reason)


def test_the_kernels_are_zeros_at_once_and_real_again_after() -> None:
    layer = ops.GroupedLayer("bias", (torch.ones(2, 3, 4),))
    out = torch.zeros(4, dtype=torch.float64)
    with kernels_stubbed():
        assert ops.total_norm_sq([layer]).tolist() == [0, 0]
        assert ops.clip_factors(torch.ones(2), 0.5).tolist() == [0, 0]
        ops.weighted_sums([layer._replace(outs=(out,))], torch.ones(2))
        assert not out.any()
    assert ops.total_norm_sq([layer]) == pytest.approx(36.0, rel=1e-4)
    assert ops.clip_factors(torch.ones(2), 0.5) == pytest.approx(0.5)
    ops.weighted_sums([layer._replace(outs=(out,))], torch.ones(2))
    assert out.tolist() == [6.0] * 4


def test_a_run_prints_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        assert host.main(["--cases", "tiny-lora", "--rounds", "1"]) == 0
    finally:
        torch.set_num_threads(threads)
    text = capsys.readouterr().out
    (found,) = json.loads(text.splitlines()[-1])["rows"]
    assert found["contenders"][NON_PRIVATE]["ratio"] == 1.0
    assert found["contenders"][ours()]["median_ms"] > 0
    assert ours("auto") in text
