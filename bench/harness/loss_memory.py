"""Peak memory of a transducer loss and its gradient on a CPU, each in a fresh process, beyond that of the inputs.

    echo '{"name": "dpkernels", "threads": 2, "problem": {"kind": "rnnt", "B": 1, "T": 47, "U": 12, "V": 1026}}' \\
        | python -m bench.harness.loss_memory
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace

import torch

from bench.cases.transducer import Problem, step_of
from bench.harness.machine import ROOT
from bench.harness.resident import resident_peak


def peak(name: str, problem: Problem) -> float:
    """Peak MiB of a contender's step with this process's number of threads.

    Raises:
        subprocess.CalledProcessError: the measuring process failed.
    """
    job = {"name": name, "threads": torch.get_num_threads(), "problem": asdict(problem)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "bench.harness.loss_memory"],
        input=json.dumps(job),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(json.loads(done.stdout)["mib"])


def _measure(name: str, threads: int, problem: Problem) -> float:
    torch.set_num_threads(threads)
    step_of(name, replace(problem, B=1, T=8, U=2, V=64))()  # loads libraries and wakes threads
    step = step_of(name, problem)
    return resident_peak(lambda: step() and None)


if __name__ == "__main__":
    given = json.loads(sys.stdin.read())
    print(json.dumps({"mib": _measure(given["name"], given["threads"], Problem(**given["problem"]))}))
