"""privacy.md 11, the accounting: dp-accounting's figures, the right event, σ rounded up, stops at the
target."""

from __future__ import annotations

import math

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from dpkernels.privacy import BudgetExhausted, epsilon, noise_multiplier
from dpkernels.privacy.accounting import accountant as accounting
from dpkernels.privacy.accounting import budget as budget_module
from dpkernels.privacy.accounting.accountant import Mechanism, composed_epsilon
from tests.privacy.private_run import private_run, train
from tests.warned import no_warnings

PAPER = {"sample_rate": 4096 / 281_241, "steps": 2000}


def reference_epsilon(*parts: tuple[Mechanism, int], delta: float, rdp: bool = False) -> float:
    """dp-accounting asked directly."""
    accountant = RdpAccountant() if rdp else PLDAccountant()
    for mechanism, steps in parts:
        if mechanism.max_batch_size is None:
            gaussian = dp_accounting.GaussianDpEvent(mechanism.noise_multiplier)
            event = dp_accounting.PoissonSampledDpEvent(mechanism.sample_rate, gaussian)
        else:
            event = dp_accounting.TruncatedSubsampledGaussianDpEvent(
                (mechanism.dataset_size or 0) + 1,  # see test_truncated_poisson_covers_adding_a_unit_too
                mechanism.sample_rate,
                mechanism.max_batch_size,
                mechanism.noise_multiplier,
            )
        accountant.compose(event, steps)
    return accountant.get_epsilon(delta)


def test_epsilon_is_dp_accountings() -> None:
    first, second = Mechanism(0.05, 4.0), Mechanism(0.1, 6.0)
    delta = 1e-5
    assert composed_epsilon([(first, 50)], delta) == pytest.approx(
        reference_epsilon((first, 50), delta=delta), rel=1e-9
    )
    both = composed_epsilon([(first, 50), (second, 7), (first, 0)], delta)
    assert both == pytest.approx(reference_epsilon((first, 50), (second, 7), delta=delta), rel=1e-6)
    by_rdp = composed_epsilon([(first, 50)], delta, accountant="rdp")
    assert by_rdp == pytest.approx(reference_epsilon((first, 50), delta=delta, rdp=True), rel=1e-9)
    assert composed_epsilon([(first, 50)], delta) < by_rdp


def test_truncated_poisson_has_its_own_event() -> None:
    mechanism = Mechanism(0.1, 6.0, dataset_size=200, max_batch_size=24)
    value = composed_epsilon([(mechanism, 20)], 1e-5)
    assert value == pytest.approx(reference_epsilon((mechanism, 20), delta=1e-5), rel=1e-9)
    assert value > composed_epsilon([(Mechanism(0.1, 6.0), 20)], 1e-5)  # what plain Poisson would say
    with pytest.raises(ValueError, match="truncated"):
        composed_epsilon([(mechanism, 20)], 1e-5, accountant="rdp")
    with pytest.raises(ValueError, match="dataset_size"):
        Mechanism(0.1, 2.0, max_batch_size=24)


def test_truncated_poisson_covers_adding_a_unit_too() -> None:
    """dp-accounting's event of N has the unit among the N: what adds one to N is the event of N + 1."""
    mechanism = Mechanism(0.2, 4.0, dataset_size=50, max_batch_size=10)
    spent = {}
    for size in (50, 51):
        accountant = PLDAccountant()
        accountant.compose(dp_accounting.TruncatedSubsampledGaussianDpEvent(size, 0.2, 10, 4.0), 20)
        spent[size] = accountant.get_epsilon(1e-5)
    assert spent[51] > 1.001 * spent[50]
    assert composed_epsilon([(mechanism, 20)], 1e-5) == pytest.approx(spent[51], rel=1e-9)


def test_history_of_the_engine_is_the_event_that_ran() -> None:
    run = private_run(sigma=6.0, examples=40, batch_size=8)
    train(run, 3)
    (mechanism, steps) = run.engine.history[0]
    assert (mechanism.sample_rate, mechanism.noise_multiplier, steps) == (0.2, 6.0, 3)
    assert run.engine.get_epsilon(1e-3) == pytest.approx(
        reference_epsilon((Mechanism(0.2, 6.0), 3), delta=1e-3)
    )
    assert accounting.ADJACENCY == dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE


