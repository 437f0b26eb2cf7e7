"""privacy.md 18: an index from data that is out of range moves nobody's gradient but its own, to exactly 0."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dpkernels.losses import cross_entropy_per_example, ctc_loss_per_example
from tests.privacy.private_run import Run, private_run

CLASSES, FRAMES, BLANK = 5, 4, 0
LABELS = torch.tensor([[1, 2], [3, -100], [2, 4], [1, 1], [4, 3]])
ODD = 2  # the example whose label is out of range
OTHERS = [0, 1, 3, 4]


class Frames(nn.Module):
    """Logits of every frame."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.last = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def ctc(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return ctc_loss_per_example(model(batch[0]), batch[2], batch[1], BLANK)


def cross_entropy(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return cross_entropy_per_example(model(batch[0])[:, : LABELS.shape[1]], batch[1])


def run_of(loss: object, strategy: str, label: int, length: int = FRAMES) -> Run:
    torch.manual_seed(1)
    run = private_run(sigma=0.0, clip=0.5, model=Frames(), loss_fn=loss, strategy=strategy)  # type: ignore[arg-type]
    features = torch.randn(len(LABELS), FRAMES, 6, generator=torch.Generator().manual_seed(3))
    labels, lengths = LABELS.clone(), torch.full((len(LABELS),), FRAMES)
    labels[ODD, 0], lengths[ODD] = label, length
    run.data = TensorDataset(features, labels, lengths)
    return run


@pytest.mark.thinned(5)
@pytest.mark.parametrize("strategy", ["bookkeeping", "mixed", "two_pass", "per_layer"])
@pytest.mark.parametrize(
    ("loss", "label", "length"),
    [
        *((ctc, label, FRAMES) for label in (CLASSES, CLASSES + 1, 2**40, -1, BLANK)),
        (ctc, 2, FRAMES + 1),
        (ctc, 2, -1),
        (ctc, 2, 1),
        *((cross_entropy, label, FRAMES) for label in (CLASSES, 2**40, -1)),
    ],
)
def test_an_index_out_of_range_changes_no_bit_of_the_sum(
    loss: object, label: int, length: int, strategy: str
) -> None:
    run = run_of(loss, strategy, label, length)
    with_it, without = run.release([*range(len(LABELS))]), run.release(OTHERS)
    assert all(torch.equal(with_it[name], without[name]) for name in without)
    assert any(part.any() for part in without.values())
    alone = run.release([ODD])
    assert not any(part.any() for part in alone.values())
    fine = run_of(loss, strategy, 2).release([*range(len(LABELS))])
    assert not all(torch.equal(fine[name], without[name]) for name in without)
