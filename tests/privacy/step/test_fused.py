"""The fused step: what it equals, what it leaves, when it is not used, and the faults of noise planted in it."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dpkernels import ops
from dpkernels.privacy import BudgetExhausted, DPOptimizer, read_ledger
from dpkernels.privacy.rng import streams as noise_module
from dpkernels.privacy.rng.streams import PURPOSE_NOISE, PURPOSE_ROUNDING, SecretStream, grid_of, nonce
from dpkernels.privacy.step import fused as fused_module
from dpkernels.privacy.step.fused import Release, uncovered
from tests.privacy.private_run import KEY, Net, Run, private_run, train
from tests.privacy.step.test_noise import (
    BATCHES,
    EXPECTED,
    SIGMA,
    a_fixed_run,
    check_no_repeat_after_rollback,
    check_noise,
    grid_share,
)
from tests.warned import no_warnings

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": lambda p, lr: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "AdamW, fused": lambda p, lr: torch.optim.AdamW(p, lr=0.01, fused=True),
    "Adam, tensor lr": lambda p, lr: torch.optim.Adam(
        p, lr=torch.tensor(0.01), weight_decay=0.1, foreach=False
    ),
    "SGD": lambda p, lr: torch.optim.SGD(p, lr=0.1),
    "SGD, momentum": lambda p, lr: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.1),
    "SGD, nesterov": lambda p, lr: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, maximize=True),
    "AdamW, groups": lambda p, lr: torch.optim.AdamW(
        [{"params": p[::2], "lr": 0.02}, {"params": p[1::2], "betas": (0.5, 0.9), "weight_decay": 0.0}],
        lr=0.01,
    ),
}


def hook_on(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


def a_run(make: Callable[..., torch.optim.Optimizer], **arguments: Any) -> Run:
    torch.manual_seed(1)
    return private_run(optimizer=make, key=KEY, model=Net(), **arguments)


def close(first: Run, second: Run, **tolerance: float) -> None:
    for (name, one), (_, other) in zip(
        first.model.named_parameters(), second.model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


# --- what it equals


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_fused_step_equals_noise_and_then_the_optimizers_step(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    make = OPTIMIZERS[name]
    fused, unfused = a_run(make), a_run(lambda p, lr: hook_on(make(p, lr)))
    for parts in (((0, 1, 2), (3,)), (), ((4, 5),)):
        released = [run.release(*parts) for run in (fused, unfused)]
        for key in released[0]:
            assert torch.equal(released[0][key], released[1][key]), f"{key}: the release differs in its bits"
    close(fused, unfused, rtol=1e-5, atol=1e-6)
    assert caplog.text.count("hooks are registered") == 1
    ours, theirs = fused.optimizer.state_dict(), unfused.optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for number, state in ours["state"].items():
        assert state.keys() == theirs["state"][number].keys()
        for key, value in state.items():
            other = theirs["state"][number][key]
            assert (value.dtype, value.device, value.shape) == (other.dtype, other.device, other.shape)
            torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["AdamW", "Adam, tensor lr", "SGD, momentum"])
@pytest.mark.parametrize("swept_first", [True, False])
def test_a_run_goes_from_one_path_to_the_other(name: str, swept_first: bool) -> None:
    make = OPTIMIZERS[name]
    straight, changing = a_run(make), a_run(make)
    for step in range(4):
        handle = None
        if (step < 2) != swept_first:
            handle = changing.optimizer.original_optimizer.register_step_pre_hook(lambda *_: None)
        for run in (straight, changing):
            run.release((step, step + 1))
        if handle is not None:
            handle.remove()
    close(straight, changing, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["AdamW", "SGD, momentum"])
def test_a_state_dict_goes_to_plain_torch_and_back(name: str) -> None:
    run = a_run(OPTIMIZERS[name])
    run.release((0, 1))
    plain = OPTIMIZERS[name](list(run.model.parameters()), 0.0)
    plain.load_state_dict(run.optimizer.state_dict())
    for p in run.model.parameters():
        p.grad = torch.ones_like(p)
    plain.step()
    other = a_run(OPTIMIZERS[name])
    other.optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    other.release(())
    weight = other.model.last.weight
    if "AdamW" in name:
        assert other.optimizer.state[weight]["step"] == 3
        assert set(other.optimizer.state[weight]) == {"step", "exp_avg", "exp_avg_sq"}
    else:
        assert set(other.optimizer.state[weight]) == {"momentum_buffer"}


def test_counters_of_another_kind_are_counted_on() -> None:
    """As another program's state may have them; refused within the update, half of it would be done."""
    run = a_run(OPTIMIZERS["AdamW"])
    run.release((0, 1))
    first = next(iter(run.optimizer.state.values()))
    first["step"] = first["step"].to(torch.int64)
    run.release((0, 1))
    assert {float(state["step"]) for state in run.optimizer.state.values()} == {2.0}
    assert {state["step"].dtype for state in run.optimizer.state.values()} == {torch.float32}


