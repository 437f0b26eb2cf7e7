"""The native transducer kernels: threads, instruction sets and layouts, what is read and what is refused."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dpkernels import reference
from dpkernels.backends import native
from tests.ops.transducer import TDT, Batch, make

if native.unavailable_reason("cpu"):
    pytest.skip(native.unavailable_reason("cpu"), allow_module_level=True)
from dpkernels.backends import native_ops


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    try:
        native.set_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    native.set_isa("")


def large(durations: tuple[int, ...] = TDT) -> Batch:
    """Several slices of frames, units of cells and blocks of classes, worth several threads."""
    return make(durations, frames=(70, 9), labels=(9, 4), hidden=40, classes=300, blank=299)


def every_op(batch: Batch, module: Any = native_ops) -> list[Tensor]:
    """What the four ops return, each from the results of the ones before."""
    lengths = (batch.frame_lengths, batch.target_lengths)
    scores, normalizers = module.transducer_scores(*batch.joint, **batch.options, sigma=batch.sigma)
    losses, flows = module.transducer_lattice(scores, *lengths, durations=batch.durations)
    saved = (*batch.joint, normalizers, flows, torch.linspace(-1, 2, len(losses)).to(losses))
    states = module.transducer_gradients(*saved, **batch.options)
    return [scores, normalizers, losses, flows, *states, *module.transducer_cells(*saved, **batch.options)]


def same(given: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(given, wanted, strict=True))


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = large()
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(native, "threads", lambda n=threads: n)
        results.append(every_op(batch))
    assert all(same(other, results[0]) for other in results[1:])


def test_several_callers_at_once() -> None:
    batch = large()
    expected, given = every_op(batch), []
    callers = [threading.Thread(target=lambda: given.append(every_op(batch))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(given) == 4
    assert all(same(one, expected) for one in given)


def test_every_instruction_set_computes_the_same(instructions: str) -> None:
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-11)):
        batch = make(
            TDT, frames=(11, 5), labels=(5, 2), hidden=40, classes=300, activation="tanh", dtype=dtype
        )
        for given, wanted in zip(every_op(batch), every_op(batch, reference), strict=True):
            torch.testing.assert_close(given, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.thinned(12)
@pytest.mark.parametrize("seed", range(40))
def test_random_sizes(seed: int) -> None:
    """Sizes around those of vectors, panels, blocks and slices; lengths of 0; scales from tiny to large."""
    generator = torch.Generator().manual_seed(seed)

    def chosen(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=generator))]

    torch.manual_seed(seed)
    count = chosen(1, 2, 5)
    frames = tuple(chosen(0, 1, 2, 5, 33) for _ in range(count))
    labels = tuple(chosen(0, 1, 3, 6) for _ in range(count))
    batch = make(
        chosen((), (0, 1), (3, 1, 0, 7), (1,)),
        frames=frames,
        labels=labels,
        hidden=chosen(1, 5, 15, 16, 17, 33),
        classes=chosen(2, 13, 14, 15, 252, 253, 521),
        bias=chosen(True, False),
        blank=chosen(0, 1),
        activation=chosen("relu", "tanh"),
        dtype=chosen(torch.float32, torch.float64),
    )
    batch.encoder.mul_(chosen(1e-3, 1.0, 10.0))
    for given, wanted in zip(every_op(batch), every_op(batch, reference), strict=True):
        scale = max(1.0, float(wanted[wanted.isfinite()].abs().max())) if wanted.isfinite().any() else 1.0
        tolerance = 2e-5 if given.dtype == torch.float32 else 1e-11
        torch.testing.assert_close(given, wanted, rtol=0, atol=tolerance * scale)


def test_strides_change_no_bit() -> None:
    def other_layout(t: Tensor) -> Tensor:
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), 7, dtype=t.dtype)
        wide[..., 1::2] = t
        return wide[..., 1::2]

    batch = large()
    names = ("encoder", "predictor", "weight", "bias", "targets", "frame_lengths", "target_lengths")
    moved = replace(batch, **{name: other_layout(getattr(batch, name)) for name in names})
    assert not moved.targets.is_contiguous()
    assert same(every_op(moved), every_op(batch))
    transposed = replace(batch, weight=batch.weight.T.contiguous().T)
    assert same(every_op(transposed), every_op(batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_rounded_as_torch_rounds(dtype: torch.dtype) -> None:
    """From subnormal numbers to beyond the largest: the output layer's input is z in the tensors' own type."""
    batch = make(frames=(40,), labels=(3,), hidden=48)
    sizes = 2.0 ** torch.linspace(-28, 18, 40)[:, None]
    encoder, predictor = (batch.encoder * sizes).to(dtype), (batch.predictor * 1e-3).to(dtype)
    states = {"encoder": encoder, "predictor": predictor, "weight": batch.weight.to(dtype), "bias": None}
    batch = replace(batch, **states)
    zero, lengths = torch.zeros(1, 40, 4, 2), torch.zeros(1, 40, 4, 1)
    x, g = native_ops.transducer_cells(*batch.joint, lengths, zero, torch.ones(1), **batch.options)
    wanted = (encoder.float()[:, :, None] + predictor.float()[:, None]).relu().to(dtype)
    assert torch.equal(x.view(wanted.shape), wanted)
    assert wanted.isinf().any() == (dtype == torch.float16)
    assert not g.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cells_of_half_types_are_each_utterances_own(dtype: torch.dtype) -> None:
    """They are rounded utterance by utterance, so that only one at a time is in memory in float32."""
    batch = make(TDT, dtype=dtype)
    arguments = batch.backward_arguments()
    given = native_ops.transducer_cells(*arguments, **batch.options)
    wanted = reference.transducer_cells(*arguments, **batch.options)
    assert [t.dtype for t in given] == [dtype, dtype]
    torch.testing.assert_close(given, wanted, rtol=1e-2, atol=1e-3)


def test_any_flows_have_their_gradient() -> None:
    """Also flows that no lattice has: the kernel leaves out a cell only where all of its flows are exactly 0."""
    batch = make(TDT, frames=(9, 5), labels=(4, 2))
    *joint, normalizers, flows, grad_losses = batch.backward_arguments()
    flows = torch.randn(flows.shape)
    flows[0, :3] = 0.0
    flows[0, 2, 1, 4] = 0.5  # a duration only
    flows[1, 0, 0, :2] = torch.tensor([1.5, -1.5])
    flows[1, 1, 1] = 1e-42
    for name in ("transducer_gradients", "transducer_cells"):
        arguments = (*joint, normalizers, flows, grad_losses)
        given = getattr(native_ops, name)(*arguments, **batch.options)
        wanted = getattr(reference, name)(*arguments, **batch.options)
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)


def test_a_nan_is_never_lost() -> None:
    """In a state it makes its own utterance's loss infinite; in a flow its own gradient NaN; no other changes."""
    batch = make((), frames=(7, 6), labels=(3, 2))
    clean = every_op(batch)
    for name, place in (("encoder", (0, 3, 1)), ("predictor", (0, 2, 0))):
        tensor = getattr(batch, name).clone()
        tensor[place] = math.nan
        scores, _, losses, flows, of_encoder, *_ = every_op(replace(batch, **{name: tensor}))
        assert scores[0].isnan().any()
        assert losses[0] == math.inf
        assert not flows[0].any()
        assert not of_encoder[0].any()
        assert torch.equal(losses[1], clean[2][1])
        assert torch.equal(of_encoder[1], clean[4][1])
    *joint, normalizers, flows, grad_losses = batch.backward_arguments()
    flows[0, 2, 1, 0] = math.nan
    of_encoder, of_predictor = native_ops.transducer_gradients(
        *joint, normalizers, flows, grad_losses, **batch.options
    )
    assert of_encoder[0, 2].isnan().all()
    assert of_predictor[0, 1].isnan().all()
    assert of_encoder[1].isfinite().all()


