"""Which examples' gradients are materialised: by the layer's shape and an example's own frames, and by nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpkernels.nn import (
    Choice,
    Choices,
    Chosen,
    ExpandedRecord,
    GhostLoRALinear,
    LayerSizes,
    LinearRecord,
    Record,
    SplitRecord,
    attach,
    detach,
    swap,
)
from dpkernels.nn.recording import choice as choice_module
from dpkernels.nn.recording.choice import decide, reaching
from tests.nn.per_sample import check_private
from tests.ops.test_costs import SIMPLE

WIDTH, FRAMES = 6, 9
LENGTHS = (9, 3, 5, 4, 1)


@pytest.fixture
def from_four_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Choice, "least_frames", lambda *_: 4)


class OwnFrames(nn.Module):
    """A layer over padded sequences [B,T,d]; the loss reads each example's own frames [B,T] only."""

    def __init__(self, layer: nn.Module, channels_first: bool = False) -> None:
        super().__init__()
        self.layer, self.channels_first = layer, channels_first

    def forward(self, x: Tensor, own: Tensor) -> Tensor:
        x = torch.tanh(x)
        y = self.layer(x.transpose(1, 2)).transpose(1, 2) if self.channels_first else self.layer(x)
        return y * own[:, : y.shape[1], None]


class Attending(nn.Module):
    """Cross-attention: the packed weight's blocks read inputs of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x[:, 1:], x[:, 1:], need_weights=False)[0]


def squares(model: nn.Module, x: Tensor, own: Tensor) -> Tensor:
    return model(x, own).double().square().flatten(1).sum(1)


def padded(lengths: tuple[int, ...] = LENGTHS, frames: int = FRAMES) -> tuple[Tensor, Tensor]:
    """(x, own frames) in which an example has the same values whatever the others and the padding are."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(max(LENGTHS) + 1, FRAMES + 50, WIDTH, generator=generator)
    own = torch.stack([(torch.arange(frames) < length).float() for length in lengths])
    return torch.stack([values[length] for length in lengths])[:, :frames] * own[..., None], own


CHOICES = {"bookkeeping": Choice(), "mixed": Choice(mixed=True), "auto": Choice(by_time=True)}
LAYERS: dict[str, Callable[[], OwnFrames]] = {
    "linear": lambda: OwnFrames(nn.Linear(WIDTH, 5)),
    "lora": lambda: OwnFrames(GhostLoRALinear(WIDTH, 5, r=2, alpha=3)),
    "conv1d": lambda: OwnFrames(nn.Conv1d(WIDTH, 4, 3, padding=1, groups=2), channels_first=True),
    "transposed": lambda: OwnFrames(nn.ConvTranspose1d(WIDTH, 4, 1, groups=2), channels_first=True),
    "attention": lambda: OwnFrames(Attending()),
}


def model_of(kind: str) -> OwnFrames:
    torch.manual_seed(5)
    model = LAYERS[kind]()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def records_of(model: nn.Module, batch: tuple[Tensor, Tensor], choice: Choice, unit: int = 1) -> list[Record]:
    tape = attach(model, choice=choice)
    try:
        losses = squares(model, *batch)
        tape.open(len(losses), unit=unit)
        losses.sum().backward()
        records = tape.close()
        assert Choices(tuple(tape.chosen)).rows
        return records
    finally:
        tape.discard()
        detach(model)


@pytest.mark.usefixtures("from_four_frames")
@pytest.mark.parametrize("kind", LAYERS)
def test_split_records_have_right_norms_and_sums(kind: str) -> None:
    x, own = padded()
    private = check_private(model_of(kind).double(), squares, (x.double(), own.double()))
    split = [record for record in private.records if isinstance(record, SplitRecord)]
    assert split
    if kind in ("linear", "lora", "conv1d"):
        assert split[0].made_rows.tolist() == [0, 2, 3]
        assert split[0].held_bytes() == split[0].kept.held_bytes() + sum(
            p.held_bytes() for p in split[0].made
        )


