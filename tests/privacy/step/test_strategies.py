"""privacy.md 1, 3, 5, 6, 13 under every strategy: the same clipped sums, whatever is held, and however often it is
back-propagated."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dpkernels import ops
from dpkernels.nn import Choice, Record, RowCheck, RowError, Tape, tensors
from dpkernels.privacy import PrivacyEngine
from dpkernels.privacy.step import strategies
from dpkernels.privacy.step.clipping import rounding_slack
from dpkernels.privacy.step.strategies import Clipped, PerLayer, TwoPass
from dpkernels.privacy.step.sums import BatchSums
from tests.privacy.private_run import Net, Run, losses_of, private_run, train
from tests.privacy.strategy_models import (
    BOUND,
    INDICES,
    KINDS,
    Exploding,
    added,
    auto_materialises,
    backward_alone,
    check_sum,
    excess,
    gradients_one_by_one,
    one,
    run_of,
    small,
)
from tests.slow import covering, slow_cases

STRATEGIES = ("bookkeeping", "mixed", "two_pass", "per_layer", "auto")
both_ways = pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])


@pytest.fixture(autouse=True)
def auto_materialises_small_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    auto_materialises(monkeypatch)


def way(value: Any) -> str | None:
    """The id of `checkpointed` among other values."""
    return {False: "plain", True: "checkpointed"}[value] if isinstance(value, bool) else None


# --- 1, 3, 6: the clipped sum of one-by-one gradients


@pytest.mark.thinned(5)
@pytest.mark.parametrize(
    ("strategy", "kind", "checkpointed"),
    covering(STRATEGIES, KINDS, [False, True], also=[("two_pass", "tied", False)]),
    ids=way,
)
def test_every_strategy_sums_one_by_one_clipped_gradients(
    strategy: str, kind: str, checkpointed: bool
) -> None:
    check_sum(run_of(strategy, kind, checkpointed=checkpointed), strategy)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_second_step_uses_fresh_norms_in_every_strategy(strategy: str) -> None:
    run = run_of(strategy)
    run.release((10, 11, 12), (13, 14, 15, 16))
    check_sum(run, strategy)


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("strategy", "checkpointed"), covering(STRATEGIES, [False, True], together=1), ids=way
)
def test_a_half_precision_base_with_float32_adapters(strategy: str, checkpointed: bool) -> None:
    run = run_of(strategy, "lora", half=True, checkpointed=checkpointed)
    assert {p.dtype for p in run.model.parameters()} == {torch.bfloat16, torch.float32}
    check_sum(run, strategy, tolerance=0.1, each=False)
    assert 0.9 < excess(run) <= 1.0


@pytest.mark.thinned(5)
@pytest.mark.parametrize(
    ("strategy", "kind", "bound", "checkpointed"),
    covering(STRATEGIES, KINDS, [1e-3, 0.3], [False, True], also=[("per_layer", "full", 1e-3, False)]),
    ids=way,
)
def test_no_strategy_lets_an_example_add_more_than_the_norm(
    strategy: str, kind: str, bound: float, checkpointed: bool
) -> None:
    assert 0.5 < excess(run_of(strategy, kind, bound=bound, checkpointed=checkpointed)) <= 1.0


@pytest.mark.parametrize("kind", ["full", "tied", *slow_cases("lora", "reused")])
def test_two_passes_give_the_bits_of_bookkeeping(kind: str) -> None:
    """Where nothing is clipped, all bits. Else up to how the norm is rounded up: book-keeping takes one of all layers,
    two passes add up the layers'. Checkpointing changes no bit in either case."""
    for bound, tolerance in ((1e3, 0.0), (BOUND, 1e-5)):
        sums = {}
        for strategy in ("bookkeeping", "two_pass"):
            for checkpointed in (False, True):
                run = run_of(strategy, kind, bound=bound, checkpointed=checkpointed)
                released = run.release(INDICES[:3], INDICES[3:])
                sums[strategy, checkpointed] = torch.cat([part.flatten() for part in released.values()])
            assert torch.equal(sums[strategy, False], sums[strategy, True])
        first, second = sums["bookkeeping", False], sums["two_pass", False]
        assert float((first - second).norm()) <= tolerance * float(first.norm())


