"""`python -m tests.sanitize`: build the CPU library with sanitizers, run native tests and the fuzzer, plant faults."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from tests.plant.runner import planted
from tests.sanitize.build import ADDRESS, THREAD, Copy, SanitizeError
from tests.sanitize.faults import ADDRESS_FAULTS, THREAD_FAULTS, NativeFault

# Where native kernels run. The part is what .ci/run has time for: each kernel once, and the fuzzer.
TESTS = ("tests/ops", "tests/privacy/step/test_fused.py", "tests/privacy/step/test_noise.py")
PART = ("tests/ops/test_native.py", "tests/ops/test_native_transducer.py", "tests/ops/test_optim.py")
# What several threads do; not how many threads there are, of which ThreadSanitizer has one.
THREADED = (
    "tests/ops/test_native.py::test_threads_change_no_bit",
    "tests/ops/test_native_transducer.py::test_threads_change_no_bit",
    "tests/ops/test_native_transducer.py::test_several_callers_at_once",
    "tests/ops/test_optim.py::test_same_bits_for_every_instruction_set_and_thread_count",
    "tests/ops/test_threads.py::test_several_callers_at_once",
    "tests/ops/test_threads.py::test_a_forked_child_computes_the_same",
)
CASES, PART_CASES, THREADED_CASES = 5_000, 300, 300


def table_of(log: Iterable[str]) -> tuple[Table, list[str]]:
    """A table of a log by file, and the tests that did not pass: failed, or under way when the process ended."""
    outcomes: dict[str, tuple[str, float]] = {}
    for line in map(json.loads, log):
        outcomes[line["test"]] = line["outcome"], line["seconds"]
    files: defaultdict[str, list[tuple[str, float]]] = defaultdict(list)
    for test, outcome in outcomes.items():
        files[test.partition("::")[0]].append(outcome)
    table = Table("file")
    for name in ("passed", "skipped", "failed", "seconds"):
        table.add_column(name, justify="right")
    for name, results in [*sorted(files.items()), ("all", list(outcomes.values()))]:
        counts = Counter(outcome for outcome, _ in results)
        failed = counts["failed"] + counts["began"]
        seconds = sum(seconds for _, seconds in results)
        table.add_row(name, *map(str, (counts["passed"], counts["skipped"], failed)), f"{seconds:.1f}")
    wrong = [test for test, (outcome, _) in outcomes.items() if outcome in ("failed", "began")]
    return table, wrong


class Session:
    """One run of the command: what it says, and whether all was well."""

    def __init__(self, copy: Copy) -> None:
        self.copy = copy
        self.console = Console()
        self.well = True

    def tests(self, tests: Sequence[str], *options: str) -> None:
        """Run tests of the copy, and print the table."""
        log = self.copy.reports.with_name("results.jsonl")
        log.unlink(missing_ok=True)
        code = self._pytest(tests, f"--sanitize-log={log}", *options)
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        table, wrong = table_of(lines)
        self.console.print(table)
        self._judge(f"pytest ended with {code}", code == 0 and bool(lines) and not wrong, wrong)

    def fuzz(self, cases: int) -> None:
        """Run the fuzzer in the copy, from the seed 0."""
        code = self.copy.run("-m", "tests.fuzz", "--cases", str(cases), "--seed", "0", "--only", "native")
        self._judge(f"the fuzzer ended with {code}", code == 0, [])

    def faults(self, faults: Sequence[NativeFault]) -> None:
        """Plant each fault in the copy's C++; the sanitizer must stop the tests with the report that is expected."""
        table = Table("planted in C++", "report", "seconds")
        for native in faults:
            began = time.monotonic()
            source = self.copy.folder / native.fault.path
            with planted(self.copy.folder, native.fault) as there:
                said = "stale: its text is not there exactly once"
                if there:
                    source.touch()  # ninja builds what is newer than its object
                    self.copy.rebuild()
                    self._pytest(native.fault.tests, "--no-summary", "-x")
                    said = "\n".join(self.copy.findings())
            source.touch()
            caught = native.says in said
            self.well &= caught
            shown = native.says if caught else f"NOT CAUGHT {said[:300]}"
            table.add_row(native.fault.name, shown, f"{time.monotonic() - began:.0f}")
        self.copy.rebuild()
        self.console.print(table)

    def _pytest(self, tests: Sequence[str], *options: str) -> int:
        return self.copy.run(
            *("-m", "pytest", "-q", "-p", "tests.sanitize.plugin", "-p", "no:cacheprovider", "--capture=sys"),
            *options,
            *tests,
        )

    def _judge(self, what: str, well: bool, wrong: Sequence[str]) -> None:
        findings = self.copy.findings()
        for text in findings:
            self.console.print(text, markup=False, highlight=False)
        if not well or findings:
            self.well = False
            self.console.print(f"{what}; {len(findings)} reports; not passed: {', '.join(wrong) or 'none'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 where a sanitizer reports something, a test fails, or a planted fault is not found."""
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize", description=__doc__)
    parser.add_argument(
        "--threads", action="store_true", help="ThreadSanitizer, on what uses several threads"
    )
    parser.add_argument("--part", action="store_true", help="what .ci/run has time for")
    parser.add_argument("--plant", action="store_true", help="plant the faults of C++, and nothing else")
    parser.add_argument("--only", nargs="+", metavar="TEST", help="these tests only, and nothing else")
    options = parser.parse_args(arguments)
    session = Session(Copy(THREAD if options.threads else ADDRESS))
    began = time.monotonic()
    try:
        session.copy.make()
        session.console.print(f"built in {time.monotonic() - began:.0f} s: {session.copy.folder}")
        if options.only:
            session.tests(options.only, "-m", "not models")
        elif options.plant:
            session.faults(THREAD_FAULTS if options.threads else ADDRESS_FAULTS)
        elif options.threads:
            session.tests(THREADED, "-m", "not models")
            session.fuzz(THREADED_CASES)
            session.faults(THREAD_FAULTS)
        elif options.part:
            session.tests(PART)
            session.fuzz(PART_CASES)
        else:
            session.tests(TESTS, "-m", "not models")
            session.fuzz(CASES)
            session.faults(ADDRESS_FAULTS)
    except SanitizeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    session.console.print(
        f"{'nothing found' if session.well else 'FAILED'} in {time.monotonic() - began:.0f} s"
    )
    return int(not session.well)


if __name__ == "__main__":
    sys.exit(main())