def test_the_curve_and_no_noise() -> None:
    curve = epsilon(4.0, 0.05, [0, 1, 10, 100], 1e-5)
    assert curve[0] == 0
    assert curve == sorted(curve)
    assert curve[2] == epsilon(4.0, 0.05, 10, 1e-5)
    assert epsilon(0.0, 0.05, 10, 1e-5) == math.inf


def test_noise_multiplier_zero_reports_infinity_and_warns() -> None:
    with pytest.warns(UserWarning, match="ε = ∞"):
        run = _unwrapped_run()
    train(run, 1)
    assert run.engine.get_epsilon(1e-3) == math.inf


def _unwrapped_run() -> object:
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from dpkernels.privacy import PrivacyEngine
    from tests.privacy.private_run import Net, Run, losses_of

    engine, model = PrivacyEngine(), Net()
    data = TensorDataset(torch.randn(20, 4, 6), torch.zeros(20, dtype=torch.long))
    made = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=5),
        noise_multiplier=0,
        max_grad_norm=1.0,
    )
    return Run(*made, engine, data, losses_of)


# --- σ for a target


def check_sigma(sigma: float, target: float, delta: float, sample_rate: float, steps: int) -> None:
    """σ is on the grid, reaches the target, and 0.001 less would not."""
    assert sigma == pytest.approx(round(sigma, 3), abs=1e-12)
    assert reference_epsilon((Mechanism(sample_rate, sigma), steps), delta=delta) <= target, "σ rounded down"
    assert reference_epsilon((Mechanism(sample_rate, sigma - 0.001), steps), delta=delta) > target, (
        "σ wasteful"
    )


@pytest.mark.parametrize(("target", "sample_rate", "steps"), [(1.0, 0.05, 100), (0.5, 0.1, 50)])
def test_sigma_reaches_the_target_and_is_rounded_up(target: float, sample_rate: float, steps: int) -> None:
    check_sigma(noise_multiplier(target, 1e-5, sample_rate, steps), target, 1e-5, sample_rate, steps)


def test_planted_sigma_rounded_down_is_caught() -> None:
    sigma = noise_multiplier(1.0, 1e-5, 0.05, 100)
    with pytest.raises(AssertionError):
        check_sigma(sigma - 0.001, 1.0, 1e-5, 0.05, 100)


def test_sigma_of_the_papers_setting() -> None:
    sigma = noise_multiplier(10, 3.52e-6, **PAPER, dataset_size=281_241)
    assert sigma == 0.694
    assert epsilon(sigma, delta=3.52e-6, **PAPER) <= 10


def test_sigma_by_rdp_is_larger() -> None:
    by_rdp = noise_multiplier(1.0, 1e-5, 0.05, 100, accountant="rdp")
    assert epsilon(by_rdp, 0.05, 100, 1e-5, accountant="rdp") <= 1.0
    assert by_rdp > noise_multiplier(1.0, 1e-5, 0.05, 100)


def test_arguments_out_of_range() -> None:
    for call in (
        lambda: noise_multiplier(0, 1e-5, 0.1, 10),
        lambda: noise_multiplier(1, 0, 0.1, 10),
        lambda: noise_multiplier(1, 1e-5, 0, 10),
        lambda: noise_multiplier(1, 1e-5, 0.1, 0),
        lambda: noise_multiplier(1, 1e-5, 0.1, 10, accountant="prv"),
        lambda: epsilon(-1.0, 0.1, 10, 1e-5),
        lambda: epsilon(1.0, 0.1, -1, 1e-5),
        lambda: epsilon(1.0, 0.1, 10, 1.0),
    ):
        with pytest.raises(ValueError, match=r"must|expected|use"):
            call()


def test_delta_of_one_over_n_warns() -> None:
    with pytest.warns(UserWarning, match=r">= 1/N .*one record outright"):
        epsilon(2.0, 0.1, 1, 1 / 40, dataset_size=40)
    run = private_run()
    with pytest.warns(UserWarning, match=r">= 1/N .*one record outright"):
        run.engine.get_epsilon(0.05)
    with pytest.warns(
        UserWarning, match=r"delta=0\.0225 is close to 1/N .*probability of 60%.*at most 0\.1/N"
    ):
        epsilon(2.0, 0.1, 1, 0.9 / 40, dataset_size=40)
    with no_warnings():
        epsilon(2.0, 0.1, 1, 0.1 / 40, dataset_size=40)