@pytest.mark.parametrize("name", ["AdamW", "SGD, momentum"])
def test_bf16_parameters_keep_float32_state_through_a_checkpoint(name: str) -> None:
    run = a_run(OPTIMIZERS[name], dtype=torch.bfloat16)
    run.release((0, 1, 2))
    state = run.optimizer.state[run.model.last.weight]
    kept = {key: value for key, value in state.items() if key != "step"}
    assert {value.dtype for value in kept.values()} == {torch.float32}
    assert any(grid_share(value.double()) < 0.9 for value in kept.values())
    saved = copy.deepcopy(run.optimizer.state_dict())
    run.optimizer.load_state_dict(saved)
    for key, value in kept.items():
        assert torch.equal(run.optimizer.state[run.model.last.weight][key], value)
    # torch's own step wants the parameters' dtype, and the fused step takes that up again.
    handle = run.optimizer.original_optimizer.register_step_pre_hook(lambda *_: None)
    run.release((3,))
    handle.remove()
    run.release((4,))
    assert {v.dtype for k, v in run.optimizer.state[run.model.last.weight].items() if k != "step"} == {
        torch.float32
    }


def test_stochastic_rounding_keeps_small_updates() -> None:
    moved = {}
    for stochastic in (False, True):
        run = private_run(
            sigma=0.0, dtype=torch.bfloat16, optimizer=lambda p, lr: torch.optim.SGD(p, lr=1.0, maximize=True)
        )
        run.optimizer.stochastic_rounding = stochastic
        weight = run.model.unused.weight
        with torch.no_grad():
            weight.fill_(1.0)
        for _ in range(20):
            run.optimizer._batch.of(weight).fill_(2.0**-10 * EXPECTED)  # an eighth of bfloat16's step at 1
            run.optimizer._batch.dirty = True
            run.optimizer.step()
        moved[stochastic] = float(weight.detach().double().mean()) - 1
    assert moved[False] == 0
    assert abs(moved[True] - 20 * 2.0**-10) < 5 * 2.0**-7 * math.sqrt(20 * 0.11 / 1200)


# --- what it leaves


def test_gradients_are_kept_only_when_asked_for() -> None:
    run = a_run(OPTIMIZERS["AdamW"])
    run.optimizer.keep_gradients = False
    run.optimizer.begin_logical_batch(2)
    run.optimizer.backward(run.loss_fn(run.model, run.data[[0, 1]]))
    run.optimizer.step()
    assert all(p.grad is None for p in run.model.parameters())
    run.optimizer.keep_gradients = True
    run.optimizer.step()
    assert all(
        p.grad is not None and p.grad.dtype == p.dtype and p.grad.any() for p in run.model.parameters()
    )
    run.optimizer.begin_logical_batch(2)
    run.optimizer.backward(run.loss_fn(run.model, run.data[[0, 1]]))  # finds its own, and takes no offence


def test_the_sums_are_cleared_by_the_fused_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(OPTIMIZERS["SGD"])
    run.optimizer.begin_logical_batch(2)
    run.optimizer.backward(run.loss_fn(run.model, run.data[[0, 1]]))
    with monkeypatch.context() as inner:
        inner.setattr(Tensor, "zero_", lambda self: pytest.fail("a second pass over the sums"))
        run.optimizer.step()
    assert run.optimizer._batch.sums
    assert not any(total.any() for total in run.optimizer._batch.sums.values())


