"""Draws docs/distributed.svg, one step of several processes: `python scripts/distributed_diagram.py`."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

OUT = Path(__file__).resolve().parents[1] / "docs" / "distributed.svg"
WIDTH, LEFT, RANKS = 880, 120, 3
COLUMN, GAP = 236, 16
EDGE, FILL, STRONG, INK = "#30506b", "#eef3f8", "#7fa3c2", "#1b2733"
# Each row: kind, height, words on its left, and the words within: one for all ranks, or one for each.
ROWS: tuple[tuple[str, int, str, tuple[str, ...]], ...] = (
    ("all", 44, "draw", ("one Poisson draw: every rank computes the same, under one secret key",)),
    ("each", 44, "its part", ("forward, backward, clip", "forward, backward, clip", "perhaps no example")),
    ("sums", 54, "sums", ("float64 sums of all entries", "float64 sums of all entries", "zeros")),
    ("all", 44, "meeting", ("all ranks: batch complete, same draw, same count, nobody refuses",)),
    ("each", 44, "count", ("ledger: the step is on disk", "waits for rank 0", "waits for rank 0")),
    ("all", 44, "to owners", ("reduce-scatter, 8 bytes an entry: each part of the sums to its owner",)),
    ("owned", 84, "release", ("+ noise, ÷ B, update",) * RANKS),
    ("all", 44, "to all", ("all-gather, 4 bytes an entry: the new parameters to all ranks",)),
)
SPACE = 26  # between rows, with the arrows


def left_of(rank: int) -> int:
    """The left edge of a rank's column."""
    return LEFT + rank * (COLUMN + GAP)


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """A line of text around x."""
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}"{named}>{escape(words)}</text>'


def box(left: float, top: float, width: float, height: float) -> str:
    """A box of the style of docs/design.svg."""
    place = f'x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}"'
    return f'<rect {place} rx="6" fill="{FILL}" stroke="{EDGE}"/>'


def bar(rank: int, top: float, filled: tuple[int, ...]) -> list[str]:
    """The trained entries of a rank, cut into the owners' parts; `filled` are those that hold something."""
    width = (COLUMN - 24) / RANKS
    return [
        f'<rect x="{left_of(rank) + 12 + part * width:g}" y="{top:g}" width="{width:g}" height="18" '
        f'fill="{STRONG if part in filled else "white"}" stroke="{EDGE}"/>'
        for part in range(RANKS)
    ]


def row(kind: str, top: int, height: int, name: str, words: tuple[str, ...]) -> list[str]:
    """One row of the picture."""
    parts = [text(LEFT - 14, top + height / 2 + 5, name, "side")]
    if kind == "all":
        whole = left_of(RANKS - 1) + COLUMN - LEFT
        return [*parts, box(LEFT, top, whole, height), text(LEFT + whole / 2, top + height / 2 + 5, words[0])]
    for rank, said in enumerate(words):
        middle = left_of(rank) + COLUMN / 2
        if kind == "each":
            parts += [box(left_of(rank), top, COLUMN, height), text(middle, top + height / 2 + 5, said)]
        elif kind == "sums":
            parts += [
                *bar(rank, top + 2, () if said == "zeros" else tuple(range(RANKS))),
                text(middle, top + 42, said),
            ]
        else:
            parts += [box(left_of(rank), top, COLUMN, height), *bar(rank, top + 14, (rank,))]
            parts += [
                text(middle, top + 54, said),
                text(middle, top + 73, "of its part; its part of the state", "small"),
            ]
    return parts


def drawing() -> str:
    """The whole picture, on white, so that it can be read on a dark page too."""
    top = 56
    shapes = [text(left_of(rank) + COLUMN / 2, 32, f"rank {rank}", "path") for rank in range(RANKS)]
    for number, (kind, height, name, words) in enumerate(ROWS):
        shapes += row(kind, top, height, name, words)
        if number + 1 < len(ROWS):
            shapes += [
                f'<line x1="{left_of(rank) + COLUMN / 2:g}" y1="{top + height + 2}" '
                f'x2="{left_of(rank) + COLUMN / 2:g}" y2="{top + height + SPACE - 8}" marker-end="url(#head)"/>'
                for rank in range(RANKS)
            ]
        top += height + SPACE
    height = top - SPACE + 20
    return "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" '
            f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">',
            "<title>One step of three processes, from the draw to the new parameters</title>",
            f"<style>text {{ font: 14px sans-serif; text-anchor: middle; fill: {INK} }}",
            ".path { font: bold 15px monospace } .side { text-anchor: end; font-weight: bold }",
            f".small {{ font-size: 12px }} line {{ stroke: {EDGE}; stroke-width: 1.5 }}</style>",
            '<marker id="head" viewBox="0 0 8 8" refX="1" refY="4" markerWidth="8" markerHeight="8" orient="auto">',
            f'<path d="M0 0 L8 4 L0 8 z" fill="{EDGE}"/></marker>',
            f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
            *shapes,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    OUT.write_text(drawing(), encoding="utf-8")
