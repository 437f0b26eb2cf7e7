"""The transducer ops: launches of the joint network's kernels and of the lattice's.

The logits of all cells never exist. `transducer_scores` computes them once, tile by tile. `transducer_gradients`
computes them again, and writes their gradients in the inputs' dtype for a block of cells at a time, BLOCK bytes. Beside
the logits of a tile there are no registers for its H = 640 features, and strips of 128 of these would have to compute
all logits five times. With the gradients in memory, forward and backward together are three products of 2·H·(V+D)
operations a cell, which is the least.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpkernels.backends.triton_ops.lattice_kernels import lattice_flows, lattice_paths
from dpkernels.backends.triton_ops.launching import (
    aligned,
    dense,
    float64_by_torch,
    launch,
    scratch,
    tile_of,
    tiles,
    upcast,
)
from dpkernels.backends.triton_ops.transducer_kernels import (
    joint_logit_gradients,
    joint_scores,
    joint_state_gradients,
    joint_states,
    joint_sums,
)

BLOCK = 1 << 28
"""Bytes of gradients of logits that are in memory at a time: 16,352 cells of 8,198 classes in 16 bits."""

_ROW = 16
"""Entries of which a row of scratch memory is a multiple, so that rows are read 16 bytes at a time."""


class _Joint(NamedTuple):
    """The joint network's tensors as its kernels take them, all contiguous."""

    encoder: Tensor
    predictor: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    frame_lengths: Tensor
    target_lengths: Tensor

    @property
    def lengths(self) -> tuple[Tensor, Tensor]:
        return self.frame_lengths, self.target_lengths

    @property
    def cells(self) -> tuple[int, int, int]:
        """(B, T, U+1)."""
        batch, frames, _ = self.encoder.shape
        return batch, frames, self.predictor.shape[1]

    @property
    def aligned(self) -> bool:
        """Whether rows of the states and of the weight are read 16 bytes at a time."""
        return self.encoder.shape[2] % _ROW == 0

    def constants(self, durations: Sequence[int], activation: str) -> dict[str, Any]:
        outputs, hidden = self.weight.shape
        count = len(durations)
        return {
            "HIDDEN": hidden,
            "CLASSES": outputs - count,
            "COUNT": count,
            "TANH": activation == "tanh",
            "UPCAST": upcast(self.encoder),
        }


def _joint(*tensors: Tensor | None) -> _Joint:
    return _Joint(*(dense(tensor) for tensor in tensors))  # type: ignore[arg-type]


def _arcs(durations: Sequence[int]) -> dict[str, Any]:
    """The lattice kernels' arcs; in an RNN-T the blank moves one frame ahead, and a label none."""
    ahead = tuple(d for duration in durations for d in (duration, duration)) if durations else (1, 0)
    return {"AHEAD": ahead, "COUNT": len(durations), "ARCS": _power_of_2(len(ahead))}


def _power_of_2(least: int) -> int:
    return 1 << (least - 1).bit_length()


