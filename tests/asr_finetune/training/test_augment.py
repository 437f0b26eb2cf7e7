from __future__ import annotations

import copy
import os
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from asr_finetune.training.augment import SpecAugment

FRAMES, BINS = 60, 20


def features(frames: int = FRAMES, bins: int = BINS) -> Tensor:
    """No two values are equal, and none is the mean."""
    return torch.arange(frames * bins, dtype=torch.float32).view(frames, bins).square()


def masked(augment: SpecAugment, x: Tensor, **options: Any) -> Tensor:
    """Which values were replaced, [T, F]."""
    return augment(x, **options) != x


def draws(augment: SpecAugment, count: int = 100, **options: Any) -> list[Tensor]:
    x = features()
    return [masked(augment, x, **options) for _ in range(count)]


def widest(rows: Tensor) -> int:
    """The longest run of True."""
    longest = run = 0
    for value in rows.tolist():
        run = run + 1 if value else 0
        longest = max(longest, run)
    return longest


def test_masked_values_are_the_utterances_own_mean() -> None:
    x, augment = features(), SpecAugment()
    kept = x.clone()
    for _ in range(20):
        out = augment(x, 40)
        replaced = out != x
        assert torch.equal(out[replaced], x[:40].mean().expand(int(replaced.sum())))
    assert torch.equal(x, kept), "the input was changed"


@pytest.mark.parametrize("length", [1, 7, 40])
def test_nothing_behind_the_own_length_is_touched(length: int) -> None:
    seen = torch.stack(draws(SpecAugment(time_share=1.0), length=length)).any(dim=0)
    assert not seen[length:].any()
    assert seen[:length].all(), "some frame is never masked"


def test_time_masks_are_measured_by_the_own_length() -> None:
    """Padding may not widen them: 10 % of 20 frames are 2, whatever follows."""
    augment = SpecAugment(frequency_masks=0, time_masks=1, time_share=0.1)
    rows = [mask.all(dim=1) for mask in draws(augment, length=20)]
    assert {int(row.sum()) for row in rows} == {0, 1, 2}


@pytest.mark.parametrize(("share", "most"), [(0.1, 6), (0.5, 30), (1.0, 60)])
def test_time_widths(share: float, most: int) -> None:
    augment = SpecAugment(frequency_masks=0, time_masks=1, time_share=share)
    rows = [mask.all(dim=1) for mask in draws(augment, 400)]
    widths = [int(row.sum()) for row in rows]
    assert all(widest(row) == width for row, width in zip(rows, widths, strict=True)), "not one span"
    assert 0 <= min(widths) <= max(widths) <= most
    # Uniform from 0 to most: the mean of 400 draws lies within 5 standard errors of most / 2.
    assert sum(widths) / 400 == pytest.approx(most / 2, abs=5 * most / 12**0.5 / 20)


def test_frequency_widths_and_the_whole_time() -> None:
    augment = SpecAugment(frequency_masks=1, time_masks=0, frequency_share=0.3)
    for mask in draws(augment):
        columns = mask.any(dim=0)
        assert torch.equal(columns, mask.all(dim=0)), "a band does not cover the whole time"
        assert int(columns.sum()) == widest(columns) <= 6


@pytest.mark.parametrize("masks", [1, 2, 4])
def test_number_of_masks(masks: int) -> None:
    augment = SpecAugment(frequency_masks=masks, time_masks=0, frequency_share=0.05)
    counts = [int(mask.any(dim=0).sum()) for mask in draws(augment, 200)]
    assert max(counts) == masks  # each is one bin wide at most


def test_a_stacked_row_masks_the_same_bins_of_each_frame() -> None:
    augment = SpecAugment(time_masks=0, frequency_share=0.5)
    seen = 0
    for mask in draws(augment, stacked=2):
        first, second = mask.view(FRAMES, 2, BINS // 2).unbind(dim=1)
        assert torch.equal(first, second)
        seen += int(first.any())
    assert seen > 50


@pytest.mark.parametrize(
    "nothing",
    [
        {"frequency_share": 0.0, "time_share": 0.0},
        {"frequency_masks": 0, "time_masks": 0},
    ],
)
def test_no_share_or_no_masks_change_nothing(nothing: dict[str, Any]) -> None:
    assert not torch.stack(draws(SpecAugment(**nothing), 20)).any()


def test_no_frames_change_nothing() -> None:
    assert SpecAugment()(torch.zeros(0, BINS)).shape == (0, BINS)
    assert not masked(SpecAugment(), features(), length=0).any()


def test_utterances_draw_on_their_own() -> None:
    augment = SpecAugment()
    rows = [mask.flatten() for mask in draws(augment, 20)]
    assert len({tuple(row.tolist()) for row in rows}) > 15


def test_global_seeds_neither_steer_nor_are_moved_by_the_draws() -> None:
    state = torch.get_rng_state()
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(torch.stack(draws(SpecAugment(), 5)))
    assert not torch.equal(results[0], results[1])
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    draws(SpecAugment(), 1)
    assert torch.equal(torch.rand(1), expected)
    torch.set_rng_state(state)


@pytest.mark.parametrize("how", [lambda augment: pickle.loads(pickle.dumps(augment)), copy.deepcopy])
def test_a_pickled_copy_draws_anew(how: Any) -> None:
    augment = SpecAugment(time_share=0.5)
    draws(augment, 1)
    again = how(augment)
    assert again == augment
    assert not torch.equal(torch.stack(draws(augment, 5)), torch.stack(draws(again, 5)))


def test_a_forked_process_draws_anew() -> None:
    augment = SpecAugment(time_share=0.5)
    draws(augment, 1)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, pickle.dumps([augment._draw(2**31) for _ in range(4)]))
        os._exit(0)
    os.waitpid(child, 0)
    theirs = pickle.loads(os.read(reader, 4096))
    os.close(reader)
    os.close(writer)
    assert theirs != [augment._draw(2**31) for _ in range(4)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frequency_masks": -1}, "frequency_masks=-1"),
        ({"time_masks": -2}, "time_masks=-2"),
        ({"frequency_share": 1.5}, "frequency_share=1.5"),
        ({"time_share": -0.1}, "time_share=-0.1"),
    ],
)
def test_values_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpecAugment(**options)
