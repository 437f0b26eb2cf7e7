"""privacy.md 1-6: one norm an example over everything that is trained, and nothing of an example beyond C."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dpkernels import ops
from dpkernels.nn import LinearRecord, RowCheck
from dpkernels.privacy.guards.model import ModelGuard
from dpkernels.privacy.step import strategies as strategies_module
from dpkernels.privacy.step.clipping import (
    LEAST_SLACK,
    add_up,
    batch_bound,
    rounding_slack,
    sensitivity,
    total_norm_sq,
)
from tests.privacy.private_run import Net, Run, losses_of, norm_of, private_run

INDICES = (0, 1, 2, 3, 4, 5, 6)


def check_clipped_sum(run: Run, indices: Sequence[int] = INDICES) -> None:
    """What is released without noise is the clipped sum over the expected batch size."""
    expected = run.clipped_sum(indices)
    released = run.release(indices[:3], indices[3:])
    for name, total in expected.items():
        torch.testing.assert_close(
            released[name], total / 8, rtol=3e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


# --- 1: one norm over all trained parameters, fresh every step


@pytest.mark.parametrize("clip", [1e-3, 0.5, 100.0])
def test_clipped_sum_is_that_of_flat_clipping(clip: float) -> None:
    check_clipped_sum(private_run(sigma=0, clip=clip))


def test_a_second_step_uses_fresh_norms() -> None:
    run = private_run(sigma=0, clip=0.5, lr=5.0)
    run.release(INDICES[:3], INDICES[3:])  # in micro-batches of the sizes that come next
    check_clipped_sum(run)


def test_planted_stale_norms_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    run = private_run(sigma=0, clip=0.5, lr=5.0)
    first: list[Tensor] = []

    def stale(records: list, batch_size: int, device: torch.device) -> Tensor:
        fresh = total_norm_sq(records, batch_size, device)
        first.append(fresh)
        return next(old for old in first if old.shape == fresh.shape)

    monkeypatch.setattr(strategies_module, "total_norm_sq", stale)
    run.release(INDICES[:3], INDICES[3:])
    with pytest.raises(AssertionError):
        check_clipped_sum(run)


def test_planted_per_layer_norms_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def first_only(records: list, batch_size: int, device: torch.device) -> Tensor:
        return total_norm_sq(records[:1], batch_size, device)

    monkeypatch.setattr(strategies_module, "total_norm_sq", first_only)
    with pytest.raises(AssertionError):
        check_clipped_sum(private_run(sigma=0, clip=0.5))


def test_planted_clipping_after_the_sum_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "clip_factors", lambda norm_sq, c: torch.ones(len(norm_sq)))
    with pytest.raises(AssertionError):
        check_clipped_sum(private_run(sigma=0, clip=0.05))


def test_a_parameter_without_gradient_counts_zero() -> None:
    run = private_run(sigma=0, clip=0.5)
    assert float(run.release(INDICES)["unused.weight"].abs().max()) == 0
    check_clipped_sum(run)


class OwnGRU(nn.GRU):
    """With a forward of its own, for which there is no rule."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().forward(self.twice(input), hx)

    def twice(self, x: Tensor) -> Tensor:
        return 2 * x


class Uncovered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 3)
        self.gru = OwnGRU(3, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(self.inner(x))[0].mean(1)


def test_a_trained_parameter_without_rule_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"gru\.weight_ih_l0"):
        private_run(model=Uncovered())


def test_a_frozen_parameter_needs_no_rule() -> None:
    model = Uncovered()
    model.gru.requires_grad_(False)
    check_clipped_sum(private_run(sigma=0, clip=0.5, model=model))


# --- 2: losses are [B]; their sum is back-propagated


@pytest.mark.parametrize(
    ("reduce", "message"),
    [
        (lambda losses: losses.mean(), r"reduction='none'"),
        (lambda losses: losses.unsqueeze(1), r"shape \[B\]"),
        (lambda losses: losses.detach(), "do not require grad"),
        (lambda losses: (losses > 0).long(), "floating"),
        (lambda losses: losses.tolist(), "Tensor"),
    ],
)
def test_other_losses_are_refused(reduce: Callable, message: str) -> None:
    run = private_run()
    run.optimizer.begin_logical_batch(3)
    with pytest.raises((TypeError, ValueError), match=message):
        run.optimizer.backward(reduce(run.loss_fn(run.model, run.data[[0, 1, 2]])))


