"""`python -m bench.models`: see the package."""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Sequence

import torch

from bench.models import table
from bench.models.judge import METHODS, Verdict, judge
from bench.models.zoo import ENTRIES


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.models", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="models whose name or kind has one of these words"
    )
    parser.add_argument(
        "--part", default="1/1", metavar="N/M", help="the Nth of M parts; default %(default)s"
    )
    parser.add_argument("--write", action="store_true", help=f"write {table.RESULTS.name} and docs/models.md")
    options = parser.parse_args(arguments)
    if options.write and (options.only or options.part != "1/1"):
        parser.error("--write is for all models: leave out --only and --part")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)  # such small models only wait for more
    verdicts = run(options.only, options.part)
    if options.write:
        table.save(verdicts)
        table.PAGE.write_text(table.page(*table.load()), encoding="utf-8")
    for method, by_status in table.counts(verdicts).items():
        print(method, by_status)
    return int(bool(table.faults(verdicts)))


def run(only: Sequence[str] | None = None, part: str = "1/1") -> list[Verdict]:
    """The verdicts of some of the entries, each printed as it comes."""
    number, parts = (int(word) for word in part.split("/"))
    chosen = [
        entry
        for entry in ENTRIES
        if not only
        or any(word.lower() in f"{entry.name} {entry.kind.name} {entry.library}".lower() for word in only)
    ]
    verdicts = []
    for entry in chosen[number - 1 :: parts]:
        for method in METHODS:
            start = time.perf_counter()
            verdict = judge(entry, method)
            took = time.perf_counter() - start
            result = f"{verdict.error:.0e}" if verdict.reason == "" else verdict.reason
            print(
                f"{verdict.status:8}{method:6}{entry.library:13}{entry.name:32}{took:6.2f} s  {result}",
                flush=True,
            )
            verdicts.append(verdict)
    return verdicts


if __name__ == "__main__":
    sys.exit(main())
