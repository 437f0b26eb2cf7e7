"""The commands on what a run leaves: verify its record. `cli.py` has the commands that make a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

_Run = Annotated[Path, typer.Argument(help="Output folder of a run.", show_default=False)]


def verify(run: _Run) -> None:
    """Recompute ε from a run's ledger with dp-accounting alone, and compare it with what the run states.

    The command reads the ledger with code of its own, checks the chain of hashes from the first line to the last, and
    compares steps, noise, sampling, N and ε with run.json, report.html and the adapter's README.md, where they exist.
    It exits with 1 if anything differs. It needs neither the recordings nor the model.

    **Example**

    - `asr-finetune verify runs/first`
    """
    from asr_finetune.report import verify as checks

    findings = checks.verify(run)
    Console().print(checks.table(findings))
    raise typer.Exit(0 if all(finding.agrees for finding in findings) else 1)
