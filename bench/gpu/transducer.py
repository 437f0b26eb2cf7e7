"""The transducer loss on a GPU beside torchaudio's and transformers': time and peak memory of forward and backward.

    python -m bench.gpu.transducer                          $OUT/<device>/transducer_loss.json
    python -m bench.gpu.transducer --sizes 8,188,50,8198 64,188,50,8198

OUT defaults to bench/results. Every contender has the same bfloat16 states of width 640 and the same frozen output
layer, and returns the states' gradients. torchaudio's and transformers' losses take the logits of all cells, which
torch computes. The floor is the time of the three products of 2·B·T·(U+1)·H·V operations by torch.mm: logits, logits
again, and the gradient of their inputs. A contender whose losses differ from float64 gets no time, nor does one that is
not installed or runs out of memory.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.harness import machine
from bench.harness.memory import cuda_peak
from bench.harness.timer import Call, device_seconds, interleave
from bench.reports import kernel as kernel_report
from dpkernels import ops, reference

HIDDEN = 640
TDT = (0, 1, 2, 3, 4)
SIZES = ((8, 188, 50, 8198), (64, 188, 50, 8198), (64, 188, 50, 1024), (16, 750, 200, 8198))
"""(B, T, U, V): Parakeet's classes at 15 s and a minute, and few classes."""
ROWS = 16384
"""Cells of one torch.mm of the floor: enough that it is efficient, and few enough for any GPU's memory."""
TOLERANCE = 5e-2
"""Of a loss, relative to float64: states, weights and torch's logits are bfloat16, torchaudio's logits float32."""

Loss = Callable[["Batch"], Tensor]


@dataclass(frozen=True)
class Batch:
    """States that need gradients, and what else the losses take; the last class is the blank."""

    encoder: Tensor
    predictor: Tensor
    weight: Tensor
    targets: Tensor
    frame_lengths: Tensor
    target_lengths: Tensor
    durations: tuple[int, ...]

    @property
    def blank(self) -> int:
        return len(self.weight) - len(self.durations) - 1

    def logits(self) -> Tensor:
        return linear((self.encoder[:, :, None] + self.predictor[:, None]).relu(), self.weight)

    def lengths(self) -> tuple[Tensor, Tensor]:
        return self.frame_lengths, self.target_lengths


def make(
    size: tuple[int, int, int, int],
    durations: tuple[int, ...],
    device: str,
    dtype: torch.dtype,
    hidden: int = HIDDEN,
) -> Batch:
    """A batch without padding, as its operations are counted; logits of about unit variance."""
    batch, frames, labels, classes = size
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device=device, dtype=dtype)

    def full(value: int) -> Tensor:
        return torch.full((batch,), value, device=device)

    return Batch(
        normal(batch, frames, hidden).requires_grad_(),
        normal(batch, labels + 1, hidden).requires_grad_(),
        normal(classes + len(durations), hidden, scale=hidden**-0.5),
        torch.randint(classes - 1, (batch, labels), generator=generator).to(device),
        full(frames),
        full(labels),
        durations,
    )


def of_ours(batch: Batch) -> Tensor:
    states = (batch.encoder, batch.predictor, batch.weight, None)
    options = {"blank": batch.blank, "durations": batch.durations or None}
    return ops.transducer_loss(*states, batch.targets, *batch.lengths(), **options)  # type: ignore[arg-type]


def of_torchaudio(batch: Batch) -> Tensor:
    """An RNN-T's; it takes float32 logits and int32 lengths."""
    from torchaudio.functional import rnnt_loss

    lengths = (t.int() for t in (batch.targets, *batch.lengths()))
    losses: Tensor = rnnt_loss(batch.logits().float(), *lengths, blank=batch.blank, reduction="none")
    return losses


def of_transformers(batch: Batch) -> Tensor:
    """A TDT's."""
    from transformers.loss.loss_tdt import tdt_loss

    count = len(batch.durations)
    tokens, steps = batch.logits().tensor_split([-count], dim=-1)
    durations = list(batch.durations)
    losses: Tensor = tdt_loss(
        tokens, steps, batch.targets, *batch.lengths(), batch.blank, durations, reduction="none"
    )
    return losses


CONTENDERS: Mapping[str, Mapping[str, Loss]] = {
    "RNN-T": {"dpkernels": of_ours, "torchaudio": of_torchaudio},
    "TDT": {"dpkernels": of_ours, "transformers": of_transformers},
}
DURATIONS = {"RNN-T": (), "TDT": TDT}