def test_a_class_may_be_impossible() -> None:
    """A bias of −∞ gives a class no probability, and changes no other."""
    batch = make((), classes=30, blank=0)
    batch.bias[7] = -math.inf  # type: ignore[index]
    batch = replace(batch, targets=torch.where(batch.targets == 7, 8, batch.targets))
    for given, wanted in zip(every_op(batch), every_op(batch, reference), strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("frame_lengths", 8, r"frame_lengths\[0\] is 8; it must be in 0..7"),
        ("frame_lengths", -1, r"frame_lengths\[0\] is -1"),
        ("target_lengths", 4, r"target_lengths\[0\] is 4; it must be in 0..3"),
        ("targets", 9, r"targets\[0\] holds 9; labels are in 0..8 and not the blank, 0"),
        ("targets", -1, r"targets\[0\] holds -1"),
        ("targets", 0, r"targets\[0\] holds 0"),
        ("blank", 9, r"blank is 9; there are 9 token classes"),
    ],
)
def test_the_library_itself_refuses_what_it_could_not_read(name: str, value: int, message: str) -> None:
    batch = make(TDT)
    wrong = value if name == "blank" else torch.full_like(getattr(batch, name), value)
    wrong_batch = replace(batch, **{name: wrong})
    with pytest.raises(ValueError, match=message):
        native_ops.transducer_scores(*wrong_batch.joint, **wrong_batch.options)
    if name not in ("targets", "blank"):
        scores = torch.zeros(6, 7, 4, 7)
        lengths = (wrong_batch.frame_lengths, wrong_batch.target_lengths)
        with pytest.raises(ValueError, match=message):
            native_ops.transducer_lattice(scores, *lengths, durations=TDT)
    with pytest.raises(ValueError, match=message):
        native_ops.transducer_gradients(
            *wrong_batch.joint, *batch.backward_arguments()[7:], **wrong_batch.options
        )


def test_cells_without_a_flow_are_not_computed() -> None:
    """Where a path is certain, nearly all cells have none: their products would be multiplied by 0."""
    batch = make((), frames=(40,), labels=(3,))
    normalizers, flows = torch.full((1, 40, 4, 1), math.nan), torch.zeros(1, 40, 4, 2)
    x, g = native_ops.transducer_cells(*batch.joint, normalizers, flows, torch.ones(1), **batch.options)
    assert x.any()
    assert not g.any()
