"""What a user of Opacus writes first: each error says what to write instead."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.data import DataLoader, RandomSampler

import dpkernels
from dpkernels import PrivacyEngine
from dpkernels.nn import detach
from tests.privacy.private_run import KEY, Net, losses_of, private_run, train
from tests.warned import no_warnings


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_logical_batch_that_is_unpacked_shows_the_loop(parts: int) -> None:
    run = private_run(batch_size=20, key=KEY, physical_batch_size=40 // parts)

    def as_with_opacus() -> None:
        for x, y in run.loader:
            run.optimizer.backward(losses_of(run.model, (x, y)))

    with pytest.raises(TypeError, match=r"for x, y in logical_batch:\n +optimizer\.backward"):
        as_with_opacus()


def test_a_logical_batch_may_be_listed_and_its_micro_batches_unpacked() -> None:
    run = private_run(key=KEY, physical_batch_size=2)
    for logical in run.loader:
        for x, y in list(logical):
            run.optimizer.backward(losses_of(run.model, (x, y)))
        run.optimizer.step()
        run.optimizer.zero_grad()
    assert run.engine.steps == 5


def test_a_grad_scaler_is_told_that_nothing_is_scaled() -> None:
    run, scaler = private_run(), torch.amp.GradScaler("cpu", init_scale=2.0)
    run.begin(2)
    run.optimizer.backward(scaler.scale(losses_of(run.model, run.data[[0, 1]])))
    with pytest.raises(RuntimeError, match=r"GradScaler\.step\(optimizer\): .*bfloat16"):
        scaler.step(run.optimizer)


def test_opacuss_accountant_is_pointed_to() -> None:
    run = private_run()
    train(run, 1)
    with pytest.raises(
        AttributeError, match=r"'pld' and has no 'get_epsilon': call engine\.get_epsilon\(delta\)"
    ):
        run.engine.accountant.get_epsilon(1e-3)  # type: ignore[attr-defined]
    assert run.engine.accountant == "pld"
    assert pickle.loads(pickle.dumps(run.engine.accountant)) == "pld"


def test_insecure_noise_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"secure_mode=False is refused: .*leave the argument out"):
        PrivacyEngine(secure_mode=False)


def test_a_generator_is_trained_through_a_frozen_discriminator() -> None:
    run = private_run()
    generator = nn.Linear(6, 6)
    fake = generator(torch.randn(2, 4, 6))
    with pytest.raises(
        RuntimeError, match=r"\(a generator\), freeze this one meanwhile: model\.requires_grad_"
    ):
        run.model(fake).sum().backward()
    run.optimizer.recover()
    generator.zero_grad()
    run.model.requires_grad_(False)
    run.model(generator(torch.randn(2, 4, 6))).sum().backward()
    run.model.requires_grad_(True)
    assert generator.weight.grad is not None
    run.release((0, 1))
    assert run.engine.steps == 1


CLIPPING: dict[str, Callable[[Any], Any]] = {
    "clip_grad_norm_": lambda parameters: clip_grad_norm_(parameters, 1.0),
    "clip_grad_value_": lambda parameters: torch.nn.utils.clip_grad_value_(parameters, 1.0),
}


@pytest.mark.parametrize("name", CLIPPING)
@pytest.mark.parametrize("unfused", [False, True])
def test_torchs_clipping_of_a_private_model_is_noticed_once(name: str, unfused: bool) -> None:
    run = private_run(unfused=unfused)
    run.begin(2)
    run.optimizer.backward(losses_of(run.model, run.data[[0, 1]]))
    with pytest.warns(UserWarning, match=rf"{name} on the .* private model \(Net\) changes nothing") as said:
        CLIPPING[name](run.model.parameters())
    assert [warning.filename for warning in said] == [__file__]
    with no_warnings("no self_check"):
        CLIPPING[name](run.model.parameters())
        run.optimizer.step()


@pytest.mark.parametrize("name", CLIPPING)
def test_torchs_clipping_of_other_models_is_torchs(name: str) -> None:
    run, other = private_run(), Net()
    detach(run.model)
    for model in (run.model, other):
        losses_of(model, run.data[[0, 1]]).mul(1e6).sum().backward()
        with no_warnings():
            CLIPPING[name](model.parameters())
        found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        assert float(found.norm() if name == "clip_grad_norm_" else found.abs().max()) == pytest.approx(1.0)
        with no_warnings():
            clip_grad_value_(model.first.weight, 0.0)
        assert not model.first.weight.grad.any()  # type: ignore[union-attr]


def parts(model: nn.Module, **given: Any) -> dict[str, Any]:
    made = {
        "module": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "data_loader": DataLoader(private_run().data, batch_size=8),
        "noise_multiplier": 1.0,
        "max_grad_norm": 1.0,
    }
    return made | given


@pytest.mark.parametrize("sampler", [False, True])
def test_a_generator_of_the_data_loader_is_not_used_and_that_is_said(sampler: bool) -> None:
    data, known = private_run().data, torch.Generator().manual_seed(0)
    given: dict[str, Any] = (
        {"sampler": RandomSampler(data, generator=known)}
        if sampler
        else {"shuffle": True, "generator": known}
    )
    with pytest.warns(
        UserWarning, match=r"data_loader: its generator is not used.*Leave generator= out"
    ) as said:
        PrivacyEngine().make_private(**parts(Net(), data_loader=DataLoader(data, batch_size=8, **given)))
    assert [warning.filename for warning in said] == [__file__]


class Noisy(nn.Linear):
    """A layer with random draws of its own."""

    def __init__(self) -> None:
        super().__init__(6, 3)
        self.draws = torch.Generator().manual_seed(0)


def test_a_generator_of_the_model_is_named() -> None:
    model = nn.Sequential(nn.Linear(6, 6), Noisy())
    with pytest.warns(UserWarning, match=r"random generators of its own: '1\.draws'.*global generator"):
        PrivacyEngine().make_private(**parts(model))


def test_what_an_earlier_cell_returned_is_named() -> None:
    run = private_run()
    model = Net()
    with pytest.raises(TypeError, match=r"got DPDataLoader, which an earlier make_private returned"):
        PrivacyEngine().make_private(**parts(model, data_loader=run.loader))
    with pytest.raises(TypeError, match=r"got a DPOptimizer, .* optimizer\.original_optimizer"):
        PrivacyEngine().make_private(**parts(model, optimizer=run.optimizer))
    with pytest.raises(RuntimeError, match=r"private already.*detach\(model\) first, or build a new model"):
        PrivacyEngine().make_private(**parts(run.model, optimizer=run.optimizer.original_optimizer))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module], **options: Any) -> None:
        super().__init__()
        self.layer, self.last = kind(6, 8, batch_first=True, **options), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.layer(x)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_need_no_replacement(kind: type[nn.Module]) -> None:
    model = Recurrent(kind)
    assert dpkernels.coverage(model).complete
    run = private_run(model=model)
    train(run, 1)
    assert run.engine.steps == 1


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_of_other_classes_name_the_fix(kind: type[nn.Module]) -> None:
    class Own(kind):  # type: ignore[misc, valid-type]
        def forward(self, x: torch.Tensor, state: Any = None) -> Any:
            return super().forward(x * self.weight_ih_l0.abs().mean(), state)

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = Own(6, 200, batch_first=True), nn.Linear(200, 3)

    with pytest.raises(ValueError, match=r"'layer\.weight_hh_l0' \(Own\): .*") as caught:
        PrivacyEngine().make_private(**parts(Wide()))
    assert "Fix: freeze them" in str(caught.value)
