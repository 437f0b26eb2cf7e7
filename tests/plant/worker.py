"""Runs pytest for one set of tests after another, each in a fork of this process, which imports libraries once.

Its arguments are the libraries, its folder is a copy of the sources, of which it imports nothing itself: a fork does,
and sees the fault that was planted. Each line of its input is a JSON list: the seconds that the tests may take, then
pytest's arguments. Each line that it answers is a JSON list: how pytest ended, null where its time was over, and the
end of what it said.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence

PRELOADED = (
    "numpy",
    "torch",
    "pytest",
    "hypothesis",
    "dp_accounting.pld",
    "dp_accounting.rdp",
    "transformers",
    "peft",
)
_SAID = 2000  # characters


def main() -> None:
    """Serve until the input ends."""
    sys.path[0] = os.getcwd()
    for name in sys.argv[1:]:
        with contextlib.suppress(ImportError):
            module = importlib.import_module(name)
            # before a library imports triton, which then decides whether it interprets kernels (`tests/conftest.py`)
            if name == "torch" and not module.cuda.is_available():
                os.environ.setdefault("TRITON_INTERPRET", "1")
    gc.freeze()  # what is there by now needs no collector: pytest collects several times in every fork
    for line in sys.stdin:
        seconds, *arguments = json.loads(line)
        print(json.dumps(run(arguments, seconds)), flush=True)


def run(arguments: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """pytest with these arguments in a fork, its children with it, for so many seconds at most."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        child = os.fork()
        if child == 0:
            os.setsid()
            for stream in (sys.stdout, sys.stderr):
                os.dup2(said.fileno(), stream.fileno())
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            pytest = importlib.import_module("pytest")
            code = 3  # pytest's own for an internal error
            try:
                code = int(pytest.main([*arguments]))
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        ended = _wait(child, time.monotonic() + seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what it left behind, or all of it
        if ended is None:
            os.waitpid(child, 0)
        said.seek(0)
        return ended, said.read()[-_SAID:]


def _wait(child: int, until: float) -> int | None:
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    return None


if __name__ == "__main__":
    main()
