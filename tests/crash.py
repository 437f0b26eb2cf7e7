"""`python -m tests.crash --kills 100`: kill -9 of a recogniser's training at random instants, until it is done.

A killed run is started again by the same call, and the instants are spread over its whole length: loading, self-check,
steps, checkpoints, evaluations, the record. Checked after each kill: no step was applied that the ledger does not
count, and no saved step is lost. At the end the run has finished without anybody's help, and its ε is that of every
step in the ledger.

With `--full SHARE` the disk is full from that instant on in this share of them, in place of the kill: the run must
then end by itself with a message, or have had nothing left to write, and the same is checked.
"""

from __future__ import annotations

import argparse
import functools
import json
import mmap
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dpkernels import checkpoint
from dpkernels.privacy import epsilon, read_ledger
from tests.asr_finetune import tones

UTTERANCES, BATCH, DELTA, SIGMA, STEPS = 24, 6, 1e-3, 4.0, 30
LONGEST = 600.0  # seconds that a run may take, started again, on a busy machine
MARK = b"."  # of an applied step
UNWRITABLE = 3  # exit code of a run that said that it cannot write


class Crashed(AssertionError):
    """A run did not survive a kill."""


def attempt(values: dict[str, Any], applied: Path) -> None:
    """Start or continue the run; each step that was applied is a byte of `applied`, which needs no room on the disk."""
    from asr_finetune.config.schema import Config
    from asr_finetune.training.run import train
    from dpkernels.files import WriteError
    from dpkernels.privacy import DPOptimizer

    with applied.open("r+b") as file:
        marks = mmap.mmap(file.fileno(), 0)
    step = DPOptimizer.step

    @functools.wraps(step)
    def noted(self: DPOptimizer, *arguments: Any) -> Any:
        result = step(self, *arguments)
        marks[marks.find(b"\0")] = ord(MARK)
        return result

    DPOptimizer.step = noted  # type: ignore[method-assign]
    try:
        with tones.one_thread():
            train(Config.from_dict(values), progress=False)
    except WriteError as error:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2
        )  # standard output may be a file
        print(error, flush=True)
        sys.exit(UNWRITABLE)


class Crashes:
    """A run in a folder, which is killed again and again.

    Attributes:
        kills: how many have been made.
        filled: on how many full disks it has ended.
    """

    def __init__(self, folder: Path, seed: int = 0) -> None:
        tones.write_manifest(folder, UTTERANCES)
        tones.write_manifest(folder, 6, seed=1, name="test")
        tones.write_model(folder / "model")
        self._values = tones.settings(
            folder,
            method__kind="head",
            data__test=str(folder / "test.jsonl"),
            privacy__epsilon=None,
            privacy__delta=DELTA,
            privacy__noise_multiplier=SIGMA,
            train__batch_size=BATCH,
            train__steps=STEPS,
            train__checkpoint_every=3,
        )
        self._output = Path(self._values["output"])
        self._applied = folder / "applied"
        self._applied.write_bytes(bytes(mmap.PAGESIZE))
        self._draws = random.Random(seed)
        self._saved = 0
        self.kills = self.filled = 0
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["asr_finetune.training.run"])

    def kill_once(self, longest: float) -> bool:
        """Start the run, kill it within `longest` seconds, and check what is left; False if it finished before."""
        process = self._started_for(longest)
        if process is None:
            return False
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        self.kills += 1
        self.check()
        return True

    def fill_once(self, longest: float) -> bool:
        """As `kill_once`; in place of the kill the system writes nothing more of the process to files."""
        process = self._started_for(longest)
        if process is None:
            return False
        resource.prlimit(process.pid or 0, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        process.join(LONGEST)
        if process.exitcode == 0:  # it had nothing left to write
            return False
        self.filled += 1
        self.check()
        if process.exitcode != UNWRITABLE:
            process.kill()
            raise Crashed(f"a run on a full disk ends without a message, with exit code {process.exitcode}")
        return True

    def _started_for(self, longest: float) -> Any:
        """The process of the run after up to `longest` seconds; None if it finished before."""
        process = self._start()
        process.join(self._draws.uniform(0, longest))
        if process.exitcode is None:
            return process
        self._ended(process.exitcode)
        return None

    def finish(self) -> float:
        """Let the run end, and check its record; the seconds that it took."""
        began = time.monotonic()
        process = self._start()
        process.join(LONGEST)
        if process.exitcode is None:
            process.kill()
            raise Crashed(f"the run hangs: it took more than {LONGEST:.0f} s")
        self._ended(process.exitcode)
        self.check()
        record = json.loads((self._output / "run.json").read_text())
        counted = read_ledger(self._output / "ledger.jsonl").steps
        exact = epsilon(SIGMA, BATCH / UTTERANCES, counted, DELTA)
        if record["steps"] != STEPS or abs(record["privacy"]["epsilon"] / exact - 1) > 1e-9:
            raise Crashed(f"the record has {record['steps']} steps and ε of another number than {counted}")
        return time.monotonic() - began

    def check(self) -> None:
        """Raise Crashed if a step that was applied is not counted, or a saved one is lost."""
        ledger = self._output / "ledger.jsonl"
        counted = read_ledger(ledger).steps if ledger.exists() else 0
        applied = self._applied.read_bytes().count(MARK)
        if applied > counted:
            raise Crashed(f"{applied} steps were applied, and the ledger counts {counted}")
        saved = checkpoint.load(self._output / "checkpoint")
        step = 0 if saved is None else saved.step
        if step < self._saved:
            raise Crashed(f"the checkpoint of step {self._saved} is lost: the last one is of step {step}")
        self._saved = step

    def _start(self) -> Any:
        process = self._context.Process(target=attempt, args=(self._values, self._applied))
        process.start()
        return process

    def _ended(self, code: int) -> None:
        if code != 0:
            raise Crashed(f"the run needs somebody's help: it ended with exit code {code}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--full", type=float, default=0.0, help="share of full disks among the kills")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draws = random.Random(options.seed)
    kills = filled = runs = 0
    with tempfile.TemporaryDirectory() as folder:
        longest = Crashes(Path(folder), options.seed).finish()  # of a run that nobody kills
    while kills + filled < options.kills:
        with tempfile.TemporaryDirectory() as folder:
            crashes = Crashes(Path(folder), options.seed + runs)
            runs += 1
            goes_on = True
            while goes_on and (done := kills + filled + crashes.kills + crashes.filled) < options.kills:
                goes_on = (crashes.fill_once if draws.random() < options.full else crashes.kill_once)(longest)
                print(f"{done + goes_on} of {options.kills} kills", flush=True)
            crashes.finish()
            kills, filled = kills + crashes.kills, filled + crashes.filled
    full = f" and {filled} full disks" if options.full else ""
    print(
        f"{kills} kills{full} in {runs} runs survived: no step uncounted, no saved step lost, every run finished"
    )


if __name__ == "__main__":
    main()
