"""Several processes, as Markdown for docs/distributed.md and as a plot: what was measured here, and what is calculated.

Takes what `bench.scaling` saved (`scaling.json` of a machine) and what `bench.scaling.modelled` calculated
(`calculated/h100-scaling.json`). Everything of the latter says that it is calculated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from bench.harness.table import markdown
from bench.reports.plots import save, style

Saved = Mapping[str, Any]

CALCULATED = Path("calculated") / "h100-scaling.json"
PLOT = "calculated-h100-scaling"
_TITLES = {
    "wav2vec2_bert_lora": "Wav2Vec2-BERT 580.5 M, LoRA",
    "wav2vec2_bert_full": "Wav2Vec2-BERT 580.5 M, full fine-tuning",
    "parakeet_lora": "Parakeet-CTC 608.8 M, LoRA",
    "parakeet_full": "Parakeet-CTC 608.8 M, full fine-tuning",
}
_SHOWN = ("wav2vec2_bert_lora", "wav2vec2_bert_full")
_LINES = {"float32": ("#0072B2", "o"), "bfloat16": ("#D55E00", "s")}
# A part of a step besides forward and backward -> its colour, and the parts of the calculation that it adds up.
_PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "noise, update, host": ("#0072B2", ("update",)),
    "on the links": ("#D55E00", ("links",)),
    "copies, launches": ("#E69F00", ("copies", "launches")),
    "meetings, uneven parts": ("#999999", ("meetings", "uneven")),
}
_WAYS = {"one process": "one process", "weak": "{}, B each", "strong": "{}, B in all"}


def section(folder: Path, device: str | None = None) -> str:
    """The generated part of docs/distributed.md, from the results under `folder` (of one device)."""
    parts = [
        measured(json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(folder.glob(f"{device or '*'}/scaling.json"))
    ]
    path = folder / CALCULATED
    if path.exists() and device is None:
        parts.append(calculated(json.loads(path.read_text(encoding="utf-8"))))
    return "\n\n".join(parts)


def measured(saved: Saved) -> str:
    """Times, bytes and meetings of one and of several processes on one machine."""
    about = saved["about"]
    head = (
        f"**Measured: {about['device']}, {saved['processes']} processes of one thread over {saved['backend']}** "
        f"(torch {about['versions']['torch']}, commit {about['commit']}, {about['date'][:10]}; load of the machine "
        f"{about['load']:.1f}). The ways take turns, a step each in every round; × one process: the median over "
        "rounds, and its 95 % interval. With B examples each, 1.00 is the ideal; with B in all, 0.50. CPU: of rank 0. "
        "The processes share two cores, their memory and whatever else ran there, so that the time says little and the "
        "CPU time more: it has the arithmetic, the copies and the sending."
    )
    lines = []
    for row in saved["rows"]:
        shape = ", ".join(f"{name} = {value}" for name, value in row["shape"].items())
        ratio = f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})" if "ratio" in row else ""
        first = row["way"] == "one process"
        lines.append(
            [
                f"{row['title']}, {row['entries']:,} entries trained" if first else "",
                _WAYS[row["way"]].format(f"{row['processes']} processes"),
                shape,
                f"{row['median_ms']:.0f} ± {row['iqr_ms'] / 2:.0f}",
                ratio,
                f"{row['cpu_ms']:.0f}",
            ]
        )
    names = ["model", "way", "batch", "time, ms", "× one process", "CPU, ms"]
    return f"{head}\n\n{markdown(names, lines, 'lllrrr')}\n\n{_traffic(saved)}"


def _traffic(saved: Saved) -> str:
    head = (
        "**Bytes of such a step, and its meetings.** An entry: what the buffers hold, over the trained entries (8 and "
        "4, and the padding). Planned: from the parts' sizes; given: the buffers with which the collectives were "
        "called; to be sent: by a process of a ring, as NCCL makes it; sent: what the TCP connections of rank 0 "
        "carried, by the kernel's count, facts included. gloo's reduce-scatter sends as much as an all-reduce, twice "
        "the bytes of a ring. A meeting: the two exchanges of facts of a step, when no process is late."
    )
    lines = []
    for row in saved["rows"]:
        if row["way"] != "weak":
            continue
        sent = "" if row["sent"] is None else f"{row['sent']:,}"
        lines.append(
            [
                row["title"],
                f"{row['given_in'] / row['entries']:.2f} + {row['given_out'] / row['entries']:.2f}",
                f"{row['planned_in'] + row['planned_out']:,}",
                f"{row['given_in'] + row['given_out']:,}",
                f"{row['planned_sent']:,}",
                sent,
                f"{row['meeting_ms']:.1f}",
            ]
        )
    names = [
        "model",
        "bytes an entry",
        "planned",
        "given",
        "to be sent by a process",
        "sent by rank 0",
        "meeting, ms",
    ]
    return f"{head}\n\n{markdown(names, lines, 'lrrrrrr')}"


def calculated(saved: Saved) -> str:
    """Hours on 1, 8 and 64 GPUs, and what a step adds to forward and backward. Not measured, and said so."""
    links = saved["assumed"]["links"]
    network = links[0]["name"].partition(", ")[2]
    head = (
        f"**Calculated, NOT measured: several {saved['device']}.** From the kernels and recipes that were measured on "
        f"one (commit {saved['from']['commit']}, {saved['from']['date'][:10]}; [recipes.md](recipes.md)) and the "
        f"links' published rates: NVLink {links[0]['nvlink'] / 1e9:.0f} GB/s in each direction, and {network} of eight "
        f"GPUs, of which {links[0]['reached']:.0%} are reached. No run of more than one GPU has been made. "
        "Wav2Vec2-BERT's rate on one GPU is itself calculated, from Parakeet's by FLOPs. Hours are of the whole "
        "recipe, without evaluation; reading audio keeps up. `bench/scaling/modelled.py` has every part."
    )
    rows = {(row["recipe"], row["dtype"], row["gpus"], row["links"]): row for row in saved["rows"]}
    fast, slow = (each["name"] for each in links)
    lines = []
    for recipe, dtype in dict.fromkeys((row["recipe"], row["dtype"]) for row in saved["rows"]):
        one, eight, many = (rows[recipe, dtype, gpus, fast] for gpus in (1, 8, 64))
        other = rows[recipe, dtype, 64, slow]
        lines.append(
            [
                f"`{recipe}`",
                dtype,
                *(f"{row['hours']:.3g}" for row in (one, eight, many)),
                f"{_added(eight):.1%}",
                f"{_added(many):.1%}",
                f"{_added(other):.1%}",
                f"{many['sent'] / 1e6:,.0f}",
            ]
        )
    names = [
        "recipe",
        "arithmetic",
        "hours on 1",
        "on 8",
        "on 64",
        "added on 8",
        "on 64",
        "on 64, 100 Gbit/s Ethernet",
        "MB sent a step",
    ]
    table = markdown(names, lines, "llrrrrrrr")
    picture = f"![Calculated hours of a run on 1 to 64 GPUs, and what a step adds](../bench/results/plots/{PLOT}.png)"
    return (
        f"{head}\n\n{picture}\n\n{table}\n\nAdded: the time of a step beside forward and backward, over these. MB: of "
        "each GPU, on 64. A step is this cheap to exchange because its batch is large: 4,096 utterances with LoRA, "
        "16,384 with full fine-tuning. With smaller batches the added part grows in proportion."
    )


def _added(row: Saved) -> float:
    """The time of a step beside forward and backward, over these."""
    return float(row["step_seconds"] / row["parts"]["backward"] - 1)


def draw(folder: Path) -> list[Path]:
    """The plot of the calculated step, where there is one; the paths written."""
    path = folder / CALCULATED
    if not path.exists():
        return []
    with style():
        figure = _figure(json.loads(path.read_text(encoding="utf-8")))
    return save(figure, folder / "plots" / PLOT)


def _figure(saved: Saved) -> Figure:
    fast = saved["assumed"]["links"][0]["name"]
    rows = [row for row in saved["rows"] if row["links"] == fast]
    figure = Figure(figsize=(7.6, 5.6))
    panels = figure.subplots(
        2,
        2,
        height_ratios=(1.9, 1),
        gridspec_kw={
            "left": 0.085,
            "right": 0.975,
            "bottom": 0.14,
            "top": 0.875,
            "hspace": 0.42,
            "wspace": 0.2,
        },
    )
    figure.text(
        0.012, 0.965, "Calculated, not measured: a whole run on several H100s", fontsize=11, weight="bold"
    )
    figure.text(
        0.012,
        0.93,
        "from kernels measured on one (Parakeet's rate, by FLOPs) and published rates of the links; nodes of 8",
        color="#595959",
    )
    for column, recipe in enumerate(_SHOWN):
        mine = [row for row in rows if row["recipe"] == recipe]
        _hours(panels[0][column], mine, _TITLES[recipe])
        _shares(panels[1][column], [row for row in mine if row["dtype"] == "bfloat16"])
    panels[0][0].set_ylabel("hours of a run")
    handles = [panels[1][0].barh(0, 0, color=color) for color, _ in _PARTS.values()]
    figure.legend(handles, list(_PARTS), loc="lower center", ncols=len(_PARTS), frameon=False, fontsize=8.5)
    return figure


def _hours(axes: Axes, rows: Sequence[Saved], title: str) -> None:
    """Hours over GPUs, both logarithmic."""
    axes.set_title(title, fontweight="bold")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for dtype, (color, marker) in _LINES.items():
        points = sorted((row["gpus"], row["hours"]) for row in rows if row["dtype"] == dtype)
        gpus, hours = zip(*points, strict=True)
        axes.plot(gpus, hours, color=color, marker=marker, clip_on=False)
        above = dtype == "float32"
        for count, value in points:
            if count in (1, 8, 64):
                axes.annotate(
                    f"{value:.3g} h",
                    (count, value),
                    xytext=(5, 6) if above else (-5, -6),
                    textcoords="offset points",
                    ha="left" if above else "right",
                    va="bottom" if above else "top",
                    color=color,
                    fontsize=8.5,
                    annotation_clip=False,
                )
        where = 1
        axes.annotate(
            dtype,
            (gpus[where], hours[where]),
            xytext=(8, 6) if above else (-8, -8),
            textcoords="offset points",
            ha="left" if above else "right",
            va="bottom" if above else "top",
            color=color,
            fontsize=8.5,
            fontweight="bold",
        )
    axes.set_xlim(0.4, 120)
    hours = [row["hours"] for row in rows]
    axes.set_ylim(min(hours) / 2.4, max(hours) * 2.2)
    axes.xaxis.set_major_locator(FixedLocator([1, 2, 4, 8, 16, 32, 64]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("GPUs")


def _shares(axes: Axes, rows: Sequence[Saved]) -> None:
    """What a step adds to forward and backward, of these, by part, on 8 and on 64 GPUs."""
    axes.grid(visible=False)
    shown = [row for row in rows if row["gpus"] in (8, 64)]
    for place, row in enumerate(sorted(shown, key=lambda each: each["gpus"])):
        start, base = 0.0, row["parts"]["backward"] / 100
        for color, names in _PARTS.values():
            width = sum(row["parts"][name] for name in names) / base
            axes.barh(place, width, left=start, height=0.6, color=color)
            start += width
        axes.annotate(
            f"{start:.1f} %" if start >= 1 else f"{start:.2f} %",
            (start, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
        )
    axes.set_yticks([0, 1], ["8 GPUs", "64 GPUs"])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(1.6, -0.6)
    widest = max(_added(row) for row in shown) * 100
    axes.set_xlim(0, widest * 1.2)
    axes.set_xlabel("added to forward and backward (bfloat16), %")
