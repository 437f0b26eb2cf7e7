"""The engine's surface, and privacy.md 15: what the optimizer no longer holds is noticed at the step."""

from __future__ import annotations

import dataclasses
import fcntl
import inspect
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpkernels
from dpkernels.nn import LinearRecord, RowError
from dpkernels.privacy import LedgerError, PrivacyEngine
from dpkernels.privacy import engine as engine_module
from dpkernels.privacy.accounting import budget as budget_module
from dpkernels.privacy.accounting import ledger as ledger_module
from dpkernels.privacy.guards.model import ModelGuard
from dpkernels.privacy.keywords import REFUSALS
from dpkernels.privacy.setup import RunArguments
from dpkernels.privacy.step import strategies as strategies_module
from tests.privacy.private_run import Net, Run, losses_of, private_run, train
from tests.warned import no_warnings


def parts(**changes: object) -> dict:
    """Arguments of make_private, with changes."""
    data = TensorDataset(torch.randn(20, 4, 6), torch.zeros(20, dtype=torch.long))
    model = changes.pop("module", None) or Net()
    assert isinstance(model, nn.Module)
    arguments: dict = {
        "module": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "data_loader": DataLoader(data, batch_size=5),
        "noise_multiplier": 1.0,
        "max_grad_norm": 1.0,
    }
    return arguments | changes


FORTY = DataLoader(TensorDataset(torch.randn(40, 4, 6), torch.zeros(40, dtype=torch.long)), batch_size=8)


# --- what make_private refuses, in its order


def test_batch_norm_in_training_is_refused_by_name_with_the_mend() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match=r": '1'\..*freeze_batch_norm"):
        PrivacyEngine().make_private(**parts(module=model))
    frozen = dpkernels.nn.freeze_batch_norm(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)))
    PrivacyEngine().make_private(**parts(module=frozen))


def test_batch_norm_switched_to_training_later_is_refused_too() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 4)
            self.norm = nn.BatchNorm1d(4, affine=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.inner(x).mean(1))

    model = Normed()
    model.norm.eval()
    run = private_run(model=model)
    run.release((0, 1, 2))
    run.optimizer.begin_logical_batch(3)
    losses = run.loss_fn(run.model, run.data[[0, 1, 2]])
    run.model.train()
    with pytest.raises(RuntimeError, match="norm"):  # of the backward
        run.optimizer.backward(losses)
    run.model.eval()
    run.optimizer.backward(losses)
    run.model.train()
    with pytest.raises(RuntimeError, match="norm"):  # of the step
        run.optimizer.step()
    assert run.engine.steps == 1


def test_a_trained_parameter_outside_the_optimizer_is_refused_by_name() -> None:
    model = Net()
    with pytest.raises(ValueError, match=r"'last\.weight', 'last\.bias'"):
        PrivacyEngine().make_private(
            **parts(
                module=model,
                optimizer=torch.optim.SGD(
                    [*model.first.parameters(), *model.norm.parameters(), *model.unused.parameters()], lr=0.1
                ),
            )
        )


def test_foreign_parameters_in_the_optimizer_are_refused() -> None:
    model = Net()
    optimizer = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(3))], lr=0.1)
    with pytest.raises(ValueError, match="not the module's"):
        PrivacyEngine().make_private(**parts(module=model, optimizer=optimizer))


@pytest.mark.parametrize(
    ("keyword", "value", "reason"),
    [
        ("strategy", "two-pass", "'two_pass'"),
        ("strategy", "ghost", "'bookkeeping'"),
        ("noise_generator", torch.Generator(), "cryptographic"),
        ("poisson_sampling", False, "max_batch_size"),
        ("loss_reduction", "sum", "learning rate"),
        ("criterion", nn.CrossEntropyLoss(), "reduction='none'"),
        ("batch_first", False, "transpose"),
        ("grad_sample_mode", "hooks", "never materialised"),
        ("wrap_model", True, "in place"),
        ("rand_on_empty", True, "step"),
        ("physical_batch_size", 0, "physical_batch_size"),
        ("steps", 0, "steps"),
        ("max_padded_frames", 100, "needs lengths"),
        ("lengths", [1, 2], "lengths"),
        ("noise_multiplier", -1.0, "noise_multiplier"),
        (
            "target_epsilon",
            1.0,
            r"target_epsilon=1\.0 needs target_delta, got .*; give one well below 1/N = 0\.05",
        ),
    ],
)
def test_keywords_that_do_not_hold_are_refused_with_the_reason(
    keyword: str, value: object, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason) as refusal:
        PrivacyEngine().make_private(**parts(**{keyword: value}))
    assert keyword in str(refusal.value)