def test_the_sum_is_back_propagated_not_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    check_clipped_sum(private_run(sigma=0, clip=1e3))
    monkeypatch.setattr(torch.Tensor, "sum", lambda self, *a, **k: self.mean(*a, **k))  # the planted fault
    monkeypatch.setattr(RowCheck, "due", lambda *_: False)  # it sees that the backwards differ
    run = private_run(sigma=0, clip=1e3)
    run.optimizer.begin_logical_batch(7)
    run.optimizer.backward(run.loss_fn(run.model, run.data[list(INDICES)]))
    monkeypatch.undo()
    run.optimizer.step()
    expected = run.clipped_sum(INDICES)["last.weight"] / 8
    assert not torch.allclose(run.model.last.weight.grad.double(), expected, rtol=1e-2)


# --- 3: what one example adds has norm at most C; the slack of shared rounding


def contribution_excess(run: Run, indices: tuple[int, ...] = INDICES) -> float:
    """Largest ‖what one example adds to the float64 sums‖ / C, of the step at hand."""
    worst = 0.0
    for index in indices:
        run.begin(1)
        run.optimizer.backward(run.loss_fn(run.model, run.data[[index]]))
        added = torch.cat([total.flatten() for total in run.optimizer._batch.sums.values()]).norm()
        worst = max(worst, float(added) / run.optimizer.clip_norm)
        run.optimizer.zero_grad()
    return worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip", [1e-3, 0.3])
def test_no_example_adds_more_than_the_clipping_norm(dtype: torch.dtype, clip: float) -> None:
    excess = contribution_excess(private_run(sigma=0, clip=clip, dtype=dtype))
    assert 0.98 < excess <= 1.0


def test_planted_rounding_of_the_norm_to_bf16_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(records: list, batch_size: int, device: torch.device) -> Tensor:
        return total_norm_sq(records, batch_size, device).bfloat16().double()

    monkeypatch.setattr(strategies_module, "total_norm_sq", rounded)
    assert contribution_excess(private_run(sigma=0, clip=0.3)) > 1.0


def test_the_total_is_never_below_the_sum_of_the_parts() -> None:
    from fractions import Fraction

    parts = [torch.tensor([value]) for value in [1.0, 2.0**-24, 2.0**-23, 3e-8] * 40]
    exact = sum(Fraction(float(part)) for part in parts)
    total = add_up(parts, 1, torch.device("cpu"))
    assert exact <= Fraction(float(total)) <= exact * Fraction(1 + 2**-43)