def check_line_before_the_fused_step(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = private_run(ledger=path)
    seen = []
    real = ops.noise_sgd
    monkeypatch.setattr(
        fused_module.ops,
        "noise_sgd",
        lambda *a, **k: (seen.append(read_ledger(path).steps), real(*a, **k))[1],
    )
    run.release(())
    monkeypatch.undo()
    assert seen == [1], "the step was applied before its line was on disk"


def test_a_step_is_on_disk_before_the_fused_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_line_before_the_fused_step(tmp_path / "ledger.jsonl", monkeypatch)


def test_planted_line_after_the_fused_step_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(self: DPOptimizer, draw: int, original: Callable = DPOptimizer._fused_step) -> None:
        original(self, draw)
        spend()

    with monkeypatch.context() as outer:
        outer.setattr(DPOptimizer, "_fused_step", late)
        run = private_run(ledger=tmp_path / "ledger.jsonl")
        spend, run.optimizer._budget.spend = run.optimizer._budget.spend, lambda: None
        outer.setitem(check_line_before_the_fused_step.__globals__, "private_run", lambda **_: run)
        with pytest.raises(AssertionError, match="before its line"):
            check_line_before_the_fused_step(tmp_path / "ledger.jsonl", monkeypatch)


def test_a_refused_step_changes_nothing() -> None:
    run = a_run(OPTIMIZERS["AdamW"], target_epsilon=0.5, target_delta=1e-3, sigma=1.0)
    steps = run.engine.steps
    with pytest.raises(BudgetExhausted):  # noqa: PT012 (the step that raises is found by taking them)
        while True:
            before = copy.deepcopy([p.detach() for p in run.model.parameters()])
            states, steps = copy.deepcopy(run.optimizer.state_dict()["state"]), run.engine.steps
            run.release(())
    assert run.engine.steps == steps
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
    after = run.optimizer.state_dict()["state"]
    assert states.keys() == after.keys()
    assert all(torch.equal(states[n][k], after[n][k]) for n in states for k in states[n])


def test_a_failure_in_the_middle_is_spent_and_its_batch_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(OPTIMIZERS["AdamW, groups"])
    calls = []
    real = ops.noise_adamw

    def second_fails(*args: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError("out of memory")
        real(*args, **options)

    monkeypatch.setattr(fused_module.ops, "noise_adamw", second_fails)
    run.optimizer.begin_logical_batch(2)
    run.optimizer.backward(run.loss_fn(run.model, run.data[[0, 1]]))
    with pytest.raises(MemoryError):
        run.optimizer.step()
    assert run.engine.steps == 1
    assert not any(total.any() for total in run.optimizer._batch.sums.values())
    monkeypatch.undo()
    run.release(())
    assert run.engine.steps == 2


def test_nothing_is_changed_before_everything_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(OPTIMIZERS["AdamW, groups"])
    before = copy.deepcopy([p.detach() for p in run.model.parameters()])
    made = []
    real = torch.zeros_like

    def fails_in_the_second_group(*args: Any, **options: Any) -> Tensor:
        made.append(1)
        if len(made) == 10:  # two states each of the first group's four parameters come before
            raise MemoryError("out of memory")
        return real(*args, **options)

    monkeypatch.setattr(torch, "zeros_like", fails_in_the_second_group)
    with pytest.raises(MemoryError):
        run.optimizer.step()
    monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
    run.release(())  # and the run goes on


# --- when it is not used


class MyAdamW(torch.optim.AdamW):
    """A class of the user's own may step otherwise."""


def patched(p: list, lr: float) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(p, lr=0.1)
    original = optimizer.step
    optimizer.step = lambda *a, **k: original(*a, **k)  # type: ignore[method-assign]
    return optimizer


UNCOVERED: dict[str, tuple[Callable[..., torch.optim.Optimizer], str]] = {
    "another class": (lambda p, lr: torch.optim.RMSprop(p, lr=0.01), "RMSprop is not one of"),
    "a subclass": (lambda p, lr: MyAdamW(p, lr=0.01), "MyAdamW is not one of"),
    "amsgrad": (lambda p, lr: torch.optim.AdamW(p, lr=0.01, amsgrad=True), "parameter group 0: amsgrad=True"),
    "a tensor for beta": (
        lambda p, lr: torch.optim.Adam(
            p, lr=0.01, betas=(torch.tensor(0.9), torch.tensor(0.99)), foreach=False
        ),
        r"betas\[0\] is a tensor",
    ),
    "hooks": (lambda p, lr: hook_on(torch.optim.SGD(p, lr=0.01)), "hooks are registered"),
    "a replaced step": (patched, "SGD.step was replaced"),
}


@pytest.mark.parametrize("name", UNCOVERED)
def test_other_optimizers_are_called_and_the_reason_is_logged_once(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    make, reason = UNCOVERED[name]
    run = a_run(make)
    before = run.model.last.weight.detach().clone()
    with caplog.at_level(logging.WARNING, logger="dpkernels"):
        check_noise_of(run)
        run.release(())
    assert not torch.equal(before, run.model.last.weight)
    found = [record.message for record in caplog.records if "separate passes" in record.message]
    assert len(found) == 1
    assert re.search(reason, found[0]), found


def check_noise_of(run: Run) -> None:
    """That noise was added, whichever optimizer."""
    released = run.release(())
    values = torch.cat([g.flatten() for g in released.values()]) * EXPECTED / run.optimizer.sensitivity
    assert abs(float(values.square().mean().sqrt()) - 1) < 5 / math.sqrt(2 * values.numel())


def test_float64_and_scattered_parameters_are_not_covered() -> None:
    model = torch.nn.Linear(3, 4).double()
    assert "torch.float64" in uncovered(torch.optim.SGD(model.parameters(), lr=0.1), list(model.parameters()))
    weight = torch.nn.Parameter(torch.zeros(4, 6).T)
    assert "not contiguous" in uncovered(torch.optim.SGD([weight], lr=0.1), [weight])
    capturable = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], capturable=True)
    assert "capturable=True" in uncovered(capturable, capturable.param_groups[0]["params"])
    differentiable = torch.optim.SGD(model.float().parameters(), lr=0.1, differentiable=True)
    assert "differentiable=True" in uncovered(differentiable, list(model.parameters()))


def test_a_step_patched_on_the_class_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(OPTIMIZERS["SGD"])
    called = []
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, closure=None: called.append(1))
    run.release(())
    assert called


