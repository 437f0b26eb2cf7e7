"""The import graph of a package, folder by folder, now or at an earlier revision.

    python -m tests.import_graph                                 dpkernels.nn, dpkernels.privacy, asr_finetune, bench
    python -m tests.import_graph asr_finetune --revision 4616ebc  as it was then
    python -m tests.import_graph dpkernels.nn --mermaid           a diagram, for a page

A folder or file directly in a package is a room; an arrow goes from each room to one that its modules import. Imports
that only a type checker sees count, too.
"""

import argparse
import graphlib
import io
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterator

from tests.test_imports import ROOT, imports_of, modules

DEFAULT = ("dpkernels.nn", "dpkernels.privacy", "asr_finetune", "bench")


def sources(package: str, revision: str | None) -> dict[str, str]:
    """Module name -> source text, of every module in `package`."""
    texts = _at(revision) if revision else ((name, path.read_text()) for name, path in modules())
    named = {name.removesuffix(".__init__"): text for name, text in texts}
    return {name: text for name, text in named.items() if name.startswith(f"{package}.")}


def _at(revision: str) -> Iterator[tuple[str, str]]:
    command = ["git", "archive", revision, "dpkernels", "asr_finetune", "bench"]
    archive = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for member in files:
            if member.name.endswith(".py"):
                stream = files.extractfile(member)
                assert stream is not None
                yield member.name.removesuffix(".py").replace("/", "."), stream.read().decode()


def arrows(package: str, texts: dict[str, str]) -> Counter[tuple[str, str]]:
    """(room, room that it imports) -> number of imports of single modules."""

    def room(module: str) -> str:
        return module.removeprefix(f"{package}.").split(".")[0]

    counts: Counter[tuple[str, str]] = Counter()
    for module, text in texts.items():
        for name in imports_of(text, module) & texts.keys():
            if room(name) != room(module):
                counts[room(module), room(name)] += 1
    return counts


def main() -> None:
    """Print what the module's docstring says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("packages", nargs="*", default=DEFAULT)
    parser.add_argument("--revision", help="a git revision; by default the working tree")
    parser.add_argument("--mermaid", action="store_true", help="print a Mermaid diagram")
    options = parser.parse_args()
    for package in options.packages:
        texts = sources(package, options.revision)
        counts = arrows(package, texts)
        rooms = {name.removeprefix(f"{package}.").split(".")[0] for name in texts}
        if options.mermaid:
            print("graph LR", *(f"    {a} --> {b}" for a, b in sorted(counts)), sep="\n")
            continue
        print(f"{package}: {len(rooms)} rooms, {len(counts)} arrows, {_circle(rooms, counts)}")
        for here in sorted(rooms):
            below = ", ".join(f"{b} ({n})" for (a, b), n in sorted(counts.items()) if a == here)
            print(f"    {here} -> {below or 'nothing'}")


def _circle(rooms: set[str], counts: Counter[tuple[str, str]]) -> str:
    below = {room: {b for a, b in counts if a == room} for room in rooms}
    try:
        graphlib.TopologicalSorter(below).prepare()
    except graphlib.CycleError as error:
        return f"a circle: {' -> '.join(error.args[1])}"
    return "no circle"


if __name__ == "__main__":
    main()