def test_keywords_of_the_same_meaning_are_accepted() -> None:
    PrivacyEngine(secure_mode=True).make_private(
        **parts(
            poisson_sampling=True,
            clipping="flat",
            noise_generator=None,
            loss_reduction="mean",
            batch_first=True,
            grad_sample_mode="ghost",
            wrap_model=False,
            rand_on_empty=False,
            criterion=None,
            strategy="bookkeeping",
        )
    )


def test_every_keyword_of_opacus_is_known_and_documented() -> None:
    opacus = pytest.importorskip("opacus", reason="opacus is installed with the [bench] extra only")

    theirs = set(inspect.signature(opacus.PrivacyEngine.make_private).parameters) - {"self", "kwargs"}
    ours = set(inspect.signature(PrivacyEngine.make_private).parameters)
    assert theirs <= ours
    assert all(name in (PrivacyEngine.make_private.__doc__ or "") for name in theirs)
    assert set(inspect.signature(opacus.PrivacyEngine.__init__).parameters) <= set(
        inspect.signature(PrivacyEngine.__init__).parameters
    )


def test_every_argument_is_carried_or_checked() -> None:
    """make_private's arguments are those of the run, and Opacus's that take one value."""
    carried = {field.name for field in dataclasses.fields(RunArguments)}
    checked = REFUSALS.keys() - {"secure_mode"}
    assert carried.isdisjoint(checked)
    given = set(inspect.signature(PrivacyEngine.make_private).parameters) - {
        "self",
        "physical_frames",
    }  # an old name
    assert given == carried | checked | {"process_group"}


def test_other_engine_arguments_are_refused() -> None:
    for wrong in ({"accountant": "prv"}, {"accountant": "gdp"}, {"accountant": "x"}, {"secure_mode": False}):
        with pytest.raises(ValueError, match=r"'pld'|secure_mode"):
            PrivacyEngine(**wrong)


def test_one_engine_serves_one_run() -> None:
    run = private_run()
    with pytest.raises(RuntimeError, match="new PrivacyEngine"):
        run.engine.make_private(**parts())
    with pytest.raises(RuntimeError, match="make_private"):
        PrivacyEngine().get_epsilon(1e-5)


def test_a_refused_make_private_leaves_the_model_ordinary(tmp_path: object) -> None:
    model = Net()
    bad = tmp_path / "notes"  # type: ignore[operator]
    bad.write_text("not a ledger")
    with pytest.raises(ValueError, match="ledger"):
        PrivacyEngine(ledger=bad).make_private(**parts(module=model))
    PrivacyEngine().make_private(**parts(module=model))


