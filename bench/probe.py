"""One contender's step in a fresh process, which `bench.compare` runs in turns with each commit's package.

    python -m bench.probe parakeet-lora "dpkernels bookkeeping" --size 8 --frames 150 --rounds 5

Prints one JSON object: {"seconds": the median}.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from functools import partial

import torch

from bench.cases.models import CASES
from bench.contenders import Settings, registry
from bench.harness.timer import host_seconds, interleave, stopwatch


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.probe")
    parser.add_argument("case", choices=sorted(CASES))
    parser.add_argument("contender")
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--frames", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--processor-time", action="store_true", help="of all threads, in place of the wall clock"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    case = CASES[options.case]
    model = case.model(options.frames, device=options.device)
    batch = case.batch(options.size, options.frames, device=options.device)
    contender = registry()[options.contender](case, model, batch, Settings())
    measure = (
        partial(host_seconds, clock=time.process_time)
        if options.processor_time
        else stopwatch(options.device)
    )
    taken = interleave({"it": contender}, rounds=options.rounds, measure=measure)
    print(json.dumps({"seconds": taken["it"].median}))


if __name__ == "__main__":
    main()