@pytest.mark.parametrize("strategy", ["bookkeeping", "two_pass"])
def test_statistics_are_those_of_the_whole_gradient(strategy: str) -> None:
    run = run_of(strategy)
    rows = gradients_one_by_one(run.model, losses_of, [one(run, i) for i in INDICES])
    norms = [math.sqrt(sum(float(part.square().sum()) for part in row.values())) for row in rows]
    run.release(INDICES)
    stats = run.optimizer.last_step
    assert stats is not None
    assert stats.mean_norm == pytest.approx(sum(norms) / len(norms), rel=1e-3)
    assert stats.clip_rate == sum(norm > BOUND for norm in norms) / len(norms)


# --- what is held


def most_held(run: Run, monkeypatch: pytest.MonkeyPatch) -> int:
    """The largest number of records that were alive when another was made."""
    alive: weakref.WeakSet[Record] = weakref.WeakSet()
    counts = []
    original = Tape.add

    def add(self: Tape, record: Record) -> None:
        counts.append(len(alive))
        alive.add(record)
        original(self, record)

    with monkeypatch.context() as patched:
        patched.setattr(Tape, "add", add)
        run.release(INDICES)
    return max(counts)


@both_ways
def test_streaming_strategies_hold_no_record(checkpointed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert most_held(run_of("bookkeeping", checkpointed=checkpointed), monkeypatch) > 20
    for strategy in ("two_pass", "per_layer"):
        # the weight's is alive while the bias's of the same layer is made
        assert most_held(run_of(strategy, checkpointed=checkpointed), monkeypatch) <= 1


def peak_bytes(strategy: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Peak of what torch's CPU allocator handed out in a checkpointed backward, beyond the forward's."""
    run = private_run(sigma=0, clip=BOUND, model=small("lora", checkpointed=True), strategy=strategy)
    x, y = run.data[list(INDICES)]
    losses = run.loss_fn(run.model, (x.repeat(4, 64, 1), y.repeat(4)))
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run.optimizer.backward(losses)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_streaming_takes_less_memory_than_bookkeeping_when_checkpointed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    book = peak_bytes("bookkeeping", monkeypatch)
    assert peak_bytes("two_pass", monkeypatch) < 0.8 * book
    assert peak_bytes("per_layer", monkeypatch) < 0.8 * book


@pytest.mark.slow
def test_each_backward_recomputes_each_checkpointed_block_once() -> None:
    for strategy, times in (("bookkeeping", 1), ("two_pass", 2), ("per_layer", 1)):
        run = run_of(strategy, checkpointed=True)
        for _ in range(5):  # with the row check's backward in each
            run.release(INDICES)
        calls: list[nn.Module] = []
        note = calls.append
        for block in run.model.blocks:
            block.register_forward_pre_hook(lambda module, _, note=note: note(module))
        run.release(INDICES)
        assert len(calls) == 2 * (1 + times)


# --- 13 and 3: the second backward need not repeat the first for the claim, and is refused where it does not


class Wobbly(torch.autograd.Function):
    """The identity, whose gradient is scaled by the next of `scales`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: list[float]) -> Tensor:
        ctx.scales = scales
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g * ctx.scales.pop(0), None


class Wobble(Net):
    """`Net` with a backward that differs from time to time below its last layer."""

    def __init__(self, scales: list[float]) -> None:
        super().__init__()
        self.scales = scales

    def forward(self, x: Tensor) -> Tensor:
        hidden = Wobbly.apply(self.norm(torch.tanh(self.first(x))), self.scales)
        return self.last(hidden).mean(1)


def wobbling(*scales: float) -> Run:
    return private_run(sigma=0, clip=0.05, model=Wobble(list(scales)), strategy="two_pass")


@pytest.mark.parametrize("second", [1.5, 0.5, float("nan"), float("inf"), 0.0])
def test_a_second_backward_unlike_the_first_is_refused(second: float) -> None:
    run = wobbling(1.0, second)
    with pytest.raises(RuntimeError, match="second backward"):
        backward_alone(run)
    with pytest.raises(RuntimeError, match="recover"):
        run.optimizer.step()
    assert run.optimizer.recover()
    run.model.scales += [1.0, 1.0]
    run.optimizer.backward(run.loss_fn(run.model, run.data[[0]]))
    assert 0 < added(run) <= run.optimizer.max_grad_norm


def test_other_dropout_masks_in_the_second_backward_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of("two_pass", dropout=0.5, checkpointed=True, keep_masks=False)
    with pytest.raises(RowError, match="preserve_rng_state"):
        run.release(INDICES)
    for checkpointed in (False, True):
        kept = run_of("two_pass", dropout=0.5, checkpointed=checkpointed)
        kept.release(INDICES)
        assert kept.optimizer.last_step.examples == len(INDICES)
    without = run_of("two_pass", dropout=0.5, checkpointed=True, keep_masks=False)
    monkeypatch.setattr(RowCheck, "due", lambda *_: False)
    with pytest.raises(RuntimeError, match=r"two_pass.*preserve_rng_state"):
        without.release(INDICES)


def test_both_passes_see_the_masks_of_the_forward() -> None:
    sums = []
    for strategy in ("bookkeeping", "two_pass"):
        for checkpointed in (False, True):
            run = run_of(strategy, "lora", dropout=0.5, checkpointed=checkpointed)
            torch.manual_seed(3)
            sums.append(torch.cat([part.flatten() for part in run.release(INDICES).values()]))
    for total in sums[1:]:
        torch.testing.assert_close(total, sums[0], rtol=1e-5, atol=1e-9)


def test_a_second_backward_that_only_rounds_otherwise_is_trimmed_not_refused() -> None:
    run = wobbling(1.0, 1 + 1e-3)
    backward_alone(run)
    assert 0.99 * run.optimizer.max_grad_norm < added(run) <= run.optimizer.max_grad_norm


def bounded_whatever_the_second_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "REPEAT_TOLERANCE", math.inf)
    for second in (1.0001, 1.5, 1e3, 1e30):
        run = wobbling(1.0, second)
        backward_alone(run)
        assert added(run) <= run.optimizer.max_grad_norm


