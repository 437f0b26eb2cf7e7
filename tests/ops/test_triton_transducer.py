"""The transducer's Triton kernels: what only they have. tests/ops/test_transducer.py runs on them too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dpkernels.backends.triton_ops import availability
from tests.ops.conftest import TRITON_DEVICE
from tests.ops.transducer import TDT, Batch, make

if availability.unavailable_reason(TRITON_DEVICE):
    pytest.skip(availability.unavailable_reason(TRITON_DEVICE), allow_module_level=True)
from dpkernels.backends import torch_ops, triton_ops
from dpkernels.backends.triton_ops import configs, launching, transducer

pytestmark = pytest.mark.usefixtures("triton_backend")
Results = dict[str, Tensor]


def tile(kernel: str, name: str, dtype: torch.dtype = torch.float32, aligned: bool = False) -> int:
    architecture = launching.architecture(torch.device(TRITON_DEVICE))
    return configs.config(kernel, dtype, architecture, aligned).tiles[name]


def results(batch: Batch, ops: Any = triton_ops, cells: bool = True) -> Results:
    """What one backend's ops return for a batch, by name; a generator of its own gives the losses' gradients."""
    scores, normalizers = ops.transducer_scores(*batch.joint, **batch.options, sigma=batch.sigma)
    lengths = batch.frame_lengths, batch.target_lengths
    losses, flows = ops.transducer_lattice(scores, *lengths, durations=batch.durations)
    grad_losses = torch.linspace(0.5, 1.5, len(losses))
    arguments = (*batch.joint, normalizers, flows, grad_losses)
    found = {"scores": scores, "normalizers": normalizers, "losses": losses, "flows": flows}
    found["encoder"], found["predictor"] = ops.transducer_gradients(*arguments, **batch.options)
    if cells:
        found["x"], found["g"] = ops.transducer_cells(*arguments, **batch.options)
    return found


def equal(given: Results, wanted: Results) -> None:
    for name, tensor in wanted.items():
        assert torch.equal(given[name], tensor), name


def close(given: Results, wanted: Results, tolerance: float) -> None:
    for name, tensor in wanted.items():
        finite = tensor[tensor.isfinite()]
        scale = max(1.0, finite.double().abs().max().item())
        torch.testing.assert_close(
            given[name],
            tensor,
            rtol=0.0,
            atol=tolerance * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )


# ---- tiles -----------------------------------------------------------------------------------------------------


@pytest.mark.thinned(8)
@pytest.mark.parametrize("cells", [(8, 8), (9, 7), (13, 5)], ids=["full", "one less", "one more"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str
)
def test_at_the_edges_of_tiles(cells: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    """As many cells, outputs and features as tiles have, one more and one less; durations stand in two tiles.

    In bfloat16 and float16 the torch composition rounds other values.
    """
    rows, outputs = (tile("joint_logit_gradients", name, dtype) for name in ("BM", "BN"))
    frames, width = cells
    more = frames * width - rows
    assert more in (0, 1, -1)
    batch = make(
        TDT,
        frames=(frames,),
        labels=(width - 1,),
        hidden=tile("joint_scores", "BK", dtype) + more,
        classes=outputs - 3 + more,
        blank=outputs - 4 + more,
        dtype=dtype,
    )
    batch.encoder.mul_(0.3)
    batch.weight.mul_(0.3)
    close(results(batch), results(batch, torch_ops), tolerance)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("durations", [TDT, ()], ids=["tdt", "rnnt"])
@pytest.mark.parametrize("more", [1, 0])
def test_diagonals_of_more_labels_than_a_tile(more: int, durations: tuple[int, ...]) -> None:
    block = tile("lattice_paths", "BLOCK")
    scores = -torch.rand(1, 2, block + more, 2 + len(durations))
    lengths = torch.tensor([2]), torch.tensor([block + more - 1])
    given, wanted = (
        ops.transducer_lattice(scores, *lengths, durations=durations) for ops in (triton_ops, torch_ops)
    )
    torch.testing.assert_close(given, wanted, rtol=1e-6, atol=1e-6)


def test_many_durations() -> None:
    """More than one column of a tensor core's tile."""
    batch = make(tuple(range(19)), frames=(7,), labels=(2,))
    close(results(batch), results(batch, torch_ops), 1e-5)


# ---- blocks of cells, scratch memory ---------------------------------------------------------------------------


