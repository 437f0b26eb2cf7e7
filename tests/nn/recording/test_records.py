"""Records that share one call for their weighted sums, and those that do not."""

import pytest
import torch
from torch import Tensor, nn

from dpkernels import ops
from dpkernels.nn import LinearRecord, add_weighted_sums


def record(kind: type[LinearRecord] = LinearRecord, dtype: torch.dtype = torch.float32) -> LinearRecord:
    weight = nn.Parameter(torch.zeros(3, 2))
    return kind("layer", weight, torch.randn(2, 4, 2), torch.randn(2, 4, 3).to(dtype))


def sums_of(records: list[LinearRecord]) -> dict[nn.Parameter, Tensor]:
    return {one.weight: torch.zeros(3, 2, dtype=torch.float64) for one in records}


class Doubled(LinearRecord):
    """A record of a user's own, with a sum of its own."""

    def add_weighted_sum(self, factors: Tensor, sums: dict) -> None:  # type: ignore[override]
        super().add_weighted_sum(2 * factors, sums)


def test_one_call_for_those_that_share(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [record(), record(), record(dtype=torch.float64), record(Doubled)]
    calls = []
    real = ops.clip_and_noise
    monkeypatch.setattr(ops, "clip_and_noise", lambda *a, **k: (calls.append(len(a[0])), real(*a, **k)))
    together, alone, factors = sums_of(records), sums_of(records), torch.tensor([0.5, 1.0])
    add_weighted_sums(records, factors, together)
    for one in records:
        one.add_weighted_sum(factors, alone)
    # Tensors of two dtypes, and a class that replaced the sum alone, are summed by their own methods.
    assert calls == [2]
    assert all(torch.equal(together[p], alone[p]) for p in alone)


def test_planted_share_of_a_class_that_replaced_the_sum_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from dpkernels.nn.recording import grouping as module

    monkeypatch.setattr(module, "_shares", lambda kind, method: True)
    with pytest.raises(AssertionError):
        test_one_call_for_those_that_share(monkeypatch)