def test_an_example_adds_at_most_c_whatever_the_second_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    bounded_whatever_the_second_backward(monkeypatch)


def test_planted_trust_in_a_repeatable_backward_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "factors_within", lambda factors, before, again: factors)
    with pytest.raises(AssertionError):
        bounded_whatever_the_second_backward(monkeypatch)


def test_planted_missing_comparison_lets_other_masks_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "REPEAT_TOLERANCE", math.inf)
    monkeypatch.setattr(RowCheck, "due", lambda *_: False)
    run_of("two_pass", dropout=0.5, checkpointed=True, keep_masks=False).release(INDICES)


def test_reduced_factors_never_exceed_what_the_first_pass_allows() -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.rand(20_000, generator=generator, dtype=torch.float64) * 10
    again = before * (1 + 4 * torch.rand(20_000, generator=generator, dtype=torch.float64) ** 8)
    factors = ops.clip_factors(before * 3, 0.7)
    within = tensors.factors_within(factors, before, again)
    assert bool((within.double() * again.sqrt() <= factors.double() * before.sqrt()).all())
    assert torch.equal(tensors.factors_within(factors, before, before), factors)
    assert tensors.factors_within(factors[:2], before[:2], torch.tensor([math.nan, math.inf])).tolist() == [
        0,
        0,
    ]


def test_reduced_factors_below_float32s_normal_numbers_are_rounded_down_too() -> None:
    """There the spacing of float32 is no longer a share of the factor."""
    generator = torch.Generator().manual_seed(1)
    again = torch.rand(20_000, generator=generator, dtype=torch.float64) + 0.5
    before = again * 10.0 ** (-86 - 8 * torch.rand(20_000, generator=generator, dtype=torch.float64))
    factors = torch.rand(20_000, generator=generator)
    within = tensors.factors_within(factors, before, again)
    assert int((within > 0).sum()) > 0
    assert float(within.max()) < 2.0**-126
    assert bool((within.double() * again.sqrt() <= factors.double() * before.sqrt()).all())


