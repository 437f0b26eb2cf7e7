"""R processes take the step of one: same draws, same sums to the order of addition, same noise, one count."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from dpkernels.privacy.ranks import pieces
from tests.privacy.ranks import jobs
from tests.privacy.ranks.processes import Processes

LENGTHS = [1 + (7 * index) % 11 for index in range(60)]
SETTINGS: dict[str, dict[str, Any]] = {
    **{f"strategy={name}": {"strategy": name} for name in ("mixed", "two_pass", "per_layer")},
    "of lengths": {"lengths": LENGTHS, "max_padded_frames": 20},
    "truncated": {"max_batch_size": 13},
    "speakers": {"unit": "speaker", "speakers": [i // 4 for i in range(60)], "max_examples_per_speaker": 2},
    "mostly empty": {"batch_size": 1, "physical_batch_size": 1},
    "all examples": {"batch_size": 60},
    "one example a micro-batch": {"physical_batch_size": 1},
    "gradients kept": {"optimizer": "adamw", "keep": True},
    "pieces of 7 entries": {"piece": 7},
    "pieces of 7 entries, unfused": {"piece": 7, "optimizer": "unfused"},
    "bfloat16, rounded at random": {"dtype": torch.bfloat16, "stochastic_rounding": True, "piece": 50},
    "no noise": {"sigma": 0.0},
    "out of memory on rank 1": {"fails_on": 1},
    "rounds of 32 entries": {"staged": 768},
    "adaptive": {"clipping": "adaptive", "clip": 0.1},
    "adaptive by layers": {"clipping": "adaptive", "clip": 0.1, "strategy": "per_layer"},
}


@cache
def _results(processes: Processes, size: int, settings: str, optimizer: str) -> list[dict[str, Any]]:
    return processes.results(jobs.trained, size, **{"optimizer": optimizer, **SETTINGS.get(settings, {})})


def check_same(processes: Processes, size: int, settings: str, optimizer: str = "adamw") -> None:
    (alone,) = _results(processes, 1, settings, optimizer)
    ranks = _results(processes, size, settings, optimizer)
    for part in ranks:
        for name, value in part["parameters"].items():
            # bfloat16 parameters may round to a neighbour, which is 2^-8 of their size.
            allowed = 2**-6 if value.dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(value, alone["parameters"][name], rtol=allowed, atol=allowed)
            assert torch.equal(value, ranks[0]["parameters"][name])
        assert part["steps"] == alone["steps"]
    for step, examples in enumerate(alone["examples"]):
        dealt = [index for part in ranks for index in part["examples"][step]]
        assert sorted(dealt) == examples


@pytest.mark.thinned(5)
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("optimizer", jobs.OPTIMIZERS)
def test_processes_take_the_step_of_one(processes: Processes, size: int, optimizer: str) -> None:
    check_same(processes, size, "", optimizer)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("settings", SETTINGS)
def test_in_every_setting(processes: Processes, settings: str) -> None:
    check_same(processes, 3, settings)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("sizes", [(1, 3), (3, 1), (4, 2)])
@pytest.mark.parametrize("settings", ["", "pieces of 7 entries"])
def test_a_run_goes_on_with_another_number_of_processes(
    processes: Processes, sizes: tuple[int, int], settings: str, tmp_path: Path
) -> None:
    ends = []
    for before, after in ((1, 1), sizes):
        checkpoint = tmp_path / f"{before} to {after}"
        given = {"checkpoint": checkpoint, **SETTINGS.get(settings, {})}
        first = processes.results(jobs.trained, before, **given)
        second = processes.results(jobs.trained, after, **given)
        assert [part["steps"] for part in second] == [2 * first[0]["steps"]] * after
        ends.append(second[-1])
    torch.testing.assert_close(ends[0]["parameters"], ends[1]["parameters"], rtol=0, atol=1e-6)
    torch.testing.assert_close(ends[0]["state"], ends[1]["state"], rtol=0, atol=1e-6)


def test_each_rank_keeps_its_part_of_the_optimizers_state(processes: Processes) -> None:
    (whole,) = processes.results(jobs.values_kept, 1)
    parts = processes.results(jobs.values_kept, 3)
    assert sum(parts) == whole
    assert max(parts) < whole


def test_fresh_keys_one_draw_and_noise_of_their_own(processes: Processes) -> None:
    ranks = processes.results(jobs.trained, 3, key=None)
    assert len({tuple(part["keys"]) for part in ranks}) == 3
    for step in range(4):  # parts of one draw, in which no example is twice
        dealt = [index for part in ranks for index in part["examples"][step]]
        assert len(set(dealt)) == len(dealt)
    for part in ranks:
        torch.testing.assert_close(part["parameters"], ranks[0]["parameters"], rtol=0, atol=0)


def loads(share: list[list[int]], weights: list[int]) -> list[int]:
    return [sum(weights[item] for item in items) for items in share]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_a_batch_is_dealt_out_by_lengths(ranks: int) -> None:
    weights = [1 + (37 * i) % 101 for i in range(200)]
    dealt = pieces.share(weights, ranks)
    assert sorted(item for items in dealt for item in items) == list(range(200))
    assert max(loads(dealt, weights)) - min(loads(dealt, weights)) <= max(weights)
    counts = [len(items) for items in pieces.share([1.0] * 50, ranks)]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    ("total", "entries"), [(0, 2**16), (10**6, 2**16), (2**26, 2**17), (2**26 + 1, 2**18), (10**9, 2**20)]
)
def test_pieces_divide_evenly_and_are_few(total: int, entries: int) -> None:
    assert pieces.piece_entries(total) == entries


@pytest.mark.parametrize("ranks", [1, 2, 5, 64])
def test_every_piece_has_one_owner(ranks: int) -> None:
    shapes = [(1000, 3000), (5,), (), (0,), (2**20 + 1,), (17, 3)]
    cut = pieces.cut([torch.empty(shape, device="meta") for shape in shapes])
    owned = pieces.owners(cut, ranks)
    assert [piece for of_rank in owned for piece in of_rank] == cut
    assert [piece.index for piece in cut] == list(range(len(cut)))
    for place, shape in enumerate(shapes):
        mine = [piece for piece in cut if piece.place == place]
        assert mine[0].start == 0
        assert mine[-1].stop == torch.Size(shape).numel()
        assert all(a.stop == b.start for a, b in pairwise(mine))
