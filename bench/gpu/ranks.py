"""The path of several processes where there is one GPU: it is compared with that of one process, and timed.

    torchrun --nproc-per-node 1 -m bench.gpu.ranks                  NCCL
    torchrun --nproc-per-node 2 -m bench.gpu.ranks                  two processes that share the GPU
    torchrun --nproc-per-node 2 -m bench.gpu.ranks --device cpu     here

NCCL does not connect two processes on one GPU. So one process takes the path of several alone: `SendsToItself` lets it
meet, scatter sums and gather parameters in a group of NCCL that has no other member, with all of the exchange's copies,
pieces and parts of the optimizer's state. Two processes are connected by gloo, and what NCCL would send between GPUs
is staged through the host. In both, under a fixed key, parameters after a few noised steps are compared with those of
one process without a group: the sums' order of addition differs, and nothing else.

The time of the exchange is that of its copies and launches, and with NCCL of a ring of one; no link is in it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

import dpkernels
from bench.cases.models import CASES, forward, trained
from bench.contenders.rows import Rows
from bench.harness import machine
from bench.harness.timer import Call, interleave, stopwatch
from dpkernels.privacy import Ranks, engine
from dpkernels.privacy.ranks import exchange, group
from dpkernels.privacy.ranks.pieces import cut, owners

KEY = bytes(range(32))
FRAMES, EXAMPLES, BATCH, STEPS = 32, 12, 8, 3
LR = 1e-3  # an update of other noise differs by some 1e-3
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2**-6}  # bfloat16 parameters may round to a neighbour
LORA_TENSORS, LORA_ENTRIES = 386, 11_051_048  # of Wav2Vec2-BERT's recipe


class _Several(int):
    """1 in arithmetic, and in every comparison what makes the code take the path of several ranks."""

    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        return False

    def __ne__(self, other: object) -> bool:
        return False

    def __gt__(self, other: object) -> bool:
        return True


class SendsToItself(Ranks):
    """A group of one process that does all that several do."""

    def __init__(self, process_group: Any) -> None:
        super().__init__(process_group)
        self.size = _Several(1)
        members = dist.get_process_group_ranks(process_group)
        self._first = members[0]
        on_cpus = torch.device("cpu") in process_group._device_types
        self._facts = process_group if on_cpus else group._over_cpus(process_group, members)


@dataclass(frozen=True)
class Way:
    """A case, the dtype of its parameters, and an optimizer."""

    case: str
    dtype: torch.dtype
    optimizer: Callable[..., torch.optim.Optimizer]

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.case}, {str(self.dtype).removeprefix('torch.')}, {self.optimizer.__name__}"


class Unfused(torch.optim.SGD):
    """An optimizer that the fused step does not cover."""


WAYS = (
    Way("tiny-lora", torch.float32, torch.optim.AdamW),
    Way("tiny-full", torch.float32, torch.optim.AdamW),
    Way("tiny-full", torch.float32, Unfused),
    Way("tiny-lora", torch.bfloat16, torch.optim.AdamW),
)


def parameters_after(way: Way, process_group: Any, device: str) -> Tensor:
    """The trained parameters after STEPS noised steps under the fixed key, in one vector of float64 on the CPU."""
    case = CASES[way.case]
    model = case.model(FRAMES, way.dtype, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the fixed key, and of a run without a self-check
        private = dpkernels.PrivacyEngine(noise_key=KEY)
        model, optimizer, loader = private.make_private(
            module=model,
            optimizer=way.optimizer(trained(model).values(), lr=LR),
            data_loader=DataLoader(Rows(case.batch(EXAMPLES, FRAMES, way.dtype)), batch_size=BATCH),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            physical_batch_size=4,
            process_group=process_group,
        )
        for logical_batch in itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), STEPS):
            for batch in logical_batch:
                batch = {name: value.to(device) for name, value in batch.items()}
                optimizer.backward(case.losses(forward(model, batch), batch["labels"]))
            optimizer.step()
            optimizer.zero_grad()
    return torch.cat([p.detach().double().flatten().cpu() for p in trained(model).values()])


def staged(collective: Callable[..., Any]) -> Callable[..., Any]:
    """A collective of gloo for tensors of a GPU: through the host."""

    def call(output: Tensor, source: Tensor, **keywords: Any) -> None:
        there = torch.empty_like(output, device="cpu")
        collective(there, source.cpu(), **keywords)
        output.copy_(there)

    return call


@contextmanager
def several(device: str) -> Iterator[None]:
    """Within it, make_private takes the path of several ranks, whatever connects them."""
    with (
        mock.patch.object(engine, "ranks_of", SendsToItself)
        if dist.get_world_size() == 1
        else _shared(device)
    ):
        yield


@contextmanager
def _shared(device: str) -> Iterator[None]:
    if device == "cpu":
        yield
        return
    with (
        mock.patch.object(exchange, "_REDUCE_SCATTER", staged(exchange._REDUCE_SCATTER)),
        mock.patch.object(exchange, "ALL_GATHER", staged(exchange.ALL_GATHER)),
    ):
        yield


def compared(way: Way, alone: Any, everyone: Any, device: str) -> dict[str, Any]:
    """The largest difference between one process and several, and whether it is within what is allowed."""
    one = parameters_after(way, alone, device)
    with several(device):
        many = parameters_after(way, everyone, device)
    difference = float((many - one).abs().max())
    return {
        "way": way.name,
        "difference": difference,
        "allowed": ALLOWED[way.dtype],
        "good": difference <= ALLOWED[way.dtype],
    }


def timed(everyone: Any, device: str, rounds: int, entries: int = LORA_ENTRIES) -> dict[str, Any]:
    """Seconds of the exchange of sums and of parameters, as many and as large as the recipe's."""
    each = entries // LORA_TENSORS
    parameters = [torch.zeros(each, device=device) for _ in range(LORA_TENSORS)]
    sums = [torch.zeros(each, dtype=torch.float64, device=device) for _ in range(LORA_TENSORS)]
    with several(device):
        ranks = engine.ranks_of(everyone)
        moves = exchange.Exchange(ranks, owners(cut(parameters), ranks.size))
        calls = {
            "in": Call(lambda: moves.sums_to_owners(sums)),
            "out": Call(lambda: moves.to_all(parameters)),
        }
        taken = interleave(calls, rounds=rounds, warmup=2, measure=stopwatch(device))
    return {"entries": each * LORA_TENSORS, "tensors": LORA_TENSORS} | {
        f"{name}_seconds": samples.median for name, samples in taken.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="torchrun -m bench.gpu.ranks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(arguments)
    device = options.device
    if device == "cuda":
        torch.cuda.set_device(0)  # of all processes
    alone = os.environ["WORLD_SIZE"] == "1"
    dist.init_process_group("cpu:gloo,cuda:nccl" if alone and device == "cuda" else "gloo")
    world, rank = dist.get_world_size(), dist.get_rank()
    own = [dist.new_group([other]) for other in range(world)][rank]
    results = [compared(way, own, dist.group.WORLD, device) for way in WAYS]
    document = {
        "about": machine.about(device),
        "backend": dist.get_backend(),
        "processes": world,
        "compared": results,
        "exchange": timed(dist.group.WORLD, device, options.rounds),
    }
    if rank == 0:
        machine.save(document, f"ranks-{world}")
        print(json.dumps({key: document[key] for key in ("compared", "exchange")}, indent=1))
    dist.destroy_process_group()
    return 0 if all(result["good"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
