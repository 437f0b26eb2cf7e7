"""Draws docs/design.svg, the packages and which imports which: `python scripts/design_diagram.py`."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

OUT = Path(__file__).resolve().parents[1] / "docs" / "design.svg"
WIDTH, ROW, BOX = 880, 104, 62  # a row's height includes the arrows below its boxes
# path -> (row, left, right, what lives there)
BOXES = {
    "asr_finetune": (0, 20, 860, "speech recognisers: data, models, training, plan, report, command line"),
    "dpkernels/privacy": (1, 20, 310, "engine, clipping, noise, accounting"),
    "dpkernels/interop": (1, 330, 610, "rules for PEFT and transformers"),
    "dpkernels/losses.py": (1, 630, 860, "CTC, cross-entropy: [B]"),
    "dpkernels/nn": (2, 20, 610, "ghost layers, their records, the tape; swap and attach"),
    "dpkernels/ops": (3, 20, 610, "one public function an op: schema, checks, docstring"),
    "dpkernels/reference": (4, 20, 310, "every op's definition, in float64"),
    "dpkernels/backends": (4, 330, 610, "native, Triton, torch; the registry"),
    "csrc": (5, 330, 610, "C ABI; kernels for CPU and CUDA"),
}
ARROWS = (
    ("asr_finetune", "dpkernels/privacy"),
    ("asr_finetune", "dpkernels/interop"),
    ("asr_finetune", "dpkernels/losses.py"),
    ("dpkernels/privacy", "dpkernels/nn"),
    ("dpkernels/interop", "dpkernels/nn"),
    ("dpkernels/nn", "dpkernels/ops"),
    ("dpkernels/ops", "dpkernels/reference"),
    ("dpkernels/ops", "dpkernels/backends"),
    ("dpkernels/backends", "csrc"),
)


def box(path: str) -> str:
    """A package: its path, and what lives there."""
    row, left, right, words = BOXES[path]
    middle, top = (left + right) / 2, 20 + row * ROW
    return (
        f'<rect x="{left}" y="{top}" width="{right - left}" height="{BOX}" rx="6" fill="#eef3f8" stroke="#30506b"/>\n'
        f'<text x="{middle:g}" y="{top + 26}" class="path">{escape(path)}</text>\n'
        f'<text x="{middle:g}" y="{top + 47}">{escape(words)}</text>'
    )


def arrow(above: str, below: str) -> str:
    """A vertical arrow, in the middle of what both boxes span."""
    (upper, *first, _), (lower, *second, _) = BOXES[above], BOXES[below]
    middle = (max(first[0], second[0]) + min(first[1], second[1])) / 2
    start, end = 20 + upper * ROW + BOX, 20 + lower * ROW
    return f'<line x1="{middle:g}" y1="{start}" x2="{middle:g}" y2="{end - 8}" marker-end="url(#head)"/>'


def drawing() -> str:
    """The whole picture, on white, so that it can be read on a dark page too."""
    height = 20 + ROW * (1 + max(row for row, *_ in BOXES.values())) - (ROW - BOX) + 20
    return "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" '
            f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">',
            "<title>The packages; an arrow leads to what a package imports</title>",
            "<style>text { font: 14px sans-serif; text-anchor: middle; fill: #1b2733 }",
            ".path { font: bold 15px monospace } line { stroke: #30506b; stroke-width: 1.5 }</style>",
            '<marker id="head" viewBox="0 0 8 8" refX="1" refY="4" markerWidth="8" markerHeight="8" orient="auto">',
            '<path d="M0 0 L8 4 L0 8 z" fill="#30506b"/></marker>',
            f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
            *(box(path) for path in BOXES),
            *(arrow(*pair) for pair in ARROWS),
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    OUT.write_text(drawing(), encoding="utf-8")
