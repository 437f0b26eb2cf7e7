"""privacy.md 5 under adaptive clipping: C follows a noisy count, a release that σ covers beside that of the sums."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
import torch
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dpkernels import ops
from dpkernels.privacy import (
    AdaptiveClipping,
    ClaimError,
    LedgerError,
    Sampling,
    audit_ledger,
    noisy_count,
    read_ledger,
)
from dpkernels.privacy.accounting.ledger import Ledger
from dpkernels.privacy.rng import streams
from dpkernels.privacy.rng.streams import SecretStream
from dpkernels.privacy.step.adaptive import RANGE, UNIT, WIDTH, AdaptiveRule, NoisyCount
from tests.privacy.private_run import KEY, Run, norm_of, private_run, train
from tests.privacy.step.test_clipping import INDICES, check_clipped_sum, contribution_excess
from tests.privacy.step.test_speaker_clipping import K, batch_of, drawn, speaker_gradients, speaker_run, take

STRATEGIES = ("bookkeeping", "mixed", "two_pass")
EXAMPLES = Sampling("example", 1000, 0.1, 100, 1, None)
SPEAKERS = Sampling("speaker", 50, 0.5, 100, 4, None)
LARGE = AdaptiveClipping(clipbound_learning_rate=1.0)


def adaptive_run(**arguments: Any) -> Run:
    return private_run(**{"sigma": 0, "clip": 0.5, "clipping": "adaptive"} | arguments)


def share_below(norms: Sequence[float], norm: float) -> float:
    """Σ_i s(ν_i/C), by the definition."""
    return sum(min(max((1 + WIDTH - value / norm) / (2 * WIDTH), 0.0), 1.0) for value in norms)


def rule_of(options: AdaptiveClipping | None = None, sigma: float = 1.0, norm: float = 1.0) -> AdaptiveRule:
    count = noisy_count(options or AdaptiveClipping(), sigma, EXAMPLES)
    return AdaptiveRule(count, norm, sensitivity=1.001 * norm)


def stream() -> SecretStream:
    return SecretStream.with_secret(KEY, fixed=True)


# --- C


@pytest.mark.thinned(2)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("clip", [1e-3, 0.5, 100.0])
def test_c_moves_by_the_count_over_the_expected_batch_size(strategy: str, clip: float) -> None:
    """Seven examples where eight are expected; the next step clips to the new C."""
    run = adaptive_run(clip=clip, strategy=strategy, clipping=LARGE)
    norms = [norm_of(gradient) for gradient in run.gradients(INDICES)]
    check_clipped_sum(run)
    expected = clip * math.exp(-(share_below(norms, clip) - len(norms) / 2) / 8)
    assert run.optimizer.clip_norm == pytest.approx(expected, rel=1e-4)
    assert run.engine.clip_norm == run.optimizer.clip_norm != clip == run.optimizer.max_grad_norm
    check_clipped_sum(run)


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9])
def test_c_finds_the_quantile(quantile: float) -> None:
    torch.manual_seed(3)
    norms = torch.randn(100, dtype=torch.float64).exp()
    rule = rule_of(AdaptiveClipping(target_unclipped_quantile=quantile, unclipped_num_std=5.0), norm=30.0)
    noise, last = stream(), []
    for draw in range(1, 401):
        rule.norms = rule.following(rule.votes(norms.square()).tolist(), noise, draw)
        last.append(rule.total)
    middle = math.exp(sum(map(math.log, last[200:])) / 200)
    low, high = (float(norms.quantile(at)) for at in (quantile - 0.08, quantile + 0.08))
    assert low < middle < high


def test_c_stays_where_noise_has_a_scale() -> None:
    """Gradients of 0 would halve it in every step, and norms without bound raise it: for ever."""
    for norms, factor in ((torch.zeros(100), 1 / RANGE), (torch.full((100,), torch.inf), RANGE)):
        rule, noise = rule_of(LARGE, norm=0.3), stream()
        for draw in range(1, 60):
            rule.norms = rule.following(rule.votes(norms.double()).tolist(), noise, draw)
        assert rule.norms == [0.3 * factor]
        assert 0 < rule.noise_scale < math.inf


def test_a_batch_that_is_begun_again_is_counted_once() -> None:
    run, again = adaptive_run(), adaptive_run()
    run.release(INDICES)
    again.begin(len(INDICES))
    again.optimizer.backward(again.loss_fn(again.model, again.data[list(INDICES[:4])]))
    again.optimizer.zero_grad()
    again.optimizer.backward(again.loss_fn(again.model, again.data[list(INDICES)]))
    again.optimizer.step()
    assert again.optimizer.clip_norm == run.optimizer.clip_norm != 0.5


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_example_adds_more_than_the_present_c(dtype: torch.dtype, strategy: str) -> None:
    run = adaptive_run(clip=0.3, dtype=dtype, strategy=strategy, clipping=LARGE)
    run.release(INDICES)
    assert run.optimizer.clip_norm > 0.3
    assert 0.9 < contribution_excess(run) <= 1.0


# --- the count's sensitivity


@given(
    st.lists(st.floats(0.0, 1e300) | st.sampled_from([math.inf, math.nan, 5e-324]), min_size=1, max_size=6),
    st.floats(1e-6, 1 - 1e-6),
    st.floats(1e-10, 1e10),
)
@settings(max_examples=100, deadline=None)
def test_one_unit_changes_the_count_by_its_sensitivity_at_most(
    squares: list[float], quantile: float, norm: float
) -> None:
    for sampling, whole_units, rows in ((EXAMPLES, False, 1), (SPEAKERS, False, 4), (SPEAKERS, True, 1)):
        count = noisy_count(AdaptiveClipping(quantile), 1.0, sampling, whole_units=whole_units)
        rule = AdaptiveRule(count, norm, norm)
        others = torch.tensor(squares, dtype=torch.float64)
        unit = others[:1].repeat(rows)
        change = int(rule.votes(torch.cat([others, unit])) - rule.votes(others))
        assert abs(change) <= count.sensitivity * UNIT
        assert change == int(rule.votes(unit))  # exactly: no addition rounds


def test_the_order_of_examples_and_micro_batches_changes_nothing() -> None:
    rule = rule_of()
    squares = torch.rand(1000, dtype=torch.float64) * 2
    assert sum(map(rule.votes, squares.flip(0).split(7))) == rule.votes(squares)
    assert int(rule.votes(squares[:0])) == 0


def test_rounding_moves_the_count_as_little_as_the_norms() -> None:
    """A bit would jump for each of these examples; shapes of micro-batches change norms by some 1e-7."""
    rule, moved = rule_of(), 1e-6
    squares = torch.full((1000,), 1.0, dtype=torch.float64)
    change = abs(int(rule.votes(squares * (1 + moved) ** 2) - rule.votes(squares))) / UNIT
    assert 0 < change <= 1000 * (moved / (2 * WIDTH) + 1 / UNIT) < 0.01 * rule.count.sensitivity


@pytest.mark.parametrize("clipping_unit", ["example", "speaker"])
def test_speakers_count_as_what_is_clipped(clipping_unit: str) -> None:
    """Three utterances of a speaker that are clipped apart are three votes, and cost as many."""
    run = speaker_run(clipping="adaptive", clipping_unit=clipping_unit, sigma=0)
    indices = drawn()
    whole = clipping_unit == "speaker"
    gradients = speaker_gradients(run, indices) if whole else run.gradients(indices.tolist())
    norms = [norm_of(gradient) for gradient in gradients]
    take(run, batch_of(run, indices))
    expected = 12 / K if whole else 12
    count = (share_below(norms, 0.5) - len(norms) / 2) / expected
    assert run.optimizer.clip_norm == pytest.approx(0.5 * math.exp(-0.2 * count), rel=1e-4)
    assert speaker_run(
        clipping="adaptive", clipping_unit=clipping_unit, sigma=1.0
    ).optimizer._adaptive.count == (
        noisy_count(AdaptiveClipping(), 1.0, run.engine.sampling, whole_units=whole)
    )


# --- noise and accounting


def multipliers(count: NoisyCount) -> tuple[float, float]:
    """σ_g and σ_b/Δ: the noise of sums and count over the sensitivity of each."""
    return count.sums_noise_multiplier, count.noise / count.sensitivity


@pytest.mark.thinned(3)
@pytest.mark.parametrize("sigma", [0.5, 1.0, 20.0])
@pytest.mark.parametrize("std", [None, 400.0])
@pytest.mark.parametrize(
    ("sampling", "whole_units", "counts"),
    [(EXAMPLES, False, 1), (SPEAKERS, False, 1), (SPEAKERS, True, 1), (EXAMPLES, False, 9)],
)
def test_sums_and_count_spend_sigma_together(
    sampling: Sampling, whole_units: bool, counts: int, std: float | None, sigma: float
) -> None:
    options = AdaptiveClipping(unclipped_num_std=std)
    count = noisy_count(options, sigma, sampling, whole_units=whole_units, counts=counts)
    sums, of_count = multipliers(count)
    assert sigma <= 1 / math.hypot(1 / sums, 1 / of_count) <= sigma * (1 + 1e-11)
    assert sums > sigma
    if sampling is EXAMPLES and counts == 1:  # the formula of arXiv:1905.03871, theorem 1
        assert sums == pytest.approx((sigma**-2 - (2 * count.noise) ** -2) ** -0.5, rel=1e-11)
    both = dp_accounting.ComposedDpEvent([dp_accounting.GaussianDpEvent(part) for part in (sums, of_count)])
    epsilons = []
    for event in (both, dp_accounting.GaussianDpEvent(sigma)):
        accountant = RdpAccountant([2, 4, 8, 16, 32])
        accountant.compose(dp_accounting.PoissonSampledDpEvent(sampling.sample_rate, event), 10)
        epsilons.append(accountant.get_epsilon(1e-5))
    assert epsilons[0] == pytest.approx(epsilons[1], rel=1e-9)
    if std is None:
        assert sums <= 1.006 * sigma


@pytest.mark.parametrize("sampling", [{}, {"max_batch_size": 13}])
def test_epsilon_is_that_of_flat_clipping_with_the_same_sigma(sampling: dict[str, int]) -> None:
    """A history of the same mechanism, whatever moved C in between."""
    runs = []
    for clipping in ("flat", "adaptive"):
        runs.append(private_run(clipping=clipping, **sampling))
        train(runs[-1], 3)
    flat, adaptive = runs
    assert adaptive.engine.history == flat.engine.history == [(flat.engine.history[0][0], 3)]
    assert adaptive.engine.history[0][0].noise_multiplier == 1.0
    assert adaptive.optimizer.clip_norm != 1.0 == flat.optimizer.clip_norm


def test_noise_on_the_sums_is_of_sigma_g_and_the_present_c() -> None:
    """σ_g is twice σ here; the second step's C, and so its noise, is larger."""
    double = AdaptiveClipping(0.5, 1.0, unclipped_num_std=1 / math.sqrt(3))
    run = private_run(sigma=1.0, clip=1e-3, clipping=double, key=KEY)
    for _ in range(2):
        norm = run.optimizer.clip_norm
        noise = torch.cat([g.flatten() for g in run.release(tuple(range(8))).values()]) * 8 / norm
        assert float(noise.square().mean().sqrt()) == pytest.approx(2.0, rel=0.1)
    assert run.optimizer.clip_norm > norm > 1.4e-3


