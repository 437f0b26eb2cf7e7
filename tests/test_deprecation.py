"""Deprecated names of the public interface: each is accepted and warns with the new name."""

from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dpkernels.nn
from dpkernels import PrivacyEngine
from dpkernels.nn import Record
from dpkernels.plain import PlainLoader
from dpkernels.privacy import DPDataLoader, DPOptimizer, micro_batches

X = torch.arange(12.0).view(4, 3)


def losses(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum(1)


def private(
    engine: PrivacyEngine, strategy: str, **options: Any
) -> tuple[nn.Module, DPOptimizer, DPDataLoader]:
    model = nn.Linear(3, 2)
    return engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset(X), batch_size=2),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        strategy=strategy,
        **options,
    )


def test_keep_small_is_mixed() -> None:
    with closing(PrivacyEngine()) as engine:
        with pytest.warns(DeprecationWarning, match="'mixed'") as warned:
            private(engine, "keep_small")
        assert warned[0].filename == __file__
        assert engine.self_check(losses, X)
    model = dpkernels.nn.swap(nn.Linear(3, 2))
    with pytest.warns(DeprecationWarning, match="mixed"):
        tape = dpkernels.nn.attach(model, keep_small=True)
    assert tape.mixed


def test_physical_frames_is_max_padded_frames() -> None:
    lengths = [4, 1, 1, 1]
    frames: dict[str, Any] = {"physical_frames": 4}
    with closing(PrivacyEngine()) as engine:
        with pytest.warns(DeprecationWarning, match="max_padded_frames") as warned:
            loader = private(engine, "bookkeeping", lengths=lengths, **frames)[2]
        assert warned[0].filename == __file__
    assert loader.max_padded_frames == 4
    with pytest.warns(DeprecationWarning, match="max_padded_frames"):
        assert loader.physical_frames == 4
    with pytest.warns(DeprecationWarning, match="max_padded_frames") as warned:
        assert micro_batches(np.arange(4), 4, np.array(lengths), **frames) == [[0], [1, 2, 3]]
    assert warned[0].filename == __file__
    data = TensorDataset(X)
    with pytest.warns(DeprecationWarning, match="max_padded_frames"):
        plain = PlainLoader(data, lengths, batch_size=4, steps=1, physical_batch_size=4, **frames)
    assert [len(part[0]) for batch in plain for part in batch] == [1, 3]
    with pytest.raises(TypeError, match="physical_frames=4 are both given"):
        micro_batches(np.arange(4), 4, np.array(lengths), 4, **frames)


def test_check_mates_is_check_batch_independence() -> None:
    with closing(PrivacyEngine()) as engine:
        private(engine, "mixed")
        with pytest.warns(DeprecationWarning, match="check_batch_independence"):
            engine.check_mates(losses, X)
        with (
            pytest.warns(DeprecationWarning, match="check_batch_independence"),
            pytest.raises(ValueError, match="holds 1 example; give at least two"),
        ):
            engine.check_mates(losses, X[:1])


def test_a_rule_of_ones_own_may_define_formed() -> None:
    with pytest.warns(DeprecationWarning, match=r"Mine\.formed is now called materialised"):

        class Mine(dpkernels.nn.LinearRecord):
            forms_by_default = True

            def formed(self) -> tuple[dpkernels.nn.ExpandedRecord, ...]:
                return super().materialised()

    assert issubclass(Mine, Record)
    assert Mine.materialised is Mine.formed
    assert Mine.materialises_by_default