@pytest.mark.usefixtures("from_four_frames")
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("kind", ["linear", "lora", "conv1d"])
def test_the_form_of_an_examples_norm_does_not_depend_on_the_batchs_padded_length(
    kind: str, choice: Choice
) -> None:
    """Examples of 3 frames are kept, alone, padded and beside a longer one: only that is materialised."""
    model = swap(model_of(kind))
    alone, padded_more = (records_of(model, padded((3, 3), frames), choice) for frames in (3, 8))
    assert [type(record) for record in alone] == [type(record) for record in padded_more]
    joined = records_of(model, padded((3, 9, 3)), choice)
    (split,) = (record for record in joined if isinstance(record, SplitRecord))
    assert split.made_rows.tolist() == [1]
    assert type(split.kept) in {type(record) for record in alone}
    norms = [sum(record.norm_sq().double() for record in records) for records in (alone, padded_more, joined)]
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(norms[2][[0, 2]], norms[0], rtol=1e-5, atol=0)


def test_the_frames_that_count_are_an_examples_own() -> None:
    _, own = padded()
    g = torch.randn(len(LENGTHS), FRAMES, WIDTH) * own[..., None]
    for least in range(1, FRAMES + 2):
        assert reaching(g, least).tolist() == [length >= least for length in LENGTHS]
    g[..., 0] = 0  # the first entry alone does not decide
    assert reaching(g, 4).tolist() == [length >= 4 for length in LENGTHS]
    g[4, 1:4, 2] = torch.nan
    assert reaching(g, 4).tolist() == [True, False, True, True, True]
    image = torch.zeros(2, 3, 4, 5)
    image[0, :, :2, 1] = 1.0
    image[1, :2, :2, 1] = 1.0
    assert reaching(image, 6).tolist() == [True, False]


def test_frames_whose_input_is_padding_do_not_count() -> None:
    """A layer behind, a convolution over frames for example, gives padding an output gradient."""
    x, g = torch.randn(2, 20, 4), torch.randn(2, 20, 4)
    x[0, 9:] = 0
    assert reaching(g, 10, x).tolist() == [False, True]
    g[:, :, 0] = 0
    assert reaching(g, 10, x).tolist() == [False, True]
    weight = nn.Parameter(torch.zeros(4, 4))
    for record in (LinearRecord("layer", weight, x, g), LinearRecord("layer", weight, g, x)):
        ((_, *factors),) = record.chosen_by()
        assert {id(factor) for factor in factors} == {id(x), id(g)}


def test_examples_that_are_clipped_together_go_the_same_way() -> None:
    _, own = padded((9, 5, 3, 9))
    given = [(LayerSizes(5, 6, 30, 44, 20), torch.randn(4, FRAMES, 5) * own[..., None], None)]

    def rows(unit: int, monkeypatched: int = 4) -> Any:
        class Fixed(Choice):
            def least_frames(self, layer: LayerSizes, device_type: str = "cpu") -> int | None:
                return monkeypatched

        found, row = decide(Fixed(), "layer", given, unit)
        return found.tolist() if isinstance(found, Tensor) else found, row

    assert rows(1)[0] == [True, True, False, True]
    assert rows(2) == ([True, True, False, False], Chosen("layer", 4, FRAMES, 4, 2))
    assert rows(4) == (False, Chosen("layer", 4, FRAMES, 4, 0))
    assert rows(4, 3) == (True, Chosen("layer", 3, FRAMES, 4, 4))


@pytest.mark.usefixtures("from_four_frames")
@pytest.mark.parametrize("kind", ["linear", "lora", "conv1d"])
def test_a_split_record_has_a_form_for_speakers(kind: str) -> None:
    lengths = (9, 5, 3, 1, 4, 9)
    model = swap(model_of(kind))
    kept = records_of(model, padded(lengths), Choice())
    by_unit = records_of(model, padded(lengths), Choice(mixed=True), unit=2)
    assert any(isinstance(record, SplitRecord) for record in by_unit)
    whole = Choice(mixed=True)
    norms = [sum(record.of_units(2).norm_sq().double() for record in records) for records in (by_unit, kept)]
    factors = torch.rand(3)
    sums = [{p: torch.zeros(p.shape, dtype=torch.float64) for p in model.parameters()} for _ in range(2)]
    for records, total in zip((by_unit, kept), sums, strict=True):
        for record in records:
            record.of_units(2).add_weighted_sum(factors, total)
    expected = {p: torch.zeros_like(total) for p, total in sums[0].items()}
    for record in records_of(model, padded(lengths), whole):
        record.add_weighted_sum(factors.repeat_interleave(2), expected)
    for p, total in expected.items():
        for given in sums:
            torch.testing.assert_close(given[p], total, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-2, atol=1e-6)


