"""A training script for torchrun that saves a checkpoint each second step, and goes on from it when it is started anew.

`python -m tests.privacy.ranks.kill` kills its processes. Each writes a line for every step it has applied.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from dpkernels.files import write_atomically
from dpkernels.privacy import join_processes
from tests.privacy.private_run import losses_of, private_run

STEPS = 40


def main(folder: Path) -> None:
    join_processes(timedelta(seconds=60))
    rank = dist.get_rank()
    (folder / f"pid.{rank}").write_text(str(os.getpid()))
    ledger = folder / "ledger.jsonl"
    run = private_run(examples=400, batch_size=40, lr=0.05, ledger=ledger, optimizer=torch.optim.AdamW)
    checkpoint, step = folder / "checkpoint.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        run.model.load_state_dict(saved["model"])
        run.optimizer.load_state_dict(saved["optimizer"])
        run.engine.load_state_dict(saved["engine"])
        step = saved["step"]
    applied = (folder / f"applied.{rank}").open("a")
    while step < STEPS:
        for logical in run.loader:
            for batch in logical:
                run.optimizer.backward(losses_of(run.model, batch))
            run.optimizer.step()
            run.optimizer.zero_grad()
            step += 1
            print(step, file=applied, flush=True)
            os.fsync(applied.fileno())
            if step % 2 == 0 or step == STEPS:
                state = run.optimizer.state_dict()
                if rank == 0:
                    whole = {
                        "model": run.model.state_dict(),
                        "optimizer": state,
                        "engine": run.engine.state_dict(),
                        "step": step,
                    }
                    write_atomically(checkpoint, partial(torch.save, whole))
                    with (folder / "saved").open("a") as log:
                        print(step, file=log)
            if step >= STEPS:
                break
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