def test_stochastic_rounding_without_the_fused_step_is_refused_and_costs_nothing() -> None:
    run = a_run(UNCOVERED["amsgrad"][0])
    run.optimizer.stochastic_rounding = True
    with pytest.raises(RuntimeError, match=r"needs the fused noise-and-optimizer step.*amsgrad"):
        run.optimizer.step()
    assert run.engine.steps == 0


@pytest.mark.parametrize("on_the_wrapped", [False, True])
def test_schedulers_see_their_step(on_the_wrapped: bool, caplog: pytest.LogCaptureFixture) -> None:
    scheduled: list[Any] = []

    def make(p: list, lr: float) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(p, lr=0.1)
        if on_the_wrapped:
            scheduled.append(torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5))
        return optimizer

    run = a_run(make)
    if not on_the_wrapped:
        scheduled.append(torch.optim.lr_scheduler.StepLR(run.optimizer, 1, gamma=0.5))
    with no_warnings("no self_check"):
        run.release(())
        scheduled[0].step()
    assert run.optimizer.param_groups[0]["lr"] == 0.05
    assert "separate passes" not in caplog.text


# --- faults of noise, planted in the fused step. test_noise.py plants them in the other path.


def wrap(monkeypatch: pytest.MonkeyPatch, change: Callable[..., None]) -> None:
    """Replace the op by one that first lets `change` invalidate its arguments."""
    real = ops.noise_sgd

    def invalidated(params: list, sums: list, buffers: list, steps: list, **options: Any) -> None:
        given = {"params": params, "sums": sums, "momentum_buffers": buffers, "steps": steps, **options}
        change(given, real)
        if given:
            real(**given)

    monkeypatch.setattr(fused_module.ops, "noise_sgd", invalidated)


def skip_without_gradient(given: dict[str, Any], real: Callable) -> None:
    """Those whose sum is 0 get none."""
    for i, total in enumerate(given["sums"]):
        one = {k: [v[i]] if isinstance(v, list) and v else v for k, v in given.items()}
        real(**{**one, "noise_scale": given["noise_scale"] if total.any() else 0.0})
    given.clear()


def on_the_mean(given: dict[str, Any], real: Callable) -> None:
    given["noise_scale"] *= given["divisor"]


def without_multiplier(given: dict[str, Any], real: Callable) -> None:
    given["noise_scale"] /= SIGMA


def twice(given: dict[str, Any], real: Callable) -> None:
    for i, total in enumerate(given["sums"]):
        z = ops.chacha20_normal(total.numel(), key=KEY, nonce=nonce(PURPOSE_NOISE, 50 + i, 1))
        total += given["noise_scale"] * z.view(total.shape)


def forgotten(given: dict[str, Any], real: Callable) -> None:
    given["noise_scale"] = 0.0


def undivided(given: dict[str, Any], real: Callable) -> None:
    given["divisor"] = 1.0