def test_the_choice_at_both_sides_of_time_and_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        choice_module, "costs_on", lambda device_type: SIMPLE if device_type == "cpu" else None
    )
    wide = LayerSizes(
        256, 256, 256**2, 4 * 512, 4 * 256
    )  # faster from 114 frames on, smaller than g from 256 on
    assert Choice(by_time=True, memory_share=0.0).least_frames(wide) == 256
    assert Choice(by_time=True, memory_share=0.25).least_frames(wide) == 205
    assert Choice(by_time=True).least_frames(wide) == 128
    assert Choice(by_time=True, memory_share=9.0).least_frames(wide) == 114
    assert Choice(by_time=True).least_frames(wide, "cuda") is None  # was not measured: as book-keeping
    assert Choice(by_time=True, target="cuda").least_frames(wide) is None
    adapter = LayerSizes(1024, 1024, 8 * 2048, 4 * 2064, 4 * 1024, rank=8)
    assert Choice(by_time=True).least_frames(adapter) == 67
    convolution = LayerSizes(8, 24, 192, 4 * 16, 4 * 8, window_bytes=4 * 24)
    assert {Choice(by_time=by_time).least_frames(convolution) for by_time in (False, True)} == {8}
    assert Choice().least_frames(wide) is None
    assert Choice(mixed=True).least_frames(wide) == 256
    empty = LayerSizes(0, 4, 0, 16, 0)
    assert Choice(mixed=True).least_frames(empty) is None


CHEAP = replace(SIMPLE, product=0.0, entry=0.0)  # materialising is always faster


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize(("outputs", "inputs"), [(5, 8), (8, 5), (3, 24), (24, 3)])
def test_records_take_no_more_memory_than_stated(
    outputs: int, inputs: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where layers read one tensor, of which book-keeping holds one for all of them."""
    monkeypatch.setattr(choice_module, "costs_on", lambda _: CHEAP)
    model = swap(nn.ModuleList([nn.Linear(inputs, outputs, bias=False) for _ in range(3)]))
    materialised = set()
    for frames in range(1, 40, 3):
        held = {}
        for by_time in (False, True):
            tape = attach(model, choice=Choice(by_time=by_time, memory_share=share))
            x = torch.randn(2, frames, inputs)
            losses = torch.stack([layer(x).square().sum((1, 2)) for layer in model]).sum(0)
            tape.open(2)
            losses.sum().backward()
            records = tape.close()
            detach(model)
            tensors = [t for r in records for t in vars(r).values() if isinstance(t, Tensor)]
            distinct = {t.data_ptr(): t.numel() * 4 for t in tensors if not isinstance(t, nn.Parameter)}
            held[by_time] = sum(distinct.values())
            materialised |= {type(record) for record in records}
        assert held[True] <= (1 + share) * held[False]
    assert materialised == {LinearRecord, ExpandedRecord}


def test_a_table_says_what_was_chosen() -> None:
    rows = (Chosen("encoder.up", 145, 150, 8, 3), Chosen("encoder.down", None, 1_500, 8, 0))
    shown = str(Choices(rows)).splitlines()
    assert "NOT PRIVATE" in shown[0]
    assert shown[1].split() == ["layer", "materialised", "from", "frames", "kept", "materialised"]
    assert shown[2].split() == ["encoder.up", "145", "frames", "150", "5", "3"]
    assert shown[3].split() == ["encoder.down", "never", "1,500", "8", "0"]
    assert len({len(line) for line in shown[1:]}) == 1
