"""A CALCULATED step on 1 to 64 H100s, from what was measured on one and the links' published rates. No GPU runs here.

    python -m bench.scaling.modelled         bench/results/calculated/h100-scaling.json

Seconds of a step of R GPUs, for the mean logical batch of a recipe, the sum of these parts, none of which overlaps
another (nothing in the code makes them overlap):

- forward and backward: batch / R utterances at the rate that was measured on one H100 (`bench.asr.recipes`). For
  Wav2Vec2-BERT it was not: Parakeet's rate of the same method, by the FLOPs of both;
- uneven parts: the longest part over the mean one, from drawn batches of LibriSpeech-like lengths, dealt out by
  `dpkernels.privacy.ranks.pieces.share`;
- sums and results on the links: the exchange's buffers, padding included, (R - 1)/R of them at the ring's rate, and
  NCCL's latencies in every round;
- copies on the device, into and out of these buffers, at the rate of a large copy that was measured on an H100;
- launches of these copies: their number from the plan, LAUNCH seconds each;
- meetings: messages between hosts, MESSAGE seconds each;
- noise and update: the fused kernel's time an entry for the GPU's own part (`bench.gpu.optim`), and all the rest of the
  step on one GPU as it was measured, which no number of GPUs divides.

Not in it: reading audio, evaluation, stragglers, networks that others use too, another rate at smaller micro-batches.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from asr_finetune.config.schema import Config
from asr_finetune.config.yaml_io import load_yaml
from bench.asr.data import librispeech_like_seconds
from bench.asr.recipes import recogniser
from bench.harness import machine
from bench.harness.results import FOLDER
from bench.scaling.traffic import SUM_BYTES, Plan, plan
from dpkernels.privacy.ranks.pieces import share

MEASURED = FOLDER / "nvidia-h100-80gb-hbm3"
RECIPES = ("wav2vec2_bert_lora", "wav2vec2_bert_full", "parakeet_lora", "parakeet_full")
GPUS = (1, 2, 4, 8, 16, 32, 64)
NODE = 8  # GPUs

LAUNCH = 5e-6  # assumed: seconds of a kernel's launch by PyTorch
MESSAGE = 50e-6  # assumed: seconds of a small message between two hosts over TCP, with gloo around it
NVLINK_HOP, NETWORK_HOP, COLLECTIVE = (
    3.4e-6,
    14e-6,
    8.4e-6,
)  # the constants of NCCL's own cost model: ring, simple
_DRAWS = 20

Row = dict[str, Any]


@dataclass(frozen=True)
class Links:
    """What connects the GPUs. Bytes a second in one direction.

    nvlink: of a GPU, to the others of its node. network: of a node, to others. reached: the part of these rates that
    large collectives reach.
    """

    name: str
    nvlink: float = 450e9  # NVLink 4: 18 links of 25 GB/s
    network: float = 400e9  # a DGX H100's eight ports of 400 Gbit/s
    reached: float = (
        0.8  # nccl-tests on H100s as others report them: 350 to 360 GB/s within a node, 345 over eight
    )

    def bus(self, gpus: int) -> float:
        """Bytes a second that every GPU of a ring passes on. All the node's ports work for the rings through it."""
        return self.reached * (self.nvlink if gpus <= NODE else min(self.nvlink, self.network))


LINKS = (
    Links("NVLink, 8 × 400 Gbit/s a node"),
    Links("NVLink, one 100 Gbit/s Ethernet link a node", network=12.5e9),
)


@dataclass(frozen=True)
class Step:
    """Seconds of each part of a step, and their sum."""

    backward: float
    uneven: float
    links: float
    copies: float
    launches: float
    meetings: float
    update: float

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class OneGpu:
    """What was measured: utterances a second, and seconds of noise and update; the kernel's seconds an entry, and the
    rate of a large copy in bytes a second (read and written)."""

    rate: float
    update: float
    an_entry: float
    copy: float


def step(one: OneGpu, moves: Plan, links: Links, *, batch: int, uneven: float, entry: int = 4) -> Step:
    """The parts of a step of `moves.processes` GPUs.

    Args:
        one: what was measured on one GPU.
        moves: the exchange's plan.
        links: between the GPUs.
        batch: mean size of a logical batch.
        uneven: the longest part over the mean one; 1 where they are equal.
        entry: bytes of an entry of a parameter.
    """
    gpus, mean = moves.processes, batch / moves.processes / one.rate
    kernel = moves.entries * one.an_entry
    update = one.update - kernel + kernel / gpus
    if gpus == 1:
        return Step(mean, 0.0, 0.0, 0.0, 0.0, 0.0, one.update)
    return Step(
        backward=mean,
        uneven=(uneven - 1) * mean,
        links=moves.sent(entry) / links.bus(gpus) + 2 * moves.rounds * _latency(gpus),
        copies=_copied(moves, entry) / one.copy,
        launches=LAUNCH * (3 * moves.copies + 4 * moves.rounds),
        # An all-gather of three numbers goes round; the count goes out in two broadcasts, the pickle's size first.
        meetings=MESSAGE * (gpus - 1 + 2 * math.ceil(math.log2(gpus))),
        update=update,
    )


