"""The batch-independence check, and the self-check's tolerance: mixing in one arithmetic only is found there."""

from __future__ import annotations

import contextlib
import random
import weakref
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpkernels import PrivacyEngine
from dpkernels.privacy import SelfCheckError
from dpkernels.privacy.sampling.rows import rows_of
from dpkernels.privacy.self_check import batch_independence as others
from dpkernels.privacy.self_check import check as self_check
from dpkernels.privacy.self_check.batch_independence import with_other_examples
from dpkernels.privacy.self_check.probing import private_backward

FRAMES, WIDTH = 5, 6


class Net(nn.Module):
    """Two trained layers around something that may mix."""

    def __init__(self, mixing: nn.Module) -> None:
        super().__init__()
        self.first, self.mixing, self.last = nn.Linear(WIDTH, WIDTH), mixing, nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.mixing(self.first(x)))
        return y


class Mixes(nn.Module):
    """Adds a share of the batch's mean, in one dtype or in all."""

    def __init__(self, share: float, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.share, self.dtype = share, dtype

    def forward(self, y: Tensor) -> Tensor:
        return y if self.dtype not in (None, y.dtype) else y + self.share * y.mean(0)


def losses(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).float().square().mean((1, 2))


def in_half(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return losses(model, x)


def batch(size: int = 3) -> Tensor:
    return torch.randn(size, FRAMES, WIDTH, generator=torch.Generator().manual_seed(0))


def made(
    engine: PrivacyEngine, mixing: nn.Module | None = None, *, model: nn.Module | None = None
) -> nn.Module:
    torch.manual_seed(0)
    model = model or Net(mixing or nn.Identity())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    data: Any = DataLoader(TensorDataset(batch(8)), batch_size=4)
    return engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(trained, lr=0.1),
        data_loader=data,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )[0]


@pytest.mark.parametrize("loss_fn", [losses, in_half])
@pytest.mark.parametrize("size", [2, 3])
def test_independent_examples_pass(loss_fn: Any, size: int) -> None:
    with closing(PrivacyEngine()) as engine:
        made(engine, nn.Tanh())
        engine.self_check(loss_fn, batch(size))
        engine.check_batch_independence(loss_fn, batch(size))


def test_one_example_alone_shows_nothing_and_is_refused() -> None:
    with closing(PrivacyEngine()) as engine:
        made(engine, Mixes(0.1))
        for check in (engine.self_check, engine.check_batch_independence):
            with pytest.raises(ValueError, match="holds 1 example; give at least two"):
                check(losses, batch(1))


def test_what_mixes_in_half_precision_only_is_found_there() -> None:
    with closing(PrivacyEngine()) as engine:
        model = made(engine, Mixes(0.1, torch.bfloat16))
        engine.self_check(losses, batch())
        with pytest.raises(SelfCheckError, match="with other examples beside it, example 0 of the batch"):
            engine.check_batch_independence(in_half, batch())
        assert model.training
        assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("share", [1e-2, 1e-4])
def test_the_self_check_checks_batch_independence_too(share: float) -> None:
    """Below float32's tolerance, where a batch and an example alone are compared."""
    with closing(PrivacyEngine()) as engine:
        made(engine, Mixes(share))
        with pytest.raises(SelfCheckError):
            engine.self_check(losses, batch(), tolerance=1.0)


class Int8(nn.Module):
    """One scale for the whole tensor, as quantised training has it: the same in whatever order the examples are."""

    def forward(self, y: Tensor) -> Tensor:
        if y.dtype is not torch.bfloat16:
            return y
        scale = y.detach().abs().amax() / 7
        return y + ((y / scale).round() * scale - y).detach()


@pytest.mark.parametrize("size", [2, 3])
def test_a_statistic_behind_a_layer_that_forgets_the_scale_is_found(size: int) -> None:
    front = nn.LayerNorm(WIDTH, elementwise_affine=False)
    model = nn.Sequential(front, nn.Linear(WIDTH, WIDTH), Int8(), nn.Linear(WIDTH, 3))
    with closing(PrivacyEngine()) as engine:
        made(engine, model=model)
        engine.self_check(losses, batch(size))
        with pytest.raises(SelfCheckError, match="with other examples beside it"):
            engine.check_batch_independence(in_half, batch(size))


@pytest.mark.parametrize("size", [2, 3])
def test_a_mean_over_whole_numbers_is_found(size: int) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.mixes, self.last = nn.Embedding(9, WIDTH), Mixes(0.1), nn.Linear(WIDTH, 3)

        def forward(self, ids: Tensor) -> Tensor:
            y: Tensor = self.last(self.mixes(self.embedding(ids)))
            return y

    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [2, 4, 6, 8]])[:size]
    with closing(PrivacyEngine()) as engine:
        made(engine, model=Tokens())
        with pytest.raises(SelfCheckError, match="with other examples beside it"):
            engine.check_batch_independence(losses, ids)