@pytest.mark.parametrize(
    ("fault", "batch"),
    [
        (skip_without_gradient, "one micro-batch"),
        (skip_without_gradient, "empty"),
        (on_the_mean, "one micro-batch"),
        (without_multiplier, "four micro-batches"),
        (twice, "one micro-batch"),
        (forgotten, "one micro-batch"),
        (undivided, "one micro-batch"),
    ],
)
def test_planted_noise_faults_are_caught(
    fault: Callable, batch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_fixed_run()
    wrap(monkeypatch, fault)
    with pytest.raises(AssertionError):
        check_noise(run, *BATCHES[batch])


@pytest.mark.parametrize(
    ("change", "batch"),
    [
        (lambda o: {"noise_scale": o._release.noise_scale if o._batch.examples else 0.0}, "empty"),
        (lambda o: {"divisor": max(o._batch.examples, 1)}, "four micro-batches"),
        (lambda o: {"divisor": max(o._batch.examples, 1)}, "empty"),
    ],
    ids=["an empty batch adds none", "actual batch size", "actual batch size, empty"],
)
def test_planted_dependence_on_the_batch_is_caught(
    change: Callable, batch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = DPOptimizer._fused_step

    def faulty(self: DPOptimizer, draw: int) -> None:
        self._release = dataclasses.replace(self._release, **change(self))
        original(self, draw)

    monkeypatch.setattr(DPOptimizer, "_fused_step", faulty)
    with pytest.raises(AssertionError):
        check_noise(a_fixed_run(), *BATCHES[batch])


def bf16_share(run: Run) -> float:
    """Share of the unused parameter's noise that bfloat16 holds, seen in a float32 momentum buffer."""
    run.optimizer._release = Release(1.0, grid_of(1.0), 8)  # powers of two: bfloat16's own grid stays visible
    run.release(())
    return grid_share(run.optimizer.state[run.model.unused.weight]["momentum_buffer"].double())


def test_noise_is_not_bf16_with_bf16_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bf16_share(a_run(OPTIMIZERS["SGD, nesterov"], dtype=torch.bfloat16)) < 0.3

    def coarse(given: dict[str, Any], real: Callable) -> None:
        for total, one in zip(given["sums"], given["nonces"], strict=True):
            z = ops.chacha20_normal(total.numel(), key=KEY, nonce=one).bfloat16().double()
            total += given["noise_scale"] * z.view(total.shape)
        given["noise_scale"] = 0.0

    wrap(monkeypatch, coarse)  # the planted fault
    assert bf16_share(a_run(OPTIMIZERS["SGD, nesterov"], dtype=torch.bfloat16)) > 0.9


def test_one_stream_for_two_parameters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_fixed_run()
    monkeypatch.setattr(
        noise_module, "nonce", lambda purpose, index, draw, rank=0: nonce(purpose, 0, draw, rank)
    )
    with pytest.raises(ValueError, match="share their noise"):
        run.release(())


def test_planted_stream_repeated_by_the_next_step_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_fixed_run()
    check_no_repeat_after_rollback(run)
    monkeypatch.setattr(
        noise_module, "nonce", lambda purpose, index, draw, rank=0: nonce(purpose, index, 1, rank)
    )
    with pytest.raises(AssertionError, match="repeats its noise"):
        check_no_repeat_after_rollback(run)


def test_planted_rounding_from_the_noises_stream_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever knew the rounding would know the noise."""
    with pytest.warns(UserWarning, match="tests"):
        secrets = SecretStream(KEY).step_secrets([0, 1], draw=5, rounding=True)
    assert not set(secrets["nonces"]) & set(secrets["rounding_nonces"])
    assert secrets["rounding_nonces"] == [nonce(PURPOSE_ROUNDING, i, 5) for i in (0, 1)]
    monkeypatch.setattr(noise_module, "PURPOSE_ROUNDING", PURPOSE_NOISE)
    run = a_run(OPTIMIZERS["SGD"], dtype=torch.bfloat16)
    run.optimizer.stochastic_rounding = True
    with pytest.raises(ValueError, match="share their noise"):
        run.optimizer.step()


def test_training_by_the_loader_goes_through_the_fused_step(caplog: pytest.LogCaptureFixture) -> None:
    run = a_run(OPTIMIZERS["AdamW"])
    assert train(run, 4) == 4
    assert "separate passes" not in caplog.text
    assert run.optimizer.state[run.model.last.weight]["step"] == 4
