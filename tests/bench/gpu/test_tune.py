"""bench.gpu.tune without a GPU: what it would run, and what its figures count."""

from unittest import mock

import pytest
import torch

from bench.gpu import tune
from bench.gpu.tune_kernels import GROUPED_LAYERS, KERNELS, job
from bench.harness.floor import Ceilings
from dpkernels.backends import registry, triton_ops
from dpkernels.backends.triton_ops import configs, launching

CEILINGS = Ceilings(flops=8e14, bandwidth=3e12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_table_holds_a_candidate(kernel: str) -> None:
    assert configs.config(kernel, torch.bfloat16, 90) in KERNELS[kernel].candidates


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_job_launches_its_kernel(kernel: str) -> None:
    launched = []
    with (
        mock.patch.object(launching, "execute", lambda function, *rest: launched.append(function.__name__)),
        mock.patch.object(launching, "architecture", return_value=90),
        # tensors without data have no backend of their own: every family is Triton's
        mock.patch.object(registry, "implementation", lambda op, device: getattr(triton_ops, op)),
    ):
        calls = job(kernel, (2, 70, 512, 512), "meta")
        calls.call(0)
        assert kernel in launched
        if calls.plain is not None:
            calls.plain(0)


def test_half_gram_counts_the_blocks_it_executes() -> None:
    config = configs.Config({"BT": 128})
    flops, moved = tune.work("linear_gram", (2, 200, 32, 64), config)
    assert (flops, moved) == (2 * 3 * 128**2 * 2 * 96, 0)
    one = tune.row("linear_gram", (2, 200, 32, 64), config, 1e-6, CEILINGS)
    assert one.share == round(flops / 1e-6 / 8e14, 4)
    assert one.gigabytes_a_second is None


def test_lora_counts_each_input_once() -> None:
    assert tune.work("lora_pieces", (2, 5, 32, 64), None) == (0, 2 * 5 * 96 * 2)
    assert tune.work("grouped_norms", (2, 5, 32, 64), None) == (0, GROUPED_LAYERS * 2 * 5 * 96 * 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it would run")
def test_refused_with_the_mend(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in ((["linear_gramm"], "no such kernel"), ([], "no CUDA device")):
        with pytest.raises(SystemExit):
            tune.main(arguments)
        assert message in capsys.readouterr().err