def test_a_second_backward_without_a_layer_of_the_first_is_refused() -> None:
    run = private_run(sigma=0, strategy="two_pass")
    original, calls = Tape.add, []

    def add(self: Tape, record: Record) -> None:
        calls.append(record.layer)
        if (
            calls.count("first") <= 2 or record.layer != "first"
        ):  # its weight's and its bias's, in one backward
            original(self, record)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Tape, "add", add)
        with pytest.raises(RuntimeError, match="second backward"):
            backward_alone(run)


# --- planted faults of the sums


def factor_twice(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(strategies, "factors_within", lambda factors, before, again: factors * factors)


def stale_factors(patched: pytest.MonkeyPatch) -> None:
    real, first = ops.clip_factors, []

    def stale(norm_sq: Tensor, bound: float) -> Tensor:
        first.append(real(norm_sq, bound))
        return next(old for old in first if old.shape == norm_sq.shape)

    patched.setattr(ops, "clip_factors", stale)


def summed_in_both(patched: pytest.MonkeyPatch) -> None:
    real = TwoPass.backward

    def backward(self: TwoPass, losses: Tensor, add: Callable, check: Callable, unit: int = 1) -> Clipped:
        stream = self._stream

        def summing(losses: Tensor, take: Callable, unit: int, *, again: bool = False) -> None:
            def first_too(record: Record) -> None:
                add([record], torch.ones(len(losses)))
                take(record)

            stream(losses, first_too if again else take, unit, again=again)

        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(self, "_stream", summing)
            return real(self, losses, add, check, unit)

    patched.setattr(TwoPass, "backward", backward)


def twice_in_one(patched: pytest.MonkeyPatch) -> None:
    real = BatchSums.add
    patched.setattr(
        BatchSums,
        "add",
        lambda self, records, factors: (real(self, records, factors), real(self, records, factors)),
    )


def check_fault_is_caught(strategy: str, fault: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(strategy)
    check_sum(run, strategy)
    fault(monkeypatch)
    run.release((10, 11, 12), (13, 14, 15, 16))  # whose factors are stale afterwards
    with pytest.raises(AssertionError):
        check_sum(run, strategy)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("fault", [factor_twice, stale_factors, summed_in_both, twice_in_one])
def test_planted_faults_of_two_passes_are_caught(fault: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    check_fault_is_caught("two_pass", fault, monkeypatch)


@pytest.mark.parametrize("fault", [stale_factors, twice_in_one])
def test_planted_faults_of_layer_sums_are_caught(fault: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    check_fault_is_caught("per_layer", fault, monkeypatch)


def test_planted_missing_merge_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tied and reused parameters: a sum of squares of the parts misses their cross terms."""
    monkeypatch.setattr("dpkernels.nn.recording.tape.merge_records", list)
    for kind in ("tied", "reused"):
        with pytest.raises((AssertionError, RuntimeError)):
            check_sum(run_of("per_layer", kind), "per_layer")
        with pytest.raises((AssertionError, RuntimeError)):
            check_sum(run_of("two_pass", kind), "two_pass")


# --- 4: non-finite examples


def test_non_finite_examples_are_left_out_of_two_passes() -> None:
    run = private_run(sigma=0, clip=BOUND, strategy="two_pass", model=Exploding())
    released = run.release(INDICES)
    assert run.optimizer.last_step.non_finite == 1
    run.model.on = False
    without = run.release((0, 2, 3, 4, 5, 6))
    for name, part in without.items():
        torch.testing.assert_close(released[name], part, rtol=1e-5, atol=1e-9)


# --- the engine


@pytest.mark.parametrize("strategy", ["two_pass", "per_layer"])
def test_training_runs_and_is_counted(strategy: str, tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="dpkernels"):
        run = private_run(strategy=strategy, ledger=tmp_path / "ledger", lr=0.1)
    assert f"strategy {strategy}" in caplog.text
    with pytest.warns(UserWarning, match="self_check"):
        assert train(run, 3) == 3
    assert run.engine.steps == 3


@pytest.mark.parametrize("strategy", ["two_pass", "per_layer"])
def test_a_weight_read_past_its_layer_is_refused_in_every_strategy(strategy: str) -> None:
    from tests.privacy.step.test_clipping import Bypassed

    run = private_run(model=Bypassed(), strategy=strategy)
    run.optimizer.begin_logical_batch(3)
    with pytest.raises(RuntimeError, match=r"inner\.weight"):
        run.optimizer.backward(run.loss_fn(run.model, run.data[[0, 1, 2]]))
    assert run.optimizer.recover() == (strategy == "per_layer")
    assert all(p.grad is None for p in run.model.parameters())
    assert run.engine.steps == 0


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "bound"), [("two_pass", 1.0), ("per_layer", [0.5] * 8)])
def test_a_target_epsilon_serves_every_strategy(strategy: str, bound: Any) -> None:
    model, data = Net(), private_run().data
    engine_ = PrivacyEngine()
    _, optimizer, _ = engine_.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(data, batch_size=8),
        target_epsilon=1.0,
        target_delta=1e-3,
        steps=5,
        max_grad_norm=bound,
        strategy=strategy,
    )
    assert optimizer.max_grad_norm == pytest.approx(1.0 if strategy == "two_pass" else math.sqrt(2.0))


def test_epsilon_is_that_of_the_stated_sensitivity() -> None:
    """The same σ and sampling: the same ε, since the noise is σ times the sensitivity in every strategy."""
    epsilons = set()
    for strategy in STRATEGIES:
        run = private_run(strategy=strategy, sigma=1.3)
        run.release((0, 1))
        epsilons.add(run.engine.get_epsilon(1e-3))
        assert run.optimizer.sensitivity == run.optimizer.max_grad_norm * (1 + rounding_slack(40))
        assert isinstance(run.optimizer._strategy, PerLayer) == (strategy == "per_layer")
    assert len(epsilons) == 1
    assert isinstance(run.engine, PrivacyEngine)


# --- what "auto" says and takes


def test_auto_says_what_it_chose() -> None:
    run = run_of("auto", "lora")
    assert run.optimizer.last_choices.rows == ()
    run.release(INDICES[:3], INDICES[3:])
    rows = run.optimizer.last_choices.rows
    assert {row.layer for row in rows} == {
        f"blocks.{i}.{name}" for i in (0, 1) for name in ("q", "v", "down")
    }
    assert {(row.least, row.examples, row.materialised) for row in rows} == {(3, 4, 4)}
    assert "blocks.0.down" in repr(run.optimizer.last_choices)


def test_the_choice_is_made_anew_for_every_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of("auto")
    chosen = []
    for least in (3, 99, 3):
        auto_materialises(monkeypatch, least)
        run.release(INDICES)
        chosen.append({row.materialised for row in run.optimizer.last_choices.rows})
    assert chosen == [{7}, {0}, {7}]


def test_the_ledger_and_the_self_check_say_the_strategy(tmp_path: Path) -> None:
    run = private_run(strategy="auto", ledger=tmp_path / "ledger")
    assert '"strategy": "auto"' in (tmp_path / "ledger").read_text()
    report = run.engine.self_check(losses_of)
    assert report.strategy == "auto"
    assert "strategy='auto'" in str(report)


@pytest.mark.parametrize(
    ("strategy", "share", "message"),
    [
        ("bookkeeping", 0.25, "memory_share=0.25 with strategy='bookkeeping'.*use that strategy, or leave"),
        ("auto", -0.1, "memory_share=-0.1: expected a finite number of at least 0"),
        ("auto", math.inf, "memory_share=inf"),
        ("auto", math.nan, "memory_share=nan"),
    ],
)
def test_wrong_memory_shares_are_refused(strategy: str, share: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        private_run(strategy=strategy, memory_share=share)


def test_the_memory_share_reaches_the_choice() -> None:
    assert private_run(strategy="auto", memory_share=0.5).optimizer.tape.choice.memory_share == 0.5
    assert private_run(strategy="auto").optimizer.tape.choice == Choice(by_time=True)
    assert private_run(strategy="mixed").optimizer.tape.choice == Choice(mixed=True)
