"""`python -m tests.privacy.ranks.kill --kills 50`: kill -9 of random ranks of a run under torchrun, at random instants.

After each kill torchrun starts all ranks anew, and the run goes on from its last checkpoint. Checked after each kill
and at the end: nothing hangs; no rank has applied a step that the ledger does not count; no checkpoint that was written
is lost or older than one before it; the run ends.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dpkernels.privacy import read_ledger

LONGEST = (
    240.0  # seconds between a kill and the next step of the ledger, after which the run counts as hanging
)


class Killed(AssertionError):
    """A run of several processes did not survive a kill."""


def lines(path: Path) -> list[int]:
    """The complete lines of a file of numbers."""
    return [int(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def check(folder: Path, ranks: int) -> None:
    """Raise Killed if a step that a rank has applied is not in the ledger, or a saved step was lost."""
    applied = {rank: len(lines(folder / f"applied.{rank}")) for rank in range(ranks)}
    counted = read_ledger(folder / "ledger.jsonl").steps if (folder / "ledger.jsonl").exists() else 0
    if max(applied.values()) > counted:
        raise Killed(f"ranks applied {applied} steps, and the ledger counts {counted}")
    saved = lines(folder / "saved")
    if saved != sorted(saved):
        raise Killed(f"a saved step was lost: checkpoints of steps {saved}")


def run(folder: Path, kills: int, ranks: int, seed: int) -> tuple[int, int]:
    """Run until `kills` kills are done, then to the end; the numbers of kills and of steps in the ledger."""
    draws = random.Random(seed)
    script = Path(__file__).with_name("killed_run.py")
    root = script.parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [f"--max-restarts={kills + 5}", "--monitor-interval=0.1", str(script), str(folder)]
    with open(folder / "log", "w") as log:
        agent = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=root)
    done = 0
    try:
        while done < kills:
            started = _wait_for_a_step(folder, agent)
            if not started:
                break  # the run ended before all kills
            time.sleep(draws.choice([0.0, 0.01, 0.05, 0.2]) * draws.random())
            os.kill(int((folder / f"pid.{draws.randrange(ranks)}").read_text()), signal.SIGKILL)
            done += 1
            check(folder, ranks)
            print(
                f"{done} of {kills} kills, {read_ledger(folder / 'ledger.jsonl').steps} steps counted",
                flush=True,
            )
        if agent.wait(LONGEST):
            raise Killed(f"the run ended with {agent.returncode}:\n{(folder / 'log').read_text()[-4000:]}")
    finally:
        agent.kill()
    check(folder, ranks)
    return done, read_ledger(folder / "ledger.jsonl").steps


def _wait_for_a_step(folder: Path, agent: subprocess.Popen[bytes]) -> bool:
    """Wait until rank 0 applies another step; False if the run ended."""
    path = folder / "applied.0"
    before, deadline = len(lines(path)), time.monotonic() + LONGEST
    while len(lines(path)) == before:
        if agent.poll() is not None:
            return False
        if time.monotonic() > deadline:
            raise Killed(f"no step for {LONGEST:.0f} s:\n{(folder / 'log').read_text()[-4000:]}")
        time.sleep(0.005)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.privacy.ranks.kill", description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        done, counted = run(Path(folder), options.kills, options.ranks, options.seed)
    print(f"{done} kills survived; {counted} steps counted, none uncounted, no saved step lost")


if __name__ == "__main__":
    main()