def _latency(gpus: int) -> float:
    """Seconds of a ring's hops, for a collective of no bytes."""
    nodes = math.ceil(gpus / NODE)
    hops = (gpus - nodes) * NVLINK_HOP + (nodes if nodes > 1 else 1) * (
        NETWORK_HOP if nodes > 1 else NVLINK_HOP
    )
    return COLLECTIVE + hops


def _copied(moves: Plan, entry: int) -> float:
    """Bytes that the exchange reads and writes on each device: a buffer cleared, the sums copied and cleared; the own
    total copied back; the others' results copied out."""
    into = SUM_BYTES * (moves.padded + 3 * moves.entries)
    own = 2 * (SUM_BYTES + entry) * moves.entries / moves.processes
    return into + own + 2 * entry * moves.entries


def uneven_parts(batch: int, gpus: int) -> float:
    """The longest part of a logical batch over the mean one, in seconds of speech; the mean of drawn batches."""
    lengths = librispeech_like_seconds(_DRAWS * batch)
    ratios = []
    for drawn in np.split(lengths, _DRAWS):
        loads = [drawn[part].sum() for part in share(drawn.tolist(), gpus)]
        ratios.append(max(loads) / np.mean(loads))
    return float(np.mean(ratios))


def one_gpu(recipe: str, dtype: str) -> tuple[OneGpu, str]:
    """What was measured of a recipe on an H100, and in words where its rate comes from."""
    rows = json.loads((MEASURED / "recipes.json").read_text(encoding="utf-8"))["rows"]
    by_name = {(row["recipe"], row["dtype"]): row for row in rows}
    row, said = by_name[recipe, dtype], "measured on one H100"
    like = row
    if "rate" not in row:
        like = by_name[recipe.replace("wav2vec2_bert", "parakeet"), dtype]
        said = f"by FLOPs from {like['recipe']}, which was measured on one H100"
    fused = json.loads((MEASURED / "sweep.json").read_text(encoding="utf-8"))
    largest = max(fused["sweeps"], key=int)
    return OneGpu(
        rate=like["rate"] * like["flops"] / row["flops"],
        update=like["step_seconds"],
        an_entry=fused["sweeps"][largest]["dpkernels"]["queued"] / int(largest),
        copy=fused["copy_bytes_per_s"],
    ), said


def trained(recipe: str) -> tuple[list[Tensor], Config]:
    """The trained parameters of a recipe, without values."""
    config = Config.from_dict({**load_yaml(recipe), "output": "unused"})
    return [p for p in recogniser(config, "meta").model.parameters() if p.requires_grad], config


def rows_of(recipe: str) -> list[Row]:
    """Every number of GPUs, in both arithmetics and over both networks."""
    parameters, config = trained(recipe)
    batch, steps = config.train.batch_size, config.train.steps
    assert steps is not None  # a recipe's is given
    rows = []
    for gpus in GPUS:
        moves, uneven = plan(parameters, gpus), uneven_parts(batch, gpus)
        for dtype in ("float32", "bfloat16"):
            one, origin = one_gpu(recipe, dtype)
            for links in LINKS if gpus > NODE else LINKS[:1]:
                parts = step(one, moves, links, batch=batch, uneven=uneven)
                rows.append(
                    {
                        "recipe": recipe,
                        "dtype": dtype,
                        "gpus": gpus,
                        "links": links.name,
                        "batch_size": batch,
                        "steps": steps,
                        "rate": f"{one.rate:.1f} utterances a second, {origin}",
                        "step_seconds": round(parts.seconds, 5),
                        "hours": round(parts.seconds * steps / 3600, 3),
                        "parts": {name: round(value, 6) for name, value in asdict(parts).items()},
                        "entries": moves.entries,
                        "sent": round(moves.sent()),
                        "rounds": moves.rounds,
                        "padding": round(moves.padded / moves.entries, 3) if gpus > 1 else 1.0,
                    }
                )
    return rows


def document() -> dict[str, Any]:
    """What is saved; it says that it is calculated."""
    measured = json.loads((MEASURED / "recipes.json").read_text(encoding="utf-8"))["about"]
    return {
        "group": "scaling",
        "calculated": "NOT MEASURED: calculated by bench.scaling.modelled, whose docstring has the parts",
        "device": measured["device"],
        "from": {name: measured[name] for name in ("commit", "date", "versions")},
        **machine.commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "assumed": {
            "links": [asdict(links) for links in LINKS],
            "launch": LAUNCH,
            "message": MESSAGE,
            "hops": {"nvlink": NVLINK_HOP, "network": NETWORK_HOP, "collective": COLLECTIVE},
        },
        "rows": [row for recipe in RECIPES for row in rows_of(recipe)],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scaling.modelled", description=__doc__.splitlines()[0]
    )
    default = FOLDER / "calculated" / "h100-scaling.json"
    parser.add_argument("--output", type=Path, default=default, help="default: bench/results/calculated")
    options = parser.parse_args(arguments)
    made = document()
    lines = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in made.pop("rows"))
    head = json.dumps(made, indent=1, ensure_ascii=False).removesuffix("\n}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(f'{head},\n "rows": [\n  {lines}\n ]\n}}\n', encoding="utf-8")
    print(f"calculated, not measured: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