class Keeps(nn.Module):
    """Adds what earlier forwards left, where nothing looks: a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.zeros(WIDTH)

    def forward(self, y: Tensor) -> Tensor:
        found = y + 0.1 * self.seen
        if self.training:
            self.seen = 0.9 * self.seen + 0.1 * y.detach().mean((0, 1))
        return found


def test_what_is_kept_from_forward_to_forward_is_found() -> None:
    with closing(PrivacyEngine()) as engine:
        made(engine, Keeps())
        with pytest.raises(SelfCheckError, match=r"asked again with the same batch.*train mode.*is kept"):
            engine.self_check(losses, batch())


def test_what_only_other_examples_leave_is_found() -> None:
    """The batch repeated at once gives the same, and so do others beside it: the last question shows it."""

    class Last(Keeps):
        def forward(self, y: Tensor) -> Tensor:
            found = y + 0.1 * self.seen
            if self.training:
                self.seen = y.detach().mean((0, 1))
            return found

    with closing(PrivacyEngine()) as engine:
        model: Any = made(engine, Last())
        model.mixing.seen = model.first(batch()).mean((0, 1)).detach()  # as after a forward of this batch
        with pytest.raises(SelfCheckError, match="asked again with the same batch"):
            engine.check_batch_independence(losses, batch(), samples=1)


@pytest.mark.parametrize("how", ["dropout", "attention", "drop of layers"])
def test_mixing_in_training_is_found_behind_randomness_of_any_kind(how: str) -> None:
    class Random(Mixes):
        def forward(self, y: Tensor) -> Tensor:
            if not self.training:
                return y
            if how == "dropout":
                y = nn.functional.dropout(y, 0.1)
            elif how == "attention":
                y = nn.functional.scaled_dot_product_attention(y, y, y, dropout_p=0.1)
            elif torch.rand(()) < 0.5:
                y = 0.5 * y
            return super().forward(y)

    with closing(PrivacyEngine()) as engine:
        made(engine, Random(0.0))
        for _ in range(5):  # whatever is drawn
            modes = engine.self_check(losses, batch()).modes
            assert modes == {"eval", "train"} or "layers" in how
    with closing(PrivacyEngine()) as engine:
        made(engine, Random(0.1))
        with pytest.raises(SelfCheckError, match="train mode"):
            engine.self_check(losses, batch())


def test_masks_that_seldom_hide_anything_are_no_mixing() -> None:
    class Masked(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            hidden = torch.rand(len(y), 1, 1) < 0.15
            return y * ~hidden if self.training else y

    for _ in range(12):  # without a second look one in three says that gradients differ
        with closing(PrivacyEngine()) as engine:
            made(engine, Masked())
            engine.self_check(losses, batch())


def test_checks_in_several_threads_leave_torchs_functions_as_they_were() -> None:
    before = nn.functional.dropout, nn.functional.scaled_dot_product_attention

    class Dropped(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            return nn.functional.dropout(y, 0.5, self.training)

    def check(_: int) -> None:
        # Their draws are from the same generators: what the checks find is not asked here.
        with closing(PrivacyEngine()) as engine, contextlib.suppress(SelfCheckError):
            made(engine, Dropped())
            engine.self_check(losses, batch())

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(check, range(6))) == [None] * 6
    assert (nn.functional.dropout, nn.functional.scaled_dot_product_attention) == before


def test_a_batch_in_which_nothing_can_be_exchanged_is_refused() -> None:
    class Own:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    with closing(PrivacyEngine()) as engine:
        made(engine, Mixes(0.1))
        with pytest.raises(ValueError, match="a Own in which nothing has 3 rows"):
            engine.check_batch_independence(lambda model, own: losses(model, own.x), Own(batch()))


def test_a_batch_of_transformers_stays_one() -> None:
    given = transformers.BatchFeature({"x": batch()})
    with closing(PrivacyEngine()) as engine:
        made(engine, nn.Tanh())
        engine.self_check(lambda model, own: losses(model, own.x), given)


def test_the_generators_go_on_where_they_were() -> None:
    def states() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()

    with closing(PrivacyEngine()) as engine:
        made(engine, nn.Dropout(0.5))
        before = states()
        engine.check_batch_independence(losses, batch())
        assert states() == before


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_a_large_loss_hides_no_mixing_of_gradients(offset: float) -> None:
    with closing(PrivacyEngine()) as engine:
        made(engine, Mixes(1e-4))
        with pytest.raises(SelfCheckError, match="all trained parameters changed by") as caught:
            engine.check_batch_independence(lambda model, x: losses(model, x) + offset, batch())
    (found,) = caught.value.report.failures
    assert found.error < 0.01 * found.norm


def test_a_loss_that_mixes_without_a_gradient_is_found() -> None:
    def mixing(model: nn.Module, x: Tensor) -> Tensor:
        found = losses(model, x)
        return found + found.detach().mean()

    with closing(PrivacyEngine()) as engine:
        made(engine, nn.Tanh())
        with pytest.raises(SelfCheckError, match="the loss changed by"):
            engine.check_batch_independence(mixing, batch())


def test_what_looks_for_equal_examples_is_found() -> None:
    class Alike(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            alike = (y[:, None] == y[None]).flatten(2).all(-1).sum(1)
            return y * (1 + 0.1 * alike[:, None, None])

    with closing(PrivacyEngine()) as engine:
        made(engine, Alike())
        with pytest.raises(SelfCheckError, match="with other examples beside it"):
            engine.self_check(losses, batch())


def test_a_part_that_is_compiled_is_gone_through() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, WIDTH)

        def forward(self, y: Tensor) -> Tensor:
            return self.inner(y).tanh()

    with closing(PrivacyEngine()) as engine:
        part: Any = torch.compile(Part().requires_grad_(False), backend="eager")
        made(engine, model=Net(part))
        engine.self_check(losses, batch())


def test_a_loss_that_stays_infinite_is_no_change() -> None:
    """An impossible target's, of gradient 0: see dpkernels.losses."""

    def impossible(model: nn.Module, x: Tensor) -> Tensor:
        found = losses(model, x)
        return torch.where(x[:, 0, 0] > 0, found, torch.full_like(found, torch.inf))

    x = batch()
    x[:, 0, 0] = torch.tensor([1.0, -1.0, -1.0])
    with closing(PrivacyEngine()) as engine:
        made(engine, nn.Tanh())
        engine.self_check(impossible, x)