def check_late_failure_leaves_all_usable(point: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What make_private calls last fails; then plain training, this engine and another, on one ledger."""

    def broken(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("planted")

    made = parts()
    model, plain = made["module"], made["optimizer"]
    engine = PrivacyEngine(ledger=path)
    with monkeypatch.context() as patched:
        owner, name = POINTS[point]
        patched.setattr(owner, name, property(broken) if name == "mechanism" else broken)
        with pytest.raises(RuntimeError, match="planted") as failure:
            engine.make_private(**made)
    assert not any(getattr(module, "ghost_tape", None) for module in model.modules()), "a tape is attached"
    assert is_free(path), "the ledger is in use"  # for other processes; this one would take it over
    losses_of(model, made["data_loader"].dataset[:]).sum().backward()
    plain.step()
    plain.zero_grad()
    with pytest.raises(RuntimeError, match="make_private"):
        engine.get_epsilon(1e-3)
    *_, optimizer, _ = engine.make_private(**made)
    optimizer.step()
    assert engine.steps == 1
    engine.close()
    again = private_run(ledger=path, examples=20)
    assert again.engine.steps == 1
    again.engine.close()
    del failure  # until here it held the frames of the call, and what they hold


def is_free(path: Path) -> bool:
    """Whether no open file holds a ledger's lock."""
    with path.open("ab") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


POINTS: dict[str, tuple[object, str]] = {
    "the ledger": (budget_module, "Ledger"),
    "what the ledger holds": (ledger_module.Run, "mechanism"),
    "the run line": (engine_module, "run_settings"),
    "the strategy": (engine_module, "strategy_of"),
    "the optimizer": (engine_module, "DPOptimizer"),
    "the sampler": (engine_module, "sampler_of"),
    "the loader": (engine_module, "DPDataLoader"),
    "a log handler": (engine_module.logger, "info"),
    "the generators": (engine_module, "SecretSeeds"),
    "the report": (PrivacyEngine, "_report_steps_before"),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_late_failure_leaves_model_optimizer_and_ledger_usable(
    point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if point == "what the ledger holds":
        private_run(ledger=tmp_path / "l", examples=20).engine.close()
    check_late_failure_leaves_all_usable(point, tmp_path / "l", monkeypatch)


def test_a_second_engine_leaves_the_first_ones_model_attached(tmp_path: Path) -> None:
    run = private_run()
    arguments = parts(module=run.model, optimizer=run.optimizer.original_optimizer)
    with pytest.raises(RuntimeError, match="a tape is attached"):
        PrivacyEngine(ledger=tmp_path / "l").make_private(**arguments)
    run.release((0, 1))


@pytest.mark.parametrize(("planted", "seen"), [("detach", "a tape is attached"), ("close", "in use")])
def test_planted_half_cleanup_is_caught(
    planted: str, seen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as faulty:
        if planted == "detach":
            faulty.setattr(engine_module, "detach", lambda module: None)
        else:
            faulty.setattr(budget_module.Budget, "close", lambda self: None)
        with pytest.raises((AssertionError, LedgerError), match=seen):
            check_late_failure_leaves_all_usable("the loader", tmp_path / "l", monkeypatch)


@pytest.mark.parametrize("wrap", [nn.DataParallel])
def test_wrapped_models_are_refused(wrap: Callable) -> None:
    with pytest.raises(ValueError, match="DataParallel"):
        PrivacyEngine().make_private(**parts(module=wrap(Net())))


def test_lbfgs_and_closures_are_refused() -> None:
    model = Net()
    with pytest.raises(ValueError, match="LBFGS"):
        PrivacyEngine().make_private(**parts(module=model, optimizer=torch.optim.LBFGS(model.parameters())))
    with pytest.raises(TypeError, match="closure"):
        private_run().optimizer.step(lambda: 0.0)  # type: ignore[arg-type]


# --- the loop


def test_training_learns_and_counts() -> None:
    run = private_run(sigma=0.05, lr=0.5, batch_size=20, physical_batch_size=7)
    before = losses_of(run.model, run.data[:]).mean().item()
    for _ in range(8):
        train(run)
    assert losses_of(run.model, run.data[:]).mean().item() < before
    assert run.engine.steps == 16


def test_schedulers_and_state_dict_work() -> None:
    torch.manual_seed(0)
    model = Net()
    made = PrivacyEngine().make_private(
        **parts(module=model, optimizer=torch.optim.Adam(model.parameters(), lr=0.1))
    )
    optimizer = made[1]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    with no_warnings("no self_check"):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05 == optimizer.original_optimizer.param_groups[0]["lr"]
    state = optimizer.state_dict()
    assert len(state["state"]) == len(list(model.parameters()))
    optimizer.load_state_dict(state)
    optimizer.step()
    assert optimizer.state[model.last.weight]["step"] == 2
    assert isinstance(optimizer, torch.optim.Optimizer)
    with pytest.raises(RuntimeError, match="before make_private"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def test_one_step_for_every_logical_batch() -> None:
    run = private_run()
    batches = iter(run.loader)
    next(batches)
    with pytest.raises(RuntimeError, match="also for an empty one"):
        next(batches)
    run = private_run()
    for logical in run.loader:
        for batch in logical:
            run.optimizer.backward(run.loss_fn(run.model, batch))
        break
    with pytest.raises(RuntimeError, match="step"):
        next(iter(run.loader))
    run.optimizer.step()
    assert train(run) == 5


def test_a_batch_processed_twice_is_refused() -> None:
    run = private_run()
    run.optimizer.begin_logical_batch(3)
    run.optimizer.backward(run.loss_fn(run.model, run.data[[0, 1, 2]]))
    with pytest.raises(RuntimeError, match="processed twice"):
        run.optimizer.backward(run.loss_fn(run.model, run.data[[0]]))
    run.optimizer.zero_grad()
    run.optimizer.backward(run.loss_fn(run.model, run.data[[0, 1, 2]]))
    run.optimizer.step()


def test_more_losses_than_examples_are_counted_in_the_error() -> None:
    run = private_run()
    run.optimizer.begin_logical_batch(3)
    losses = run.loss_fn(run.model, run.data[[0, 1, 2]])
    with pytest.raises(
        RuntimeError, match="losses of 4, after 0 that were processed, in a logical batch of 3"
    ):
        run.optimizer.backward(torch.cat([losses, losses[:1]]))
    run.optimizer.zero_grad()
    run.begin(7)
    losses = run.loss_fn(run.model, run.data[[0, 1, 2]])
    with pytest.raises(RowError, match="rows of its output gradient"):  # 4 is its time, too
        run.optimizer.backward(torch.cat([losses, losses[:1]]))


def test_zero_grad_drops_an_unfinished_batch() -> None:
    run = private_run(sigma=0)
    run.optimizer.begin_logical_batch(3)
    run.optimizer.backward(run.loss_fn(run.model, run.data[[0, 1, 2]]))
    run.optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.optimizer.step()
    assert float(run.model.last.weight.grad.abs().max()) == 0


def test_nothing_of_a_batch_is_left_after_its_step() -> None:
    run = private_run(sigma=0)
    first = run.release((0, 1, 2))
    assert float(first["last.weight"].abs().max()) > 0
    assert float(run.release(())["last.weight"].abs().max()) == 0


@pytest.mark.parametrize("unfused", [False, True], ids=["fused", "unfused"])
def test_no_noise_is_left_in_the_sums(unfused: bool) -> None:
    run = private_run(sigma=1.0, unfused=unfused)
    for parts in ((0, 1),), (), ((2,), (3,)):
        run.release(*parts)
        assert all(not total.any() for total in run.optimizer._batch.sums.values())


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_frees_the_released_gradients(set_to_none: bool) -> None:
    run = private_run()
    run.optimizer.step()
    released = weakref.ref(run.model.last.weight.grad)
    assert released() is not None
    run.optimizer.zero_grad(set_to_none)
    assert released() is None
    run.release((0, 1))  # whose backward finds no gradient from elsewhere


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_released_gradient_is_no_view_of_the_sums(dtype: torch.dtype) -> None:
    run = private_run(sigma=0.5, dtype=dtype)
    run.optimizer.begin_logical_batch(2)
    run.optimizer.backward(run.loss_fn(run.model, run.data[[0, 1]]))
    run.optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in run.model.parameters())


def test_without_zero_grad_the_next_step_is_still_its_own() -> None:
    run = private_run(sigma=0)
    run.optimizer.begin_logical_batch(3)
    run.optimizer.backward(run.loss_fn(run.model, run.data[[0, 1, 2]]))
    run.optimizer.step()
    expected = run.release((3, 4))  # its backward finds the released gradient of the step before
    torch.testing.assert_close(expected["last.weight"], run.release((3, 4))["last.weight"])


def test_a_gradient_from_elsewhere_is_refused() -> None:
    run = private_run()
    run.model.last.weight.grad = torch.ones_like(run.model.last.weight)
    with pytest.raises(RuntimeError, match=r"'last\.weight\.grad' is set"):
        run.release((0, 1))


def fail_in_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise MemoryError("out of memory")

    monkeypatch.setattr(strategies_module, "total_norm_sq", broken)


def fail_in_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise MemoryError("out of memory")

    monkeypatch.setattr(LinearRecord, "share", lambda self: None)  # alone, not in the call for all
    monkeypatch.setattr(LinearRecord, "add_weighted_sum", broken)


def test_a_failed_backward_leaves_the_sums_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    run = private_run(sigma=0)
    total = run.release((0, 1, 2, 3))
    run.optimizer.begin_logical_batch(4)
    run.optimizer.backward(run.loss_fn(run.model, run.data[[0, 1]]))
    losses = run.loss_fn(run.model, run.data[[2, 3]])
    with monkeypatch.context() as broken:
        fail_in_norms(broken)
        with pytest.raises(MemoryError):
            run.optimizer.backward(losses)
    for index in (2, 3):  # smaller micro-batches fit
        run.optimizer.backward(run.loss_fn(run.model, run.data[[index]]))
    run.optimizer.step()
    torch.testing.assert_close(
        run.model.last.weight.grad.double(), total["last.weight"], rtol=1e-5, atol=1e-8
    )


def test_a_backward_that_fails_within_its_sums_invalidates_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    run = private_run()
    run.optimizer.begin_logical_batch(4)
    losses = run.loss_fn(run.model, run.data[[0, 1]])
    with monkeypatch.context() as broken:
        fail_in_sum(broken)
        with pytest.raises(MemoryError):
            run.optimizer.backward(losses)
    for call in (run.optimizer.step, lambda: run.optimizer.backward(run.loss_fn(run.model, run.data[[2]]))):
        with pytest.raises(RuntimeError, match="zero_grad"):
            call()
    assert run.engine.steps == 0
    run.optimizer.zero_grad()
    run.optimizer.backward(run.loss_fn(run.model, run.data[[0, 1, 2, 3]]))
    run.optimizer.step()


def test_frozen_parameters_are_left_alone() -> None:
    model = Net()
    model.first.requires_grad_(False)
    frozen = model.first.weight.clone()
    run = private_run(model=model, lr=1.0)
    train(run)
    assert run.model.first.weight.equal(frozen)
    assert run.model.first.weight.grad is None


def test_an_empty_micro_batch_is_allowed() -> None:
    run = private_run(sigma=0)
    run.optimizer.begin_logical_batch(0)
    run.optimizer.backward(torch.zeros(0))
    run.optimizer.step()


# --- 15: the trained parameters are those of make_private, at every step


def replaced(run: Run) -> None:
    run.model.last.weight = nn.Parameter(run.model.last.weight.detach().clone())


def frozen_later(run: Run) -> None:
    run.model.last.weight.requires_grad_(False)


def dropped_from_group(run: Run) -> None:
    group = run.optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if p is not run.model.last.weight]


def added(run: Run) -> None:
    run.model.extra = nn.Linear(2, 2)


CHANGES = [replaced, frozen_later, dropped_from_group, added]


def check_change_is_noticed(change: Callable[[Run], None]) -> None:
    run = private_run(lr=1.0)
    run.release((0, 1))
    change(run)
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    noticed = False
    try:
        run.optimizer.step()
    except RuntimeError as error:
        noticed = "last.weight" in str(error) or "extra.weight" in str(error)
    assert noticed, "the change went unnoticed"
    assert run.engine.steps == 1
    assert all(p.equal(before[name]) for name, p in run.model.named_parameters())


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_parameter_is_noticed_by_name(change: Callable[[Run], None]) -> None:
    check_change_is_noticed(change)


@pytest.mark.parametrize("change", CHANGES)
def test_planted_missing_check_of_parameters_is_caught(
    change: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelGuard, "_check_parameters", lambda self, now: None)
    with pytest.raises(AssertionError):
        check_change_is_noticed(change)


def test_moving_the_model_in_place_is_fine() -> None:
    """`.to` keeps the parameters and gives them other memory: here of another dtype, as a device would."""
    run = private_run(sigma=0, clip=0.5)
    run.release((0, 1))
    places = [p.data_ptr() for p in run.model.parameters()]
    run.model.to(torch.float64)
    run.data.tensors = (run.data.tensors[0].double(), run.data.tensors[1])
    assert places != [p.data_ptr() for p in run.model.parameters()]
    expected = run.clipped_sum((0, 1, 2))
    for name, released in run.release((0, 1), (2,)).items():
        torch.testing.assert_close(released * 8, expected[name], rtol=1e-4, atol=1e-9)


def test_a_ledger_that_is_full_is_said(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    first = private_run(ledger=path, steps=2)
    assert train(first) == 2
    first.engine.close()
    with pytest.warns(UserWarning, match=r"already holds 2 steps, and steps=2: the loader is empty"):
        again = private_run(ledger=path, steps=2)
    assert train(again) == 0
    again.engine.close()
    with pytest.warns(UserWarning, match=r"holds 2 steps|nothing is private") as said:
        PrivacyEngine(ledger=path).make_private(**parts(noise_multiplier=0.0, steps=2, data_loader=FORTY))
    assert [warning.filename for warning in said] == [__file__] * 2  # where make_private was called
