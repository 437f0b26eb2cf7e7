"""Whether a layer's tensors are kept until the norms are known, or its per-sample gradients are materialised.

An example's gradient of a layer is materialised

- by default (book-keeping, two passes, per layer): of a convolution, if the gradient takes at most half of what is
  kept, or no more than the unfolded windows;
- with `mixed`: of every layer, if it takes at most half of what is kept;
- with `by_time` (`strategy="auto"`): of a linear or LoRA layer, if that takes less time, and at most `1 + memory_share`
  times the memory of the output gradient; of a convolution as by default.

**Each example is looked at alone.** All of these are conditions on the example's own number of frames, which is the
number of frames whose output gradient is not zero (and, of a linear or LoRA layer, whose input): from `least_frames`
on, a function of the layer's shape, the gradient is materialised. The padded length would not do. The norm of a
materialised gradient has no rounding bound to be added, while that of kept tensors is rounded up by one, of up to 1 %
of the square in Gram form. One long example would change the padded length of its micro-batch, hence the form of all
others' norms, and with it their clip factors, all in one direction: more than any slack in the sensitivity covers.
Frames are counted on every device. On a GPU that waits for the device, but only at a layer whose padded length would be
enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dpkernels.nn.batch.batch_axis import has_values
from dpkernels.ops.costs import costs_on

MATERIALISED_BYTES = 4
"""Of an entry of a materialised gradient: float32."""

MEMORY_SHARE = 1.0
"""By how much the records may take more memory than those of book-keeping, by default."""


class LayerSizes(NamedTuple):
    """What the choice knows of a record: the sizes of its layer, none of them the batch's.

    Attributes:
        outputs, inputs: p and d of a linear layer, or one with LoRA.
        entries: of one example's gradients.
        frame_bytes: what the record holds of one frame of one example.
        gradient_bytes: the output gradient's part of them.
        rank: LoRA's r, or 0.
        window_bytes: of a convolution's unfolded windows for one position of its output; 0 for other layers.
    """

    outputs: int
    inputs: int
    entries: int
    frame_bytes: int
    gradient_bytes: int
    rank: int = 0
    window_bytes: int = 0


@dataclass(frozen=True)
class Choice:
    """The rule of one run.

    Attributes:
        mixed: whether only memory decides, for every layer.
        by_time: whether the cost model (`dpkernels.ops.costs`) decides for linear and LoRA layers. They are kept on a
            device type that has no costs, and without this (unless `mixed`).
        memory_share: with `by_time`, how much more than its output gradient a layer's materialised gradient may take.
            What is held until the norms are known is then at most 1 + memory_share times what book-keeping holds, as
            long as no two layers have one output gradient, and where all examples of a micro-batch go the same way (a
            `SplitRecord` copies the kept examples' part of an input that several layers read).
        target: the device type whose costs count, for estimates; None: that of the tensors.
    """

    mixed: bool = False
    by_time: bool = False
    memory_share: float = MEMORY_SHARE
    target: str | None = None

    def least_frames(self, layer: LayerSizes, device_type: str = "cpu") -> int | None:
        """The number of own frames from which on an example's gradient is materialised; None: it never is."""
        if not (self.mixed or self.by_time or layer.window_bytes):
            return None
        made = MATERIALISED_BYTES * layer.entries
        if not made:
            return None
        half = _frames(2 * made, layer.frame_bytes)
        if self.mixed:
            return half
        if layer.window_bytes:
            return min(half, _frames(made, layer.window_bytes))
        costs = costs_on(self.target or device_type) if self.by_time else None
        faster = None if costs is None else costs.crossing(layer.outputs, layer.inputs, layer.rank)
        if faster is None:
            return None
        return max(faster, _frames(made, (1 + self.memory_share) * layer.gradient_bytes))


def _frames(needed: float, of_a_frame: float) -> int:
    """The least number of frames of which it is at most the bytes, and at least one."""
    return max(1, -int(-needed // of_a_frame))


class Chosen(NamedTuple):
    """What was chosen for one use of a layer in a micro-batch. The numbers of examples are NOT PRIVATE.

    Attributes:
        layer: its name.
        least: see `Choice.least_frames`.
        frames: frames of the micro-batch, padding included.
        examples: examples in the micro-batch.
        materialised: those whose gradients were materialised.
    """

    layer: str
    least: int | None
    frames: int
    examples: int
    materialised: int


def decide(
    choice: Choice, layer: str, given: Sequence[tuple[LayerSizes, Tensor, Tensor | None]], unit: int = 1
) -> tuple[bool | Tensor, Chosen]:
    """Whether all examples' gradients are materialised or none, or else which ([B] bool); and the row of the table.

    Args:
        layer: its name.
        given: as from `Record.chosen_by`; an example must have enough frames in each entry.
        unit: so many consecutive examples are clipped together, and go the same way.
    """
    least = [choice.least_frames(sizes, g.device.type) for sizes, g, _ in given]
    known = [frames for frames in least if frames is not None]
    frames, examples = max([_frames_of(g) for _, g, _ in given]), given[0][1].shape[0]
    if len(known) < len(least):
        return False, Chosen(layer, None, frames, examples, 0)
    found: bool | Tensor = all(
        _frames_of(g) >= needed for (_, g, _), needed in zip(given, known, strict=True)
    )
    if found and all(has_values(g) for _, g, _ in given):
        enough = [reaching(g, needed, x) for (_, g, x), needed in zip(given, known, strict=True)]
        rows = torch.stack(enough).all(0) if len(enough) > 1 else enough[0]
        rows = rows.view(-1, unit).all(1).repeat_interleave(unit) if unit > 1 else rows
        found = bool(rows.all()) or (bool(rows.any()) and rows)
    count = int(found.sum()) if isinstance(found, Tensor) else examples * found
    return found, Chosen(layer, max(known), frames, examples, count)


def reaching(g: Tensor, least: int, x: Tensor | None = None) -> Tensor:
    """Which examples have at least `least` frames of their own: [B] bool.

    g: [B,*,p], output gradients of frames, in one or more dimensions. A frame counts if its norm is not 0 in g's dtype;
    a NaN is not 0.
    x: [B,*,d], inputs, whose frames must not be 0 either: a layer behind may give padding an output gradient.
    """
    both = (g,) if x is None else (g, x)
    # Mostly the first entries show it, a p-th of what there is to read; then only frames that begin with 0 are read.
    own = torch.stack([t[..., 0] != 0 for t in both]).all(0)
    enough = _count(own) >= least
    if not bool(enough.all()):
        doubtful = ~own & ~enough.view(-1, *[1] * (own.dim() - 1))
        rows = [torch.linalg.vector_norm(t[doubtful], dim=-1) != 0 for t in both]
        own[doubtful] = torch.stack(rows).all(0)
        enough = _count(own) >= least
    return enough


def _frames_of(g: Tensor) -> int:
    return math.prod(g.shape[1:-1])


def _count(frames: Tensor) -> Tensor:
    return frames.flatten(1).sum(1)


@dataclass(frozen=True)
class Choices:
    """What was chosen in one micro-batch, in the order of its backward; printed, a table. NOT PRIVATE."""

    rows: tuple[Chosen, ...]

    def __str__(self) -> str:
        cells = [("layer", "materialised from", "frames", "kept", "materialised")]
        for row in self.rows:
            least = "never" if row.least is None else f"{row.least:,} frames"
            kept = row.examples - row.materialised
            cells.append((row.layer, least, f"{row.frames:,}", f"{kept:,}", f"{row.materialised:,}"))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join([name.ljust(widths[0]), *map(str.rjust, numbers, widths[1:])])
            for name, *numbers in cells
        ]
        return "\n".join(["the last micro-batch's examples, layer by layer (NOT PRIVATE)", *lines])

    __repr__ = __str__
