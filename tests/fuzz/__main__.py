"""`python -m tests.fuzz`: random cases for the native CPU kernels and the readers of files.

A case that fails prints the command that runs it alone. `--resume` goes on where the last run with this seed stopped,
also where a case ended the process.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dpkernels.backends import native
from tests.fuzz import kernels
from tests.fuzz.run import Fuzzer, Journal, Kind

ONLY = ("all", "native", "readers")
JOURNALS = Path(__file__).resolve().parents[2] / "build" / "fuzz"
MOST_SHOWN = 20


def kinds(only: str) -> list[Kind]:
    """The kinds of cases of a choice of ONLY; the readers import asr_finetune, which takes a while."""
    chosen = [] if only == "readers" else list(kernels.KINDS)
    if only != "native":
        from tests.fuzz import readers

        chosen += readers.KINDS
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 where a case failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000, metavar="N", help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default %(default)s")
    parser.add_argument("--case", type=int, metavar="K", help="this case only")
    parser.add_argument("--only", choices=ONLY, default="all", help="kinds of cases; default %(default)s")
    parser.add_argument("--resume", action="store_true", help="go on behind the last case of this seed")
    options = parser.parse_args(arguments)
    if options.only != "readers" and (reason := native.unavailable_reason("cpu", "linear")):
        parser.error(f"{reason}; or give --only readers")
    console = Console(highlight=False)
    fuzzer = Fuzzer(kinds(options.only), options.seed)
    again = f"python -m tests.fuzz --only {options.only} --seed {options.seed} --case"
    if options.case is not None:
        failure = fuzzer.run(options.case)
        said = failure or f"case {options.case} ({next(iter(fuzzer.counts))}): nothing wrong"
        console.print(str(said), markup=False)
        return int(failure is not None)
    journal = Journal(JOURNALS / f"{options.only}-{options.seed}.txt")
    first, crashed = journal.read() if options.resume else (0, False)
    if crashed:
        console.print(f"case {first - 1} ended the process: {again} {first - 1}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with journal.written() as note, Progress(*columns, console=console) as progress:
        task = progress.add_task(f"seed {options.seed}", total=options.cases, completed=first)
        for case in range(first, options.cases):
            note(case)
            failure = fuzzer.run(case)
            if failure is not None and len(fuzzer.failures) <= MOST_SHOWN:
                console.print(f"{failure}\n  {again} {case}", markup=False)
            progress.advance(task)
        note(options.cases)
    ran = ", ".join(f"{count} {name}" for name, count in fuzzer.counts.most_common())
    console.print(f"{fuzzer.counts.total()} cases ({ran}): {len(fuzzer.failures)} failed")
    return int(bool(fuzzer.failures) or crashed)


if __name__ == "__main__":
    sys.exit(main())