def test_a_delta_that_needs_no_noise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each record is drawn with a smaller probability: dp-accounting finds no σ that is just large enough."""

    class SearchedError(Exception):
        pass

    def search(*_: object) -> float:
        raise SearchedError

    monkeypatch.setattr(accounting, "_calibrate", search)
    drawn = 1 - 0.95**10
    with pytest.raises(ValueError, match=r"target_delta=0\.5 must be below 0\.401, the probability"):
        noise_multiplier(8, 0.5, 0.05, 10)
    with pytest.raises(ValueError, match="must be below"):
        noise_multiplier(8, drawn, 0.05, 10)
    with pytest.raises(SearchedError):
        noise_multiplier(8, 0.9 * drawn, 0.05, 10)


# --- stopping at the target


def check_stop(run: object, target: float, delta: float) -> None:
    """The run stops by itself, within the target, and not a step early."""
    taken, stopped = 0, False
    while not stopped and taken < 60:
        try:
            run.release(())  # type: ignore[attr-defined]
            taken += 1
        except BudgetExhausted as error:
            stopped = "target_epsilon" in str(error)
    assert stopped, "never stopped"
    mechanism = run.engine.history[0][0]  # type: ignore[attr-defined]
    assert run.engine.steps == taken  # type: ignore[attr-defined]
    assert reference_epsilon((mechanism, taken), delta=delta) <= target, "passed the target"
    assert reference_epsilon((mechanism, taken + 1), delta=delta) > target, "stopped early"


def test_step_stops_before_it_would_pass_the_target() -> None:
    check_stop(private_run(sigma=6.0, target_epsilon=0.5, target_delta=1e-3), 0.5, 1e-3)


def test_planted_stop_after_the_target_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = budget_module.Budget._fits
    monkeypatch.setattr(budget_module.Budget, "_fits", lambda self, steps: original(self, max(steps - 1, 1)))
    with pytest.raises(AssertionError):
        check_stop(private_run(sigma=6.0, target_epsilon=0.5, target_delta=1e-3), 0.5, 1e-3)


def test_an_exhausted_step_changes_nothing() -> None:
    run = private_run(sigma=6.0, target_epsilon=0.001, target_delta=1e-3, lr=1.0)
    before = run.model.last.weight.clone()
    with pytest.raises(BudgetExhausted):
        run.release(())
    assert run.engine.steps == 0
    assert run.engine.get_epsilon() == 0
    assert run.model.last.weight.equal(before)


@pytest.mark.slow
def test_make_private_with_epsilon_spends_the_whole_budget() -> None:
    run = private_run_with_epsilon(steps=6)
    assert train(run) == 6
    assert 0.49 < run.engine.get_epsilon() <= 0.5
    by_epochs = private_run_with_epsilon(epochs=2)
    assert len(by_epochs.loader) == 5
    assert by_epochs.engine.noise_multiplier == noise_multiplier(0.5, 1e-3, 0.2, 10)


def private_run_with_epsilon(**arguments: object) -> object:
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from dpkernels.privacy import PrivacyEngine
    from tests.privacy.private_run import Net, Run, losses_of

    engine, model = PrivacyEngine(), Net()
    data = TensorDataset(torch.randn(40, 4, 6), torch.zeros(40, dtype=torch.long))
    made = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=8),
        target_epsilon=0.5,
        target_delta=1e-3,
        max_grad_norm=1.0,
        **arguments,  # type: ignore[arg-type]
    )
    return Run(*made, engine, data, losses_of)


def test_make_private_with_epsilon_wants_one_length() -> None:
    for wrong in ({}, {"steps": 3, "epochs": 1}, {"steps": 0}):
        with pytest.raises(ValueError, match=r"epochs"):
            private_run_with_epsilon(**wrong)
    with pytest.raises(TypeError, match="noise_multiplier"):
        private_run_with_epsilon(steps=3, noise_multiplier=1.0)


def test_asking_again_is_answered_from_the_cache() -> None:
    history = [(Mechanism(0.07, 5.0), 33)]
    composed_epsilon(history, 1e-5)
    before = accounting._composed_epsilon.cache_info().hits, accounting._single_step.cache_info().misses
    composed_epsilon(history, 1e-5)
    composed_epsilon([(Mechanism(0.07, 5.0), 34)], 1e-5)
    after = accounting._composed_epsilon.cache_info().hits, accounting._single_step.cache_info().misses
    assert after == (before[0] + 1, before[1])


def test_a_target_that_is_no_number_is_named() -> None:
    with pytest.raises(TypeError, match="target_epsilon must be a number, got '8'"):
        noise_multiplier("8", 1e-5, 0.1, 10)  # type: ignore[arg-type]
