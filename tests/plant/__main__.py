"""`python -m tests.plant`: plant each fault of the privacy design's table, and say whether the suite catches it."""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.plant import readme
from tests.plant.data import Fault
from tests.plant.lines import LINES
from tests.plant.runner import CAUGHT, Outcome, run_all

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 where a fault is not caught, stale, out of time or in error."""
    parser = argparse.ArgumentParser(prog="python -m tests.plant", description=__doc__)
    parser.add_argument("--only", metavar="PATTERN", help="faults whose name, path or line number matches")
    parser.add_argument("--list", action="store_true", help="print the faults and do nothing")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="default %(default)s"
    )
    parser.add_argument(
        "--timeout", type=float, default=180, metavar="S", help="of a fault; default %(default)s"
    )
    parser.add_argument(
        "--write", action="store_true", help="write tests/privacy/README.md anew, and do nothing else"
    )
    options = parser.parse_args(arguments)
    if options.write:
        readme.PATH.write_text(readme.text(LINES), encoding="utf-8")
        return 0
    faults = [fault for line in LINES for fault in line.faults if _matches(options.only, line.number, fault)]
    if not faults:
        parser.error(f"--only {options.only!r}: no fault has such a name, path or line")
    if options.list:
        print(*(f"{fault.name}: {fault.path}" for fault in faults), sep="\n")
        return 0

    def tell(count: int, fault: Fault, outcome: Outcome) -> None:
        said = f"[{count}/{len(faults)}] {outcome.word:10} {outcome.seconds:5.1f} s  {fault.name}: {outcome.detail}"
        print(said, flush=True)

    print(f"{len(faults)} faults; the tests of each are run without it first", flush=True)
    outcomes = run_all(ROOT, faults, jobs=options.jobs, timeout=options.timeout, tell=tell)
    counts = Counter(outcome.word for outcome in outcomes)
    print(", ".join(f"{count} {word}" for word, count in counts.most_common()))
    return int(set(counts) != {CAUGHT})


def _matches(pattern: str | None, number: int, fault: Fault) -> bool:
    if pattern is None or pattern == str(number):
        return True
    return any(fnmatch.fnmatch(text, pattern) or pattern in text for text in (fault.name, fault.path))


if __name__ == "__main__":
    sys.exit(main())
