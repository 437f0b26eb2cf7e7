from __future__ import annotations

import pytest
import torch
from torch import nn

from dpkernels.nn import named_modules, swap


class _Tree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.ReLU(), nn.Linear(1, 1)))
        self.tied = self.first[1][1]
        self.absent: nn.Module | None
        self.register_module("absent", None)
        self.last = nn.ModuleDict({"a": nn.LayerNorm(2), "b": self.first[0]})


def test_named_modules_are_torchs_in_torchs_order() -> None:
    model = _Tree()
    ours, torchs = list(named_modules(model)), list(model.named_modules())
    assert [name for name, _ in ours] == [name for name, _ in torchs]
    assert all(a is b for (_, a), (_, b) in zip(ours, torchs, strict=True))


def test_a_child_that_is_its_own_ancestor_ends_the_walk() -> None:
    model = nn.Sequential(nn.Identity())
    model[0].add_module("back", model)
    assert [name for name, _ in named_modules(model)] == ["", "0"]
    assert torch.is_tensor(model[0](torch.zeros(1)))


@pytest.mark.parametrize("given", [None, "encoder"])
def test_swap_takes_modules(given: object) -> None:
    with pytest.raises(TypeError, match=r"swap: model must be a torch.nn.Module, got"):
        swap(given)  # type: ignore[arg-type]
