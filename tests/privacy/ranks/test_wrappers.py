"""DistributedDataParallel, samplers for it, and Accelerate: what they may not wrap, each with the fix."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from dpkernels.privacy import PrivacyEngine, read_ledger
from tests.privacy.private_run import Net, losses_of
from tests.privacy.ranks.jobs import a_run, steps_of
from tests.privacy.ranks.processes import Failure, Processes

SEED = torch.Generator().manual_seed(4)  # every process has the same data
DATA = TensorDataset(torch.randn(20, 4, 6, generator=SEED), torch.randint(0, 3, (20,), generator=SEED))


def a_net() -> Net:
    torch.manual_seed(1)
    net = Net()
    net.unused = nn.Identity()  # DDP waits for the gradients of every parameter
    return net


def wrapped(rank: int, group: Any, given: str) -> int:
    """Train with a model that DistributedDataParallel wraps; the steps taken."""
    net = a_net()
    ddp = DistributedDataParallel(net, process_group=group)
    if given == "compressed":
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

        ddp.register_comm_hook(group, fp16_compress_hook)
    run = a_run(group, model=net if given in ("module", "evaluated") else ddp, batch_size=20)
    if given == "module":
        run.loss_fn = lambda _, batch: losses_of(ddp, batch)
    if given == "evaluated":
        with torch.no_grad():
            losses_of(ddp, run.data[:3])
    return len(steps_of(run, 2))


@pytest.mark.parametrize("given", ["wrapper", "compressed"])
def test_refuses_a_wrapped_model(processes: Processes, given: str) -> None:
    for result in processes.run(wrapped, 2, given):
        assert isinstance(result, Failure)
        assert (result.kind, "wrapped in DistributedDataParallel" in result.message) == ("ValueError", True)


def test_refuses_forwards_through_the_wrapper(processes: Processes) -> None:
    for result in processes.run(wrapped, 2, "module"):
        assert isinstance(result, Failure)
        assert (result.kind, "called through DistributedDataParallel" in result.message) == (
            "RuntimeError",
            True,
        )


def test_a_wrapper_that_only_evaluates_changes_nothing(processes: Processes) -> None:
    assert processes.results(wrapped, 2, "evaluated") == [2, 2]


def make(model: nn.Module, optimizer: Any, loader: Any) -> Any:
    return PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
    )


def parts() -> tuple[Net, torch.optim.Optimizer, DataLoader[Any]]:
    net = a_net()
    return net, torch.optim.SGD(net.parameters(), lr=0.1), DataLoader(DATA, batch_size=4, shuffle=True)


def test_refuses_a_distributed_sampler() -> None:
    net, optimizer, _ = parts()
    sampler: DistributedSampler[Any] = DistributedSampler(DATA, num_replicas=2, rank=0)
    with pytest.raises(ValueError, match="sampler=DistributedSampler is refused: it deals a fixed part"):
        make(net, optimizer, DataLoader(DATA, batch_size=4, sampler=sampler))


@pytest.fixture
def accelerate() -> Iterator[Any]:
    import accelerate
    from accelerate.state import AcceleratorState

    yield accelerate
    AcceleratorState._reset_state(reset_partial_state=True)


def test_refuses_what_accelerate_prepared(accelerate: Any) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    net, optimizer, loader = parts()
    with pytest.raises(TypeError, match=r"Accelerate's AcceleratedOptimizer.*before Accelerator.prepare"):
        make(net, accelerator.prepare(optimizer), loader)
    with pytest.raises(
        ValueError, match=r"prepared by Accelerate .DataLoaderShard.*before Accelerator.prepare"
    ):
        make(net, optimizer, accelerator.prepare(loader))
    dealt = accelerate.data_loader.BatchSamplerShard(loader.batch_sampler, num_processes=2, process_index=0)
    with pytest.raises(ValueError, match="prepared by Accelerate"):
        make(net, optimizer, DataLoader(DATA, batch_sampler=dealt))


def test_refuses_a_forward_that_accelerate_replaced(accelerate: Any) -> None:
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    net, optimizer, loader = parts()
    with pytest.raises(ValueError, match=r"prepared by Accelerate for mixed precision.*accelerator.autocast"):
        make(accelerator.prepare(net), optimizer, loader)


def test_refuses_accelerates_scaled_losses(accelerate: Any) -> None:
    accelerate.Accelerator(cpu=True)  # the wrapper reads its state
    net, optimizer, loader = parts()
    scaled = accelerate.optimizer.AcceleratedOptimizer(optimizer, scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(TypeError, match=r"it scales losses.*use bfloat16"):
        make(net, scaled, loader)
    accelerator = accelerate.Accelerator(cpu=True)
    model, private, _ = make(*parts())
    with pytest.raises(RuntimeError, match=r"outside of optimizer.backward"):
        accelerator.backward(losses_of(model, DATA[:3]).sum())
    again = accelerate.optimizer.AcceleratedOptimizer(private, scaler=torch.amp.GradScaler("cpu"))
    again.scaler.scale(torch.ones(()))
    with pytest.raises(RuntimeError, match="must not be scaled"):
        again.step()


SCRIPT = """
import sys
import torch
from accelerate import Accelerator
from dpkernels.privacy import PrivacyEngine
from tests.privacy.private_run import losses_of
from tests.privacy.ranks.test_wrappers import parts

accelerator = Accelerator(cpu=True)  # initialises the process group
model, optimizer, loader = PrivacyEngine(ledger=sys.argv[1]).make_private(
    **dict(zip(("module", "optimizer", "data_loader"), parts())), noise_multiplier=1.0, max_grad_norm=1.0, steps=3
)
for logical_batch in loader:
    for batch in logical_batch:
        optimizer.backward(losses_of(model, batch))
    optimizer.step()
    optimizer.zero_grad()
accelerator.print("processes", torch.distributed.get_world_size())
accelerator.end_training()
"""


@pytest.mark.slow
def test_accelerate_launch_starts_a_run(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    root = Path(__file__).resolve().parents[3]
    launch = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
    done = subprocess.run(
        [sys.executable, "-m", *launch, str(script), str(tmp_path / "ledger.jsonl")],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "processes 2" in done.stdout, done.stderr
    assert [run.steps for run in read_ledger(tmp_path / "ledger.jsonl").runs] == [3]