def test_blocks_of_cells_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two utterances at a time, and eight frames at a time; the latter's blocks begin and end within tiles."""
    batch = make(TDT, frames=(12, 6, 0), labels=(5, 2, 1), activation="tanh")
    assert len(_blocks(batch)) == 1
    wanted = results(batch, cells=False)
    for block, count in ((2 * 12 * 6 * 16 * 4, 2), (1, 6)):
        monkeypatch.setattr(transducer, "BLOCK", block)
        assert len(_blocks(batch)) == count
        equal(results(batch, cells=False), wanted)


def _blocks(batch: Batch) -> list[Any]:
    """The blocks of a batch with at most 16 outputs, of float32."""
    utterances, frames, _ = batch.encoder.shape
    cells = max(1, transducer.BLOCK // (16 * 4))
    step = tile("joint_sums", "BT")
    return list(transducer._blocks(utterances, frames, batch.predictor.shape[1], cells, step))


@pytest.mark.parametrize("stale", [float("nan"), 1e30])
def test_what_scratch_memory_held_changes_no_bit(stale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make(TDT, frames=(9, 3), labels=(2, 4))
    wanted = results(batch, cells=False)

    def scratch(like: Tensor, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.full(shape, stale, dtype=dtype, device=like.device)

    monkeypatch.setattr(transducer, "scratch", scratch)
    equal(results(batch, cells=False), wanted)


def test_layouts_change_no_bit() -> None:
    """Transposed, and at addresses that are no multiple of 16 bytes."""
    batch = make(TDT, frames=(5, 7), labels=(3, 2))
    moved = {}
    for name in ("encoder", "predictor", "weight", "bias", "targets"):
        tensor = getattr(batch, name)
        wide = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
        moved[name] = wide[1:].view(tensor.mT.shape if tensor.dim() > 1 else tensor.shape)
        moved[name] = moved[name].mT if tensor.dim() > 1 else moved[name]
        moved[name].copy_(tensor)
    equal(results(replace(batch, **moved)), results(batch))


def test_float16_keeps_the_gradients_of_unlikely_classes() -> None:
    """All logits are equal, so that the gradients cancel: the label's and the blank's against 600 small ones."""
    batch = make(frames=(2,), labels=(1,), hidden=3, classes=600, bias=False, dtype=torch.float16)
    batch.weight.fill_(1.0)
    scores, normalizers = triton_ops.transducer_scores(*batch.joint, **batch.options)
    losses, flows = triton_ops.transducer_lattice(scores, batch.frame_lengths, batch.target_lengths)
    small = torch.full_like(losses, 1e-5)
    for gradient in triton_ops.transducer_gradients(*batch.joint, normalizers, flows, small, **batch.options):
        assert gradient.abs().max() < 2e-7


# ---- values that nobody checks on a GPU ------------------------------------------------------------------------


def test_lengths_out_of_range_are_clamped() -> None:
    batch = make(TDT, frames=(4, 6, 6), labels=(2, 3, 1))
    wrong = replace(
        batch,
        frame_lengths=torch.tensor([7, -2, 6]),
        target_lengths=torch.tensor([9, 3, -1]),
    )
    clamped = replace(batch, frame_lengths=torch.tensor([6, 0, 6]), target_lengths=torch.tensor([3, 3, 0]))
    equal(results(wrong), results(clamped))


def test_labels_out_of_range_are_clamped() -> None:
    batch = make(TDT, frames=(4, 6), labels=(2, 3))
    labels = torch.tensor([[-1, 9, 0], [11, 2**40, -(2**40)]])
    equal(results(replace(batch, targets=labels)), results(replace(batch, targets=labels.clamp(0, 8))))


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_an_utterance_with_a_nan_has_no_loss_and_no_gradient(activation: str) -> None:
    """As in the torch composition: the loss is infinite, and the gradient exactly 0, not NaN."""
    batch = make(TDT, frames=(4, 6), labels=(2, 3), activation=activation)
    wanted = results(batch.alone(1), cells=False)
    batch.encoder[0, 2, 1] = torch.nan
    given = results(batch, cells=False)
    assert given["losses"].isinf().tolist() == [True, False]
    assert not given["encoder"][0].any()
    assert not given["predictor"][0].any()
    assert torch.equal(given["losses"][1:], wanted["losses"])
