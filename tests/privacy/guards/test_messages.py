"""What a user of Opacus writes first: each error says what to write instead."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from dpkernels import PrivacyEngine
from tests.privacy.private_run import KEY, losses_of, private_run, train


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