def test_noise_on_the_count_is_that_of_the_constants_also_without_examples() -> None:
    rule, noise = rule_of(AdaptiveClipping(clipbound_learning_rate=1.0, unclipped_num_std=7.0)), stream()
    counts = -100 * torch.tensor([rule.following([0], noise, draw)[0] for draw in range(1, 1001)]).log()
    assert abs(float(counts.mean())) < 4 * 7 / math.sqrt(1000)
    assert float(counts.std()) == pytest.approx(7.0, rel=0.1)
    run = adaptive_run(sigma=1.0)
    run.release()
    assert run.optimizer.clip_norm != 0.5


def test_no_two_releases_share_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """The count draws from a stream of its own, and each step's from another one."""
    original, nonces = ops.noise_sums, []

    def spy(sums: list[Tensor], **arguments: Any) -> None:
        nonces.extend((arguments["key"], nonce) for nonce in arguments["nonces"])
        original(sums, **arguments)

    monkeypatch.setattr(ops, "noise_sums", spy)
    run = adaptive_run(sigma=1.0, unfused=True)
    for _ in range(3):
        run.release(INDICES)
    assert len(nonces) == len(set(nonces)) == 3 * (1 + len(run.optimizer._trained))
    purposes = [value for name, value in vars(streams).items() if name.startswith("PURPOSE_")]
    assert len(purposes) == len(set(purposes))
    assert stream().count_secrets(draw=1)["nonces"][0][0] == streams.PURPOSE_COUNT


