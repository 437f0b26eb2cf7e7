"""R processes take the step of one: same draws, same sums to the order of addition, same noise, one count."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from dpkernels.privacy import back_propagate
from dpkernels.privacy.ranks import pieces
from tests.privacy.private_run import KEY, Run, Unfused, private_run
from tests.privacy.ranks.processes import Processes

OPTIMIZERS: dict[str, Any] = {
    "sgd": torch.optim.SGD,
    "momentum": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9, nesterov=True),
    "adamw": torch.optim.AdamW,
    "unfused": Unfused,
}
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
}


def trained(rank: int, group: Any, **settings: Any) -> dict[str, Any]:
    """A run of a few steps under a fixed key: what it made."""
    with pytest.MonkeyPatch.context() as patch:
        return _trained(rank, group, patch, **settings)


def _trained(
    rank: int,
    group: Any,
    patch: pytest.MonkeyPatch,
    *,
    steps: int = 5,
    optimizer: str = "adamw",
    piece: int = pieces.PIECE_ENTRIES,
    staged: int | None = None,
    keep: bool = False,
    stochastic_rounding: bool = False,
    fails_on: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    patch.setattr(pieces, "PIECE_ENTRIES", piece)
    if staged is not None:
        patch.setattr("dpkernels.privacy.ranks.exchange.STAGED_BYTES", staged)
    run = a_run(group, optimizer=optimizer, **settings)
    run.optimizer.keep_gradients = keep
    run.optimizer.stochastic_rounding = stochastic_rounding
    taken = steps_of(run, steps, fails=fails_on == rank)
    gradients = (
        {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None} if keep else {}
    )
    return {
        "parameters": {name: p.detach().clone() for name, p in run.model.named_parameters()} | gradients,
        "examples": taken,
        "steps": run.engine.steps,
    }


def a_run(group: Any, *, optimizer: str = "adamw", **settings: Any) -> Run:
    return private_run(
        key=KEY,
        lr=0.05,
        optimizer=OPTIMIZERS[optimizer],
        process_group=group,
        **{"examples": 60, "batch_size": 12, "physical_batch_size": 4, "sigma": 0.5, **settings},
    )


def steps_of(run: Run, steps: int, *, fails: bool = False) -> list[list[int]]:
    """Take steps; the examples of each that this process got."""
    taken: list[list[int]] = []

    def losses_of(batch: Any) -> torch.Tensor:
        if fails and len(batch[0]) > 2:
            raise torch.OutOfMemoryError("more than two examples")
        return run.loss_fn(run.model, batch)

    for logical in run.loader:
        taken.append(sorted(index for part in logical.parts for index in part))
        back_propagate(run.optimizer, logical, losses_of)
        run.optimizer.step()
        if len(taken) == steps:
            break
        run.optimizer.zero_grad()
    return taken


@cache
def _results(processes: Processes, size: int, settings: str, optimizer: str) -> list[dict[str, Any]]:
    return processes.results(trained, size, **{"optimizer": optimizer, **SETTINGS.get(settings, {})})


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


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_processes_take_the_step_of_one(processes: Processes, size: int, optimizer: str) -> None:
    check_same(processes, size, "", optimizer)


@pytest.mark.parametrize("settings", SETTINGS)
def test_in_every_setting(processes: Processes, settings: str) -> None:
    check_same(processes, 3, settings)


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
        assert all(a.stop == b.start for a, b in zip(mine, mine[1:], strict=False))
