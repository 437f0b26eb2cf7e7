"""A transducer in an engine: every strategy, micro-batches, the self-check, and the memory that is planned for it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpkernels.losses import IGNORED
from dpkernels.memory import MemoryEstimator
from dpkernels.privacy.keywords import STRATEGIES
from tests.nn.layers import test_joint as joint
from tests.nn.layers.test_joint import small_budgets  # noqa: F401 - a fixture
from tests.privacy.private_run import Run, private_run
from tests.privacy.step import test_speaker_clipping as speakers
from tests.privacy.strategy_models import clip, distance, expected_sum, gradients_one_by_one

INDICES = (0, 1, 2, 3, 4)
BOUND = 0.5


class Features(joint.Transducer):
    """Takes what a batch of `private_run` has: features [B,4,6], and a class that gives lengths and labels."""

    def __init__(self) -> None:
        super().__init__(joint.TDT)
        self.encoder = nn.Linear(6, joint.WIDTH)


def losses_of(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    x, kind = batch
    rows = torch.tensor([[1, 0, 5], [7, IGNORED, IGNORED], [2, 2, IGNORED]])
    return joint.losses_of(model, x, 4 - kind % 2, rows[kind])


def run_of(strategy: str, **options: Any) -> Run:
    torch.manual_seed(3)
    return private_run(sigma=0, clip=BOUND, model=Features(), strategy=strategy, loss_fn=losses_of, **options)


def check_sum(strategy: str) -> None:
    run = run_of(strategy)
    ones = [(x.double(), y) for x, y in (run.data[[i]] for i in INDICES)]
    rows = gradients_one_by_one(run.model, losses_of, ones)
    assert max(float(torch.cat([g.flatten() for g in row.values()]).norm()) for row in rows) > BOUND
    released = {name: 8 * part for name, part in run.release(INDICES[:3], INDICES[3:]).items()}
    by_layer = strategy == "per_layer"
    expected = by_records(rows) if by_layer else expected_sum(rows, run.model, strategy, BOUND)
    assert distance(released, expected) < 1e-4


def by_records(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The sum clipped layer by layer: weight and bias of the output layer are one record, at √2 of one norm."""
    head = ["head.weight", "head.bias"]
    groups = [head, *([name] for name in rows[0] if name not in head)]
    return clip(rows, groups, [BOUND * (len(group) / len(rows[0])) ** 0.5 for group in groups])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_sums_one_by_one_clipped_gradients(strategy: str) -> None:
    check_sum(strategy)


@pytest.mark.usefixtures("small_budgets")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_so_it_does_where_memory_is_short(strategy: str) -> None:
    check_sum(strategy)


def test_the_self_check_passes_and_no_part_is_unchecked() -> None:
    run = run_of("bookkeeping")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = run.engine.self_check(losses_of, run.data[list(INDICES)])
    assert not report.unchecked


def test_memory_is_planned_without_values() -> None:
    def losses(model: nn.Module, size: int) -> Tensor:
        return losses_of(model, (torch.empty(size, 4, 6), torch.empty(size, dtype=torch.int64)))

    with MemoryEstimator(Features(), target="cpu") as estimator:
        peaks = [estimator.peak(losses, size).micro_batch for size in (1, 2, 3)]
    assert peaks[0] < peaks[1] < peaks[2]


@pytest.mark.parametrize("short", [False, True], ids=["kept", "made twice"])
@pytest.mark.parametrize("strategy", ["bookkeeping", "two_pass"])
def test_speakers_clipped_as_speakers(strategy: str, short: bool, request: pytest.FixtureRequest) -> None:
    if short:
        request.getfixturevalue("small_budgets")
    torch.manual_seed(3)
    speakers.check_clipped_sum(
        speakers.speaker_run(clip=BOUND, strategy=strategy, model=Features(), loss_fn=losses_of)
    )
