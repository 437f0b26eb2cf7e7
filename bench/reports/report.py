"""docs/benchmarks.md, the README's table, docs/distributed.md's, and the plots, from the results files.

`python -m bench.reports.report` writes them. In every page the tables stand between `<!-- bench -->` and
`<!-- /bench -->`; what is between them is replaced, and nothing in it is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.harness.checker import OK
from bench.harness.machine import ROOT
from bench.harness.results import FOLDER, GROUPS, Results, load
from bench.reports import kernel as kernel_report
from bench.reports import plots, profile, scaling, transducer
from bench.reports import step as step_report
from bench.reports.step import main_rows

START, END = "<!-- bench -->", "<!-- /bench -->"
README, BENCHMARKS = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
DISTRIBUTED = ROOT / "docs" / "distributed.md"


def found(folder: Path, device: str | None = None) -> list[Results]:
    """All results under a folder (of one device), in the order of the groups."""
    paths = sorted(folder.glob(f"{device or '*'}/*.json"))
    results = [load(path) for path in paths if path.stem in GROUPS]
    return sorted(results, key=lambda result: (result.about["slug"], GROUPS.index(result.group)))


def replace_section(text: str, section: str) -> str:
    """`text` with what stands between the markers replaced.

    Raises:
        ValueError: not exactly one pair of markers.
    """
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"it must hold {START} and, after it, {END}, each once")
    before, rest = text.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n\n{section}\n\n{END}{after}"


def targets(all_results: Sequence[Results]) -> list[str]:
    """The stated targets of a step at T = 150 on a CPU, each with what was measured and whether it is met."""
    lines = []
    for result in all_results:
        for row in main_rows(result):
            if result.group != "step" or not row.contender.startswith("dpkernels") or row.status != OK:
                continue
            lora = "r" in row.shape
            wanted = [("time, × non-private", row.ratio, 1.10 if lora else 1.25, False)]
            wanted += [("faster than Opacus ghost", row.over_ghost, 2.0 if lora else 1.5, True)]
            if lora:
                wanted += [("memory, × non-private", row.memory_ratio, 1.10, False)]
                wanted += [("faster than Opacus hooks", row.over_hooks, 1.2, True)]
            for what, value, limit, more in wanted:
                if value is None:
                    continue
                met = value >= limit if more else value <= limit
                words = f"{row.title}: {what} {value:.2f} ({'≥' if more else '≤'} {limit})"
                lines.append(f"{'met   ' if met else 'MISSED'} {result.about['slug']}: {words}")
    return lines


def profiles(folder: Path, device: str | None = None) -> list[str]:
    """What `python -m bench.reports.profile` saved, as Markdown."""
    paths = sorted(folder.glob(f"{device or '*'}/profile.json"))
    return [profile.markdown(json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def pages(folder: Path, device: str | None = None) -> dict[Path, str]:
    """Return the text between the markers of each page, from the results under `folder` (of one device)."""
    results = found(folder, device)
    steps = step_report.markdown(results)
    parts = [steps] if steps else []
    parts += transducer.section(results) + profiles(folder, device) + kernel_report.section(folder, device)
    return {
        # Opacus's examples are in the long page; the README has speech and language models
        README: step_report.summary([result for result in results if result.group != "opacus"]),
        BENCHMARKS: "\n\n".join(parts),
        DISTRIBUTED: scaling.section(folder, device),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.reports.report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--device", help="only this folder of bench/results")
    parser.add_argument("--results", type=Path, default=FOLDER, help="default: bench/results")
    parser.add_argument(
        "--print", action="store_true", help="print the tables; leave the pages and the plots alone"
    )
    options = parser.parse_args(arguments)
    results = found(options.results, options.device)
    sections = pages(options.results, options.device)
    if not results and not any(sections.values()):
        print(f"nothing under {options.results}: run pytest --benchmark first", file=sys.stderr)
        return 1
    if options.print:
        print("\n\n".join(sections.values()))
    else:
        folder = options.results / "plots"
        drawn = plots.draw(results, folder) + transducer.draw(results, folder) + scaling.draw(options.results)
        for path in drawn:
            print(f"drew {path.relative_to(options.results)}")
        for page, section in sections.items():
            try:
                page.write_text(replace_section(page.read_text(encoding="utf-8"), section), encoding="utf-8")
                print(f"{page.name}: tables replaced")
            except ValueError as error:
                print(f"{page.name} was left alone: {error}; --print shows the tables", file=sys.stderr)
    print("\n".join(targets(results) + transducer.targets(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