@pytest.mark.parametrize("then", [0.0, -torch.inf])
def test_a_loss_that_is_infinite_beside_some_only_is_found(then: float) -> None:
    def mixing(model: nn.Module, x: Tensor) -> Tensor:
        found = losses(model, x)
        return found + (torch.inf if torch.equal(x, batch()) else then)

    with closing(PrivacyEngine()) as engine:
        made(engine, nn.Tanh())
        with pytest.raises(SelfCheckError, match="the loss changed by inf"):
            engine.check_batch_independence(mixing, batch())


def test_one_backwards_records_are_gone_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a large model are as large as its activations."""
    seen: list[weakref.ref[Any]] = []

    def watching(tape: Any, losses: Tensor) -> list[Any]:
        assert all(record() is None for record in seen)
        records = private_backward(tape, losses)
        seen.extend(map(weakref.ref, records))
        return records

    for module in (others, self_check):
        monkeypatch.setattr(module, "private_backward", watching)
    with closing(PrivacyEngine()) as engine:
        made(engine, nn.Tanh())
        engine.self_check(losses, batch())
    assert len(seen) > 2 * (2 + 2 * (2 + 3))  # two layers' weights, in two modes, by both checks


@pytest.mark.parametrize("share", [1e-2, 3e-2])
def test_a_half_parameter_that_nothing_is_computed_in_loosens_nothing(share: float) -> None:
    class Idle(Mixes):
        def __init__(self) -> None:
            super().__init__(share)
            self.idle = nn.Parameter(torch.ones(2, dtype=torch.bfloat16), requires_grad=False)

    with closing(PrivacyEngine()) as engine:
        made(engine, Idle())
        with pytest.raises(SelfCheckError, match=r"beyond 0\.002"):
            engine.self_check(losses, batch())


def test_computing_in_half_precision_has_its_own_tolerance() -> None:
    with closing(PrivacyEngine()) as engine:
        made(engine, nn.Tanh())
        assert engine.self_check(in_half, batch()).tolerance == 6e-2
        assert engine.self_check(losses, batch()).tolerance == 2e-3


def test_the_others_move_and_are_halved_whatever_the_batch_is_made_of() -> None:
    pair = namedtuple("pair", ["x", "y"])
    x = torch.arange(3.0).view(3, 1) + 1
    given = {
        "x": x,
        "labels": torch.tensor([7, 8, 9]),
        "pair": pair(x, 4),
        "texts": ["a", "b", "c"],
        "whole": torch.ones(2),
    }
    rows = rows_of(given, 3)
    found = with_other_examples(given, 1, rows)
    assert found["x"][1] == 2
    assert found["x"][0] in (3, 1.5)
    assert found["x"][2] in (1, 0.5)
    assert found["labels"].tolist() == [9, 8, 7]
    assert found["pair"].x.tolist() == found["x"].tolist()
    assert found["pair"].y == 4
    assert found["texts"] == ["c", "b", "a"]
    assert found["whole"].tolist() == [1, 1]
    wide = with_other_examples(torch.ones(2, 100), 0, rows_of(torch.ones(2, 100), 2))
    assert set(wide[1].tolist()) == {0.5, 1.0}
    assert wide[0].tolist() == [1] * 100
    assert with_other_examples(given, 1, rows, copy=0)["texts"] == ["b", "b", "a"]
    assert x.tolist() == [[1], [2], [3]]
