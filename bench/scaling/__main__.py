"""Weak and strong scaling of a private step on this machine, over gloo: `python -m bench.scaling`.

    python -m bench.scaling                          both cases, two processes of one thread each
    python -m bench.scaling --cases tiny-lora --size 2 --frames 16 --rounds 2 --output /tmp/out.json
    python -m bench.scaling.modelled                 the calculated step on 1 to 64 H100s

Weak: every process has the batch that one process has alone. Strong: all together have it. The ways take turns, a step
each in every round, and the ratio is the median over rounds. Both cores of a small machine share its caches and memory,
and a process here has no more of them than a core: this measures what the exchange costs, not what more machines gain.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from bench.cases.models import CASES
from bench.harness import machine
from bench.scaling.processes import Job, run

DEFAULT = ("whisper-large-encoder-lora", "parakeet-full")


def measured(jobs: Sequence[Job], processes: int) -> dict[str, Any]:
    """The document that is saved: the machine, and the rows."""
    torch.set_num_threads(1)
    about = machine.about("cpu")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run, (processes, folder, list(jobs)), nprocs=processes)
        rows = json.loads(Path(folder, "rows.json").read_text(encoding="utf-8"))
    return {"group": "scaling", "about": about, "backend": "gloo", "processes": processes, "rows": rows}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", nargs="+", default=list(DEFAULT), choices=sorted(CASES))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--size", type=int, default=4, help="examples of one process; default: %(default)s")
    parser.add_argument("--frames", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=11, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="default: scaling.json of this machine in bench/results")
    options = parser.parse_args(arguments)
    jobs = [Job(name, options.size, options.frames, options.rounds) for name in options.cases]
    document = measured(jobs, options.processes)
    if options.output is None:
        machine.save(document, "scaling")
    else:
        options.output.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for row in document["rows"]:
        ratio = f", {row['ratio']:.2f} x one process" if "ratio" in row else ""
        print(f"{row['title']}: {row['way']}, {row['median_ms']:.0f} ms{ratio}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
