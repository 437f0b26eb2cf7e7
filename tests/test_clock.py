"""A clock that is set back or forward changes nothing: durations are measured by the monotonic clock, and no file's
time is compared with another's. Where the day's time is read, it is a date for readers."""

from __future__ import annotations

import ast

from tests.test_imports import modules

PACKAGES = ("dpkernels.", "asr_finetune.")
# module -> what it reads of the clock, and why that orders nothing
READS = {
    "asr_finetune.training.record": {"datetime.now"},  # the date in run.json
    "asr_finetune.data.audio": {"st_mtime_ns"},  # compared for equality: was the file replaced?
    "dpkernels.privacy.setup": {"gmtime", "strftime"},  # the date in a run line of the ledger
}
_CALLS = {"time.time", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"}
_NAMES = {
    *("time_ns", "fromtimestamp", "localtime", "gmtime", "ctime", "strftime"),
    *("getmtime", "getctime", "getatime"),
    *(f"st_{kind}time{unit}" for kind in "mca" for unit in ("", "_ns")),
}


def clock_reads(source: str) -> set[str]:
    """The names by which a module reads the day's time, or a file's."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            found |= {f"time.{name.name}" for name in node.names}
        elif isinstance(node, ast.Attribute):
            owner = getattr(node.value, "id", None) or getattr(node.value, "attr", "")
            found |= {node.attr} & _NAMES | {f"{owner}.{node.attr}"} & _CALLS
    return found


def test_nothing_is_ordered_by_the_day_s_time() -> None:
    found = {name: clock_reads(path.read_text()) for name, path in modules() if name.startswith(PACKAGES)}
    assert {name: reads for name, reads in found.items() if reads} == READS


def test_a_read_of_the_clock_is_seen() -> None:
    for line in (
        "import time; begun = time.time()",
        "from time import time",
        "newest = max(files, key=lambda file: file.stat().st_mtime)",
        "from datetime import datetime; stamp = datetime.now()",
        "import os; os.path.getmtime(path)",
    ):
        assert clock_reads(line), line
    assert not clock_reads("import time; begun = time.monotonic(); time.sleep(1)")
