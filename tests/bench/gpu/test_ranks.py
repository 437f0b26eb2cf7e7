"""The check of several processes that a GPU runs: here on CPUs, and that it detects a fault."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bench.gpu import ranks
from dpkernels.privacy import engine
from dpkernels.privacy.ranks import exchange
from tests.bench.test_run import run


@pytest.fixture
def group_of_one() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_one_process_takes_the_path_of_several(group_of_one: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    way = ranks.WAYS[0]
    calls = []
    original = exchange._REDUCE_SCATTER

    def scattered(output: torch.Tensor, source: torch.Tensor, **keywords: Any) -> Any:
        calls.append(source.numel())
        return original(output, source, **keywords)

    monkeypatch.setattr(exchange, "_REDUCE_SCATTER", scattered)
    result = ranks.compared(way, None, group_of_one, "cpu")
    assert len(calls) == ranks.STEPS
    assert result["good"], result
    assert engine.ranks_of(None).size == 1

    def lost(output: torch.Tensor, source: torch.Tensor, **_: Any) -> None:
        output.zero_()

    monkeypatch.setattr(exchange, "_REDUCE_SCATTER", lost)
    assert not ranks.compared(way, None, group_of_one, "cpu")["good"]


def test_the_exchange_is_timed(group_of_one: Any) -> None:
    taken = ranks.timed(group_of_one, "cpu", rounds=1, entries=ranks.LORA_TENSORS * 3)
    assert taken["entries"] == 3 * ranks.LORA_TENSORS
    assert taken["in_seconds"] > 0


def test_collectives_are_staged_through_the_host() -> None:
    seen = []

    def collective(output: torch.Tensor, source: torch.Tensor, *, group: None) -> None:
        seen.append((output.device.type, source.device.type))
        output.copy_(source * 2)

    output = torch.zeros(3)
    ranks.staged(collective)(output, torch.ones(3), group=None)
    assert seen == [("cpu", "cpu")]
    assert output.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_as_it_is_typed(processes: int, tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    done = run(*torchrun, "-m", "bench.gpu.ranks", "--device", "cpu", "--rounds", "1", OUT=str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob(f"*/ranks-{processes}.json")
    saved = json.loads(path.read_text())
    assert len(saved["compared"]) == len(ranks.WAYS)
    assert all(result["good"] for result in saved["compared"])