@settings(max_examples=30, deadline=None)
@given(count=st.integers(2, 400), seed=st.integers(0, 2**30))
def test_shared_rounding_stays_within_the_slack(count: int, seed: int) -> None:
    """Leaving one vector out of a float64 sum, in another order too, changes it by its norm plus at most
    slack·C."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, 16, generator=generator, dtype=torch.float64)
    vectors /= vectors.norm(dim=1, keepdim=True)
    everyone, others = torch.zeros(16).double(), torch.zeros(16).double()
    for row in vectors:
        everyone += row
    for position in torch.randperm(count, generator=generator).tolist():
        if position:
            others += vectors[position]
    assert float((everyone - others).norm()) <= sensitivity(1.0, count)


def test_slack_covers_its_derivation_and_reaches_the_noise() -> None:
    assert rounding_slack(1) == LEAST_SLACK == 2.0**-20
    assert rounding_slack(4096) < 2e-4  # what it costs at the batch sizes that matter
    for examples in (1, 2**10, 2**15, 2**20):
        # additions of pieces of cancelling examples: n·P·(n + K)·2⁻⁵³, twice
        assert rounding_slack(examples) >= 2 * examples * 2**9 * (examples + 2**17) * 2.0**-53
    # What 64 processes sum apart is added up in 64 additions more, each counted twice.
    assert rounding_slack(2**10, 64) - rounding_slack(2**10) >= 2 * 64 * (2**10 + 2**17) * 2.0**-53
    run = private_run(sigma=2.0, clip=0.5)
    assert run.optimizer.sensitivity == 0.5 * (1 + rounding_slack(40))
    with pytest.raises(AssertionError):  # the planted fault: sums kept in float32
        assert rounding_slack(2**10) >= 2 * 2**10 * 2**9 * (2**10 + 2**17) * 2.0**-24


def test_examples_that_cancel_within_stay_within_the_slack() -> None:
    """Pieces of 64 frames, each as far above C as the stated norm lets through, and opposite to the next."""
    torch.manual_seed(0)
    frames, d, p, others = 1024, 6, 5, 8
    x = torch.randn(others, 1, d).expand(others, frames, d).contiguous()
    g = torch.randn(others, 1, p).expand(others, frames, p) * torch.tensor([1.0, -1.0]).repeat_interleave(
        64
    ).repeat(frames // 128).view(1, frames, 1)
    g = (g * 2.0**14).contiguous()
    factors = ops.clip_factors(ops.linear_norm_sq(x, g), 1.0)
    assert (factors > 0).all()
    plain = torch.randn(1, frames, d), torch.randn(1, frames, p)
    shares = []
    for mated in (False, True):
        out = torch.zeros(p, d, dtype=torch.float64)
        own = ops.clip_factors(ops.linear_norm_sq(*plain), 1.0)
        if mated:
            both = (torch.cat(pair) for pair in zip((x, g), plain, strict=True))
            ops.linear_weighted_sum(*both, torch.cat((factors, own)), out)
        else:
            ops.linear_weighted_sum(*plain, own, out)
        shares.append(out)
    assert float((shares[0] - shares[1]).norm()) <= rounding_slack(others + 1)


def test_the_batch_bound_is_public_and_out_of_reach() -> None:
    assert batch_bound(40, 0.2) == 40
    assert batch_bound(281_241, 4096 / 281_241) == 4096 + 1920 + 500
    assert batch_bound(281_241, 4096 / 281_241, capacity=4500) == 4500
    assert batch_bound(1000, 0.01, per_unit=4) == 4 * (10 + 95 + 500)


def test_a_batch_beyond_the_bound_is_counted_in_the_error() -> None:
    run = private_run()
    with pytest.raises(
        RuntimeError, match=r"41 examples in one .*at most 40,.*from the loader that make_private"
    ):
        run.optimizer.begin_logical_batch(41)


# --- 4: non-finite examples contribute exactly 0, by selection


@pytest.fixture
def poisoned() -> Run:
    run = private_run(sigma=0, clip=0.5)
    run.data.tensors[0][1] = float("nan")
    run.data.tensors[0][4] = float("inf")
    return run


def check_poison_is_left_out(run: Run) -> None:
    released = run.release(INDICES)
    expected = run.clipped_sum((0, 2, 3, 5, 6))
    for name, total in expected.items():
        torch.testing.assert_close(released[name], total / 8, rtol=1e-4, atol=1e-7)
    assert run.optimizer.last_step.non_finite == 2


def test_non_finite_examples_contribute_nothing_and_are_counted(poisoned: Run) -> None:
    check_poison_is_left_out(poisoned)


def test_a_nan_loss_invalidates_no_other_example() -> None:
    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return losses_of(model, batch) * torch.tensor([1.0, float("nan"), 1, 1, 1, 1, 1])

    run = private_run(sigma=0, clip=0.5, loss_fn=loss_fn)
    released = run.release(INDICES)
    run.loss_fn = losses_of
    expected = run.clipped_sum((0, 2, 3, 4, 5, 6))
    torch.testing.assert_close(released["last.weight"], expected["last.weight"] / 8, rtol=1e-4, atol=1e-7)


def test_planted_multiplication_by_zero_is_caught(poisoned: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def multiply(self: LinearRecord, factors: Tensor, sums: dict) -> None:
        x, g = self.x.flatten(1, -2), self.g.flatten(1, -2)
        sums[self.weight] += torch.einsum("b,btp,btd->pd", factors, g, x).double()

    monkeypatch.setattr(LinearRecord, "share", lambda self: None)  # alone, not in the call for all
    monkeypatch.setattr(LinearRecord, "add_weighted_sum", multiply)
    with pytest.raises(AssertionError):
        check_poison_is_left_out(poisoned)


def test_planted_factor_one_for_nan_is_caught(poisoned: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ops, "clip_factors", lambda norm_sq, c: (c / norm_sq.nan_to_num(1, 1).sqrt()).clamp(max=1).float()
    )
    with pytest.raises(AssertionError):
        check_poison_is_left_out(poisoned)


# --- 5: other clippings have other sensitivities: refused


def test_clipping_other_than_flat_is_refused_with_the_reason() -> None:
    for clipping in ("per_layer", "Adaptive", "Automatic"):
        with pytest.raises(ValueError, match="√ΣC_l²"):
            private_run(clipping=clipping)
    with pytest.raises(ValueError, match="the norm of the whole gradient"):
        private_run(clipping="automatic", strategy="per_layer")
    with pytest.raises(TypeError, match="√ΣC_l²"):
        private_run(clip=[1.0, 1.0])  # type: ignore[arg-type]
    for clip in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="max_grad_norm"):
            private_run(clip=clip)


# --- 6: tied and reused modules; weights read past their module


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.inner(torch.tanh(self.inner(x))))).mean(1)


class Bypassed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.linear(self.inner(x), self.inner.weight)).mean(1)


class Broadcast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.positions(torch.eye(6)[:4].unsqueeze(0).repeat(1, 1, 1))).mean(1)


def test_a_reused_module_counts_its_cross_terms() -> None:
    run = private_run(sigma=0, clip=1e-2, model=Reused())
    check_clipped_sum(run)
    assert contribution_excess(run) <= 1.0


def test_a_weight_read_past_its_layer_is_refused_by_name() -> None:
    run = private_run(model=Bypassed())
    run.optimizer.begin_logical_batch(3)
    with pytest.raises(RuntimeError, match=r"inner\.weight"):
        run.optimizer.backward(run.loss_fn(run.model, run.data[[0, 1, 2]]))
    assert run.optimizer._batch.sums == {}
    assert all(p.grad is None for p in run.model.parameters())


def test_planted_missing_check_lets_the_bypass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelGuard, "after_backward", lambda self: None)
    run = private_run(model=Bypassed(), sigma=0)
    run.optimizer.begin_logical_batch(7)
    run.optimizer.backward(run.loss_fn(run.model, run.data[list(INDICES)]))
    grads = [p.grad for p in run.model.parameters()]
    assert any(g is not None for g in grads)  # what the check sees


def test_a_penalty_on_weights_is_refused() -> None:
    run = private_run()
    run.optimizer.begin_logical_batch(3)
    losses = run.loss_fn(run.model, run.data[[0, 1, 2]]) + run.model.first.weight.square().sum()
    with pytest.raises(RuntimeError, match=r"first\.weight"):
        run.optimizer.backward(losses)


@pytest.mark.parametrize("batch", [1, 3, 4, 7])
def test_an_input_broadcast_over_the_batch_is_clipped_example_by_example(batch: int) -> None:
    run = private_run(model=Broadcast(), sigma=0, clip=0.1)
    check_clipped_sum(run, range(batch))


def test_loss_backward_is_refused_and_leaves_the_sums_alone() -> None:
    run = private_run(sigma=0, clip=0.5)
    run.optimizer.begin_logical_batch(7)
    run.optimizer.backward(run.loss_fn(run.model, run.data[list(INDICES)]))
    before = {p: total.clone() for p, total in run.optimizer._batch.sums.items()}
    with pytest.raises(RuntimeError, match=r"optimizer\.backward"):
        run.loss_fn(run.model, run.data[[0]]).sum().backward()
    run.optimizer.step()
    for p, total in before.items():
        torch.testing.assert_close(p.grad.double(), total / 8, rtol=1e-6, atol=1e-9)


def test_norms_are_those_of_the_whole_gradient() -> None:
    run = private_run(sigma=0, clip=0.5, model=Net())
    run.release(INDICES)
    norms = [norm_of(gradient) for gradient in run.gradients(INDICES)]
    assert run.optimizer.last_step.mean_norm == pytest.approx(sum(norms) / len(norms), rel=1e-3)