def problem(kind: str, name: str, device: str, dtype: torch.dtype) -> str:
    """Why a contender gets no time: it cannot be imported, or its losses are wrong; "" for none."""
    batch = make((3, 12, 5, 40), DURATIONS[kind], device, dtype, hidden=32)
    lengths = {"frame_lengths": (12, 7, 9), "target_lengths": (5, 2, 0)}
    batch = replace(batch, **{key: torch.tensor(value, device=device) for key, value in lengths.items()})
    states = (t.detach().cpu().double() for t in (batch.encoder, batch.predictor, batch.weight))
    rest = (t.cpu() for t in (batch.targets, *batch.lengths()))
    exact = reference.transducer.transducer_loss(
        *states, None, *rest, blank=batch.blank, durations=batch.durations
    )
    try:
        given = CONTENDERS[kind][name](batch).detach().cpu().double()
    except ImportError:
        return "not installed"
    error = ((given - exact) / exact).abs().max().item()
    return "" if error <= TOLERANCE else f"wrong losses (off by {error:.0%})"


def step(loss: Loss, batch: Batch) -> Callable[[], None]:
    """Forward and backward by the states."""

    def run() -> None:
        torch.autograd.grad(loss(batch).sum(), (batch.encoder, batch.predictor))

    return run


def operations(size: tuple[int, int, int, int], hidden: int, outputs: int) -> int:
    """Of the three products."""
    batch, frames, labels, _ = size
    return 3 * 2 * batch * frames * (labels + 1) * hidden * outputs


def floor(size: tuple[int, int, int, int], batch: Batch) -> Callable[[], None]:
    """The three products by torch.mm, ROWS cells at a time; what is left of a last block counts whole."""
    utterances, frames, labels, _ = size
    z, weight = batch.encoder.detach().new_empty(ROWS, batch.weight.shape[1]).normal_(), batch.weight
    blocks = math.ceil(utterances * frames * (labels + 1) / ROWS)

    def run() -> None:
        for _ in range(blocks):
            torch.mm(z, weight.T)
            torch.mm(torch.mm(z, weight.T), weight)

    return run


def measured(
    kind: str, size: tuple[int, int, int, int], why: Mapping[str, str], rounds: int
) -> dict[str, Any]:
    """One size: of every contender seconds, spread and peak MiB, or why there is none; and the floor's seconds."""
    batch = make(size, DURATIONS[kind], "cuda", torch.bfloat16)
    steps = {"floor": floor(size, batch)}
    found: dict[str, Any] = {}
    for name, loss in CONTENDERS[kind].items():
        if why[name]:
            found[name] = {"status": why[name]}
            continue
        run = step(loss, batch)
        try:
            run()  # loads and compiles, so that the peak is the step's
            found[name] = {"status": "ok", "peak_mib": cuda_peak(run)}
            steps[name] = run
        except torch.cuda.OutOfMemoryError:
            found[name] = {"status": "out of memory"}
        torch.cuda.empty_cache()
    runners = {name: Call(run) for name, run in steps.items()}
    times = interleave(runners, rounds=rounds, seconds=20.0, measure=device_seconds)
    for name, samples in times.items():
        found.setdefault(name, {"status": "ok"}).update(seconds=samples.median, iqr=samples.iqr)
    work = operations(size, HIDDEN, len(batch.weight))
    return {"kind": kind, "size": list(size), "operations": work, "contenders": found}


def sizes_of(text: str) -> tuple[int, int, int, int]:
    """B,T,U,V."""
    numbers = tuple(int(part) for part in text.split(","))
    if len(numbers) != 4 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"given {text!r}; pass B,T,U,V, such as 64,188,50,8198")
    return numbers[0], numbers[1], numbers[2], numbers[3]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.transducer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sizes", nargs="+", type=sizes_of, default=list(SIZES), metavar="B,T,U,V")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: torch sees no CUDA device; fix: run this on a machine with a GPU", file=sys.stderr)
        return 2
    why = {
        kind: {name: problem(kind, name, "cuda", torch.bfloat16) for name in contenders}
        for kind, contenders in CONTENDERS.items()
    }
    rows = [measured(kind, size, why[kind], options.rounds) for kind in CONTENDERS for size in options.sizes]
    result = {"about": machine.about("cuda"), "hidden": HIDDEN, "rows": rows}
    machine.save(result, "transducer_loss")
    print(kernel_report.transducer_loss(result))
    return 1 if any(of["dpkernels"] for of in why.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