def test_what_is_released_of_the_count_lies_on_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    original, noised = ops.noise_sums, []

    def spy(sums: list[Tensor], **arguments: Any) -> None:
        original(sums, **arguments)
        noised.append((float(sums[0]) * arguments["divisor"], arguments["grid"]))

    monkeypatch.setattr(ops, "noise_sums", spy)
    rule = rule_of(AdaptiveClipping(unclipped_num_std=6.0))
    rule.following([12345], stream(), 1)
    ((count, grid),) = noised
    assert grid == 2.0 ** (2 - 12)
    assert count / grid == pytest.approx(round(count / grid), abs=1e-9)


def test_all_ranks_take_over_the_noisy_count_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the votes of all; before each step they compare what they clip to."""
    run, told = adaptive_run(sigma=1.0), []
    ranks, rule = run.optimizer._ranks, run.optimizer._adaptive
    monkeypatch.setattr(rule, "following", lambda votes, stream, draw: told.append(votes))
    monkeypatch.setattr(ranks, "gathered", lambda mine: [mine, [3 * UNIT]])
    monkeypatch.setattr(ranks, "first", lambda function: (function(), [0.625])[1])
    assert run.optimizer._following_norms(rule, draw=1) == [0.625]
    assert told == [[3 * UNIT]]
    rule.norms = [0.625]
    assert run.optimizer._facts()["clipping norms"] == 0.625


# --- checkpoints, ledger, refusals


def test_a_resumed_run_goes_on_with_the_same_c() -> None:
    run = adaptive_run(sigma=1.0)
    for _ in range(2):
        run.release(INDICES)
    state = json.loads(json.dumps(run.engine.state_dict()))
    resumed = adaptive_run(sigma=1.0)
    resumed.engine.load_state_dict(state)
    assert resumed.optimizer.clip_norm == run.optimizer.clip_norm != 0.5
    assert resumed.optimizer._adaptive.noise_scale == run.optimizer._adaptive.noise_scale
    private_run().engine.load_state_dict(state)  # of a run that goes on with a constant C


def test_a_refused_checkpoint_leaves_no_norm(tmp_path: Path) -> None:
    """That of a run without noise was computed from counts without noise."""
    run = adaptive_run(sigma=1.0, ledger=tmp_path / "ledger")
    state = {**run.engine.state_dict(), "clip_norm": 0.25}
    run.engine.close()
    other = adaptive_run(sigma=1.0, ledger=tmp_path / "other")
    with pytest.raises(LedgerError):
        other.engine.load_state_dict(state)
    assert other.optimizer.clip_norm == 0.5


@pytest.mark.parametrize("norm", [None, 0.0, -1.0, math.nan, math.inf, "0.5"])
def test_a_norm_that_no_run_comes_to_is_not_loaded(norm: Any) -> None:
    run = adaptive_run(sigma=1.0)
    with pytest.raises(ValueError, match=r"clip_norm=.* the checkpoint is of another run"):
        run.engine.load_state_dict({**run.engine.state_dict(), "clip_norm": norm})
    assert run.optimizer.clip_norm == 0.5


def test_c_is_not_loaded_within_a_batch_that_was_clipped_to_another() -> None:
    run = adaptive_run(sigma=1.0)
    state = {**run.engine.state_dict(), "clip_norm": 0.25}
    run.begin(3)
    run.optimizer.backward(run.loss_fn(run.model, run.data[[0, 1, 2]]))
    with pytest.raises(RuntimeError, match="within a logical batch"):
        run.engine.load_state_dict(state)
    run.optimizer.step()
    run.engine.load_state_dict(state)
    assert run.optimizer.clip_norm == 0.25


def test_the_ledger_holds_both_noises_and_an_audit_adds_them_up(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with closing(private_run(sigma=2.0, clipping="adaptive", ledger=path).engine) as engine:
        rate = engine.sample_rate
    (run,) = read_ledger(path).runs
    assert run.settings["clipping"] == "adaptive"
    count = run.settings["noisy_count"]
    assert NoisyCount(**count) == noisy_count(
        AdaptiveClipping(), 2.0, Sampling("example", 40, rate, 8, 1, None)
    )
    claims = {"steps": 1, "noise_multiplier": 2.0, "sample_rate": rate, "dataset_size": 40, "unit": "example"}
    claims |= {"max_batch_size": None, "delta": 1e-3, "epsilon": 100.0, "accountant": "rdp"}
    for name, change in (("as it is", {}), ("less noise", {"sums_noise_multiplier": 2.0})):
        other = Ledger(tmp_path / name, {**run.settings, "noisy_count": count | change})
        other.spend_step()
        other.close()
    assert audit_ledger(tmp_path / "as it is", claims).noisy_count == count
    with pytest.raises(ClaimError, match="its steps cost more than they count for"):
        audit_ledger(tmp_path / "less noise", claims)
    for name, change in {"gamma": {"quantile": 0.95}, "K": {"counts": 100}}.items():
        other = Ledger(tmp_path / name, {**run.settings, "noisy_count": count | change})
        other.spend_step()
        other.close()
        with pytest.raises(ClaimError, match=r"adds up to .* to the counts"):
            audit_ledger(tmp_path / name, claims)
    other = Ledger(
        tmp_path / "none", {key: value for key, value in run.settings.items() if key != "noisy_count"}
    )
    other.spend_step()
    other.close()
    with pytest.raises(ClaimError, match="no noise of its counts is stated"):
        audit_ledger(tmp_path / "none", claims)


def test_what_is_not_covered_is_refused() -> None:
    for std in (0.3, 0.5, 0.5001):
        with pytest.raises(ValueError, match=rf"unclipped_num_std={std} must be well above 0\.5"):
            private_run(clipping=AdaptiveClipping(unclipped_num_std=std))
    for options in (
        {"target_unclipped_quantile": 0.0},
        {"target_unclipped_quantile": 1.0},
        {"clipbound_learning_rate": 0.0},
        {"clipbound_learning_rate": 1.5},
        {"unclipped_num_std": 0.0},
        {"unclipped_num_std": math.inf},
    ):
        ((name, value),) = options.items()
        with pytest.raises(ValueError, match=f"{name}={value}"):
            AdaptiveClipping(**options)
    with pytest.raises(TypeError, match=r"clipbound_learning_rate='0\.2' must be a number"):
        AdaptiveClipping(clipbound_learning_rate="0.2")  # type: ignore[arg-type]