@float64_by_torch
def transducer_scores(
    encoder: Tensor,
    predictor: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    frame_lengths: Tensor,
    target_lengths: Tensor,
    *,
    blank: int,
    durations: Sequence[int] = (),
    activation: str = "relu",
    sigma: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """See `dpkernels.ops.transducer_scores`."""
    joint = _joint(encoder, predictor, weight, bias, targets, frame_lengths, target_lengths)
    batch, frames, width = joint.cells
    count = len(durations)
    scores = encoder.new_full((batch, frames, width, 2 + count), -torch.inf, dtype=torch.float32)
    normalizers = encoder.new_zeros((batch, frames, width, 2 if count else 1), dtype=torch.float32)
    each = tiles(frames * width, tile_of(joint_scores, encoder, "BM", joint.aligned))
    launch(
        joint_scores,
        batch * each,
        encoder,
        *joint,
        scores,
        normalizers,
        frames,
        width,
        each,
        blank,
        sigma,
        1.0,
        aligned=joint.aligned,
        BD=max(16, _power_of_2(count)) if count else 0,
        **joint.constants(durations, activation),
    )
    return scores, normalizers


@float64_by_torch
def transducer_lattice(
    scores: Tensor, frame_lengths: Tensor, target_lengths: Tensor, *, durations: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """See `dpkernels.ops.transducer_lattice`."""
    batch, frames, width, _ = scores.shape
    scores, lengths = aligned(scores.contiguous()), (dense(frame_lengths), dense(target_lengths))
    losses, flows = scores.new_empty(batch), torch.zeros_like(scores)
    alpha, beta = (scratch(scores, batch, frames + width - 1, width) for _ in range(2))
    sizes, arcs = (frames, width), _arcs(durations)
    launch(lattice_paths, 2 * batch, scores, scores, *lengths, alpha, beta, losses, *sizes, **arcs)
    blocks = tiles(frames * width, tile_of(lattice_flows, scores, "BLOCK"))
    launch(
        lattice_flows, batch * blocks, scores, scores, *lengths, alpha, beta, flows, *sizes, blocks, **arcs
    )
    return losses, flows


class _Block(NamedTuple):
    """Utterances, and frames of each, whose cells are computed at once: the first of them and how many."""

    utterance: int
    utterances: int
    frame: int
    frames: int


def _blocks(batch: int, frames: int, width: int, cells: int, step: int) -> Iterator[_Block]:
    """Blocks of `cells` cells, or of `step` frames where these have more; they begin at multiples of `step` frames."""
    together = max(1, cells // max(1, frames * width))
    most = frames if frames * width <= cells else max(1, cells // width // step) * step
    for first in range(0, batch, together):
        for frame in range(0, frames, most):
            yield _Block(first, min(together, batch - first), frame, min(most, frames - frame))


def _logit_gradients(
    joint: _Joint,
    rest: tuple[Tensor, ...],
    out: Tensor,
    block: _Block,
    blank: int,
    normalised: bool,
    constants: dict[str, Any],
) -> None:
    """`joint_logit_gradients` of a block into out [utterances, frames·(U+1), outputs]."""
    _, frames, width = joint.cells
    fits = joint.aligned and out.shape[-1] % _ROW == 0
    rows, columns = (tile_of(joint_logit_gradients, joint.encoder, name, fits) for name in ("BM", "BN"))
    each, across = _tiles_of(block, width, rows), tiles(len(joint.weight), columns)
    launch(
        joint_logit_gradients,
        block.utterances * each * across,
        joint.encoder,
        *joint,
        *rest,
        out,
        frames,
        width,
        block.utterance,
        block.frame,
        block.frames,
        each,
        across,
        blank,
        1.0,
        aligned=fits,
        PITCH=out.shape[-1],
        NORMALISED=normalised,
        **constants,
    )


def _tiles_of(block: _Block, width: int, rows: int) -> int:
    """Tiles of a block's cells: one more where its first cell may be inside of a tile."""
    return tiles(block.frames * width, rows) + (block.frame > 0)


@float64_by_torch
def transducer_gradients(
    encoder: Tensor,
    predictor: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    frame_lengths: Tensor,
    target_lengths: Tensor,
    normalizers: Tensor,
    flows: Tensor,
    grad_losses: Tensor,
    *,
    blank: int,
    durations: Sequence[int] = (),
    activation: str = "relu",
) -> tuple[Tensor, Tensor]:
    """See `dpkernels.ops.transducer_gradients`."""
    joint = _joint(encoder, predictor, weight, bias, targets, frame_lengths, target_lengths)
    rest = tuple(aligned(tensor.contiguous()) for tensor in (normalizers, flows, grad_losses))
    (batch, frames, width), (outputs, hidden) = joint.cells, weight.shape
    constants = joint.constants(durations, activation)
    pitch = tiles(outputs, _ROW) * _ROW
    like = joint.encoder
    of_encoder = torch.zeros_like(like)
    of_predictor = torch.zeros_like(joint.predictor, dtype=torch.float64)
    cells = max(1, BLOCK // (pitch * like.element_size()))
    rows, across = (tile_of(joint_state_gradients, like, name, joint.aligned) for name in ("BM", "BN"))
    strips = tiles(hidden, tile_of(joint_sums, like, "BN"))
    for block in _blocks(batch, frames, width, cells, tile_of(joint_sums, like, "BT")):
        shape = (block.utterances, block.frames * width)
        g = scratch(like, *shape, pitch, dtype=like.dtype)
        of_cells = scratch(like, *shape, hidden, dtype=torch.float32)
        _logit_gradients(joint, rest, g, block, blank, True, constants)
        each, place = (
            _tiles_of(block, width, rows),
            (frames, width, block.utterance, block.frame, block.frames),
        )
        launch(
            joint_state_gradients,
            block.utterances * each * tiles(hidden, across),
            like,
            g,
            joint.weight,
            joint.encoder,
            joint.predictor,
            *joint.lengths,
            *rest[1:],
            of_cells,
            *place,
            each,
            tiles(hidden, across),
            1.0,
            aligned=joint.aligned,
            HIDDEN=hidden,
            OUTPUTS=outputs,
            PITCH=pitch,
            **{name: constants[name] for name in ("COUNT", "TANH", "UPCAST")},
        )
        for lines, out in ((block.frames, of_encoder), (width, of_predictor)):
            launch(
                joint_sums,
                block.utterances * lines * strips,
                like,
                of_cells,
                *joint.lengths,
                out,
                *place,
                lines,
                strips,
                HIDDEN=hidden,
                OVER_FRAMES=out is of_predictor,
            )
    return of_encoder, of_predictor.to(predictor.dtype)


@float64_by_torch
def transducer_cells(
    encoder: Tensor,
    predictor: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    frame_lengths: Tensor,
    target_lengths: Tensor,
    normalizers: Tensor,
    flows: Tensor,
    grad_losses: Tensor,
    *,
    blank: int,
    durations: Sequence[int] = (),
    activation: str = "relu",
) -> tuple[Tensor, Tensor]:
    """See `dpkernels.ops.transducer_cells`."""
    joint = _joint(encoder, predictor, weight, bias, targets, frame_lengths, target_lengths)
    rest = tuple(aligned(tensor.contiguous()) for tensor in (normalizers, flows, grad_losses))
    (batch, frames, width), (outputs, hidden) = joint.cells, weight.shape
    x = encoder.new_zeros((batch, frames * width, hidden))
    g = encoder.new_zeros((batch, frames * width, outputs))
    rows, across = (tile_of(joint_states, encoder, name) for name in ("BM", "BN"))
    each, strips = tiles(frames * width, rows), tiles(hidden, across)
    launch(
        joint_states,
        batch * each * strips,
        encoder,
        joint.encoder,
        joint.predictor,
        *joint.lengths,
        x,
        frames,
        width,
        each,
        strips,
        HIDDEN=hidden,
        TANH=activation == "tanh",
    )
    constants = joint.constants(durations, activation)
    _logit_gradients(joint, rest, g, _Block(0, batch, 0, frames), blank, False, constants)
    return x, g
