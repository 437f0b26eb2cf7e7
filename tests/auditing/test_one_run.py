"""The lower bound of one-run auditing: its tail against direct sums, its confidence, and what it can show at most."""

from __future__ import annotations

import math
from fractions import Fraction

import dp_accounting
import numpy as np
import pytest
from scipy import special, stats

from dpkernels.auditing import (
    AuditError,
    Guesses,
    correct_guesses,
    default_guesses,
    largest_bound,
    lower_bound,
    p_value,
)

ONCE_IN_A_MILLION = 1e-6


def tail_of(canaries: int, guesses: int, correct: int, odds: int, delta: Fraction) -> Fraction:
    """The paper's bound in exact arithmetic at ε = ln(odds): each guess is correct with probability odds/(1 + odds)."""
    q = Fraction(odds, 1 + odds)
    pmf = [math.comb(guesses, k) * q**k * (1 - q) ** (guesses - k) for k in range(guesses + 1)]
    alpha = max((sum(pmf[correct - i : correct]) / i for i in range(1, correct + 1)), default=Fraction(0))
    return sum(pmf[correct:], Fraction(0)) + 2 * canaries * delta * alpha


@pytest.mark.parametrize(
    ("canaries", "guesses", "correct", "epsilon", "delta", "expected"),
    [
        (1, 1, 1, 0.0, 0.0, 1 / 2),
        (2, 2, 2, math.log(3), 0.0, 9 / 16),
        (2, 2, 1, math.log(3), 0.0, 15 / 16),
        # P[W = 1] = 6/16 in one step, P[W < 2]/2 = 7/32 in two: α = 3/8, and 2·m·δ·α = 0.015
        (2, 2, 2, math.log(3), 0.01, 9 / 16 + 0.015),
        # W of 4 coins: P[W = 3] = 4/16, P[2 <= W < 4]/2 = 5/16, P[1 <= W < 4]/3 = 14/48: the second is the largest
        (10, 4, 4, 0.0, 0.001, 1 / 16 + 2 * 10 * 0.001 * 5 / 16),
        (5, 3, 0, 0.0, 0.1, 1.0),
        (5, 0, 0, 2.0, 0.0, 1.0),
    ],
)
def test_small_cases_by_hand(
    canaries: int, guesses: int, correct: int, epsilon: float, delta: float, expected: float
) -> None:
    assert p_value(canaries, guesses, correct, epsilon, delta) == pytest.approx(expected, rel=1e-12)


def test_the_tail_is_that_of_a_direct_sum() -> None:
    for guesses in (1, 3, 8, 13):
        for correct in range(guesses + 1):
            for odds, delta in ((1, Fraction(0)), (3, Fraction(1, 1000)), (20, Fraction(1, 100))):
                exact = min(1, tail_of(20, guesses, correct, odds, delta))
                assert p_value(20, guesses, correct, math.log(odds), float(delta)) == pytest.approx(
                    float(exact), rel=1e-11
                )


def test_it_is_never_below_what_a_mechanism_of_this_epsilon_and_delta_does() -> None:
    """Randomised response that reveals each coin, or all of them at once, with probability δ."""
    canaries = 60
    for epsilon, delta in ((0.0, 1e-3), (1.0, 1e-3), (2.0, 1e-2)):
        q = special.expit(epsilon)
        bound = np.array([p_value(canaries, canaries, v, epsilon, delta) for v in range(canaries + 1)])
        at_least = np.arange(canaries + 1) - 1
        each = stats.binom.sf(at_least, canaries, delta + (1 - delta) * q)
        at_once = delta + (1 - delta) * stats.binom.sf(at_least, canaries, q)
        assert (bound >= each - 1e-12).all()
        assert (bound >= at_once - 1e-12).all()


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 3.0])
def test_against_randomised_response_the_error_is_the_allowed_one(epsilon: float) -> None:
    """The mechanism for which the bound is tight: it exceeds ε as often as allowed, and not much less often."""
    canaries, level = 200, 0.05
    refuted = [p_value(canaries, canaries, v, epsilon, 0.0) <= level for v in range(canaries + 1)]
    often = stats.binom.pmf(np.flatnonzero(refuted), canaries, special.expit(epsilon)).sum()
    assert level / 3 < often <= level


def test_scores_that_hold_nothing_show_something_no_more_often_than_allowed() -> None:
    generator, runs = np.random.default_rng(1), 400
    shown = 0
    for _ in range(runs):
        scores, coins = generator.normal(size=200), generator.random(200) < 0.5
        shown += lower_bound(scores, coins, delta=0.0).epsilon > 0
    assert shown <= stats.binom.ppf(1 - ONCE_IN_A_MILLION, runs, 0.05)
    # A choice among the numbers of guesses after the fact, each at the whole error, would be seen.
    assert shown < 0.8 * 0.05 * runs


def gaussian(mu: float, canaries: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Scores and coins of m Gaussian mechanisms, one a canary, of sensitivity μ in units of the noise."""
    coins = generator.random(canaries) < 0.5
    return mu * coins + generator.normal(size=canaries), coins


def test_of_gaussian_mechanisms_it_stays_below_epsilon_and_grows_with_it() -> None:
    generator, delta, runs = np.random.default_rng(2), 1e-5, 8
    middle = []
    for mu in (0.5, 1.5, 3.0):
        epsilon = dp_accounting.get_epsilon_gaussian(1 / mu, delta)
        bounds = [lower_bound(*gaussian(mu, 500, generator), delta=delta).epsilon for _ in range(runs)]
        assert sum(bound > epsilon for bound in bounds) <= stats.binom.ppf(1 - ONCE_IN_A_MILLION, runs, 0.05)
        middle.append(float(np.median(bounds)))
    assert middle[0] + 0.3 < middle[1] < middle[2] - 0.3


def test_perfect_scores_show_the_stated_most() -> None:
    coins = np.arange(1000) % 2 == 0
    everything = Guesses(500, 500)
    fixed = lower_bound(coins, coins, delta=0.0, guesses=everything)
    assert fixed.epsilon == pytest.approx(special.logit(0.05 ** (1 / 1000)), abs=1e-5)
    assert round(fixed.epsilon, 1) == 5.8
    assert (fixed.correct, fixed.included, fixed.tried) == (1000, 500, 1)
    for options in ({"delta": 0.0}, {"delta": 1e-5}, {"delta": 1e-5, "guesses": everything}):
        bound = lower_bound(coins, coins, **options)
        assert bound.epsilon == bound.largest == largest_bound(1000, **options)
        assert bound.epsilon <= fixed.epsilon
    assert 5.1 < largest_bound(1000, delta=0.0) < 5.2
    # and no scores show more, whatever the coins
    generator = np.random.default_rng(3)
    uneven = generator.random(1000) < 0.5
    assert lower_bound(uneven, uneven, delta=0.0).epsilon <= largest_bound(1000, delta=0.0)


def test_more_canaries_can_show_more() -> None:
    most = [largest_bound(canaries, delta=1e-6) for canaries in (1, 30, 100, 1000, 10_000)]
    assert most[0] == 0.0
    assert most == sorted(most)


def test_the_error_is_shared_among_the_numbers_of_guesses() -> None:
    coins = np.arange(100) % 2 == 0
    half = Guesses(25, 25)
    alone = lower_bound(coins, coins, delta=0.0, guesses=half)
    among = lower_bound(coins, coins, delta=0.0, guesses=[half, Guesses(1, 0), Guesses(0, 1)])
    assert among.tried == 3
    assert among.guesses == half
    assert among.epsilon == pytest.approx(special.logit((0.05 / 3) ** (1 / 50)), abs=1e-5)
    assert among.epsilon < alone.epsilon == pytest.approx(special.logit(0.05 ** (1 / 50)), abs=1e-5)


def test_the_default_numbers_of_guesses_follow_from_the_number_of_canaries() -> None:
    assert default_guesses(1000)[:3] == (Guesses(468, 468), Guesses(250, 250), Guesses(125, 125))
    assert default_guesses(1000)[-1] == Guesses(31, 0)
    for canaries in (1, 2, 7, 33, 1000):
        plans = default_guesses(canaries)
        assert len(set(plans)) == len(plans) >= 1
        assert all(1 <= plan.total <= canaries for plan in plans)


def test_the_highest_scores_are_guessed_included_and_the_lowest_excluded() -> None:
    scores, coins = [3.0, 1.0, 2.0, 0.0], np.array([True, False, False, True])
    assert correct_guesses(scores, coins, Guesses(1, 1)) == 1
    assert correct_guesses(scores, coins, Guesses(2, 2)) == 2
    assert correct_guesses(scores, coins, Guesses(1, 0)) == 1
    assert correct_guesses(scores, coins, Guesses(0, 1)) == 0
    assert correct_guesses(scores, ~coins, Guesses(1, 1)) == 1


def test_equal_scores_are_ordered_by_place_and_not_by_coin() -> None:
    coins = np.array([True, True, False, False])
    assert correct_guesses(np.zeros(4), coins, Guesses(2, 2)) == 4
    assert correct_guesses(np.zeros(4), ~coins, Guesses(2, 2)) == 0


def test_a_bound_is_not_missed_where_the_tail_does_not_grow() -> None:
    """With 2·m·δ > 1 the tail may fall with ε; what is refuted at an ε is refuted at every smaller one."""
    coins = np.arange(2000) % 2 == 0
    bound = lower_bound(coins, coins, delta=1e-3, guesses=Guesses(1000, 1000))
    assert 0 < bound.epsilon == bound.largest
    assert p_value(2000, 2000, 2000, bound.epsilon, 1e-3) <= 0.05


@pytest.mark.parametrize(
    ("scores", "coins", "options", "message"),
    [
        ([1.0, 2.0], [True], {}, "one of each for every canary"),
        ([], [], {}, "needs at least one|expected bool"),
        ([1.0, 2.0], [1, 0], {}, "expected bool"),
        ([1.0, math.nan], [True, False], {}, r"scores\[1\] is nan"),
        ([1.0, 2.0], [True, False], {"delta": 1.0}, "delta=1.0"),
        ([1.0, 2.0], [True, False], {"confidence": 1.0}, "confidence=1.0"),
        ([1.0, 2.0], [True, False], {"guesses": []}, "guesses is empty"),
        ([1.0, 2.0], [True, False], {"guesses": Guesses(2, 1)}, "of 2 canaries"),
        ([1.0, 2.0], [True, False], {"guesses": Guesses(-1, 2)}, "of 2 canaries"),
    ],
)
def test_what_gives_no_bound_is_refused(scores: list, coins: list, options: dict, message: str) -> None:
    with pytest.raises(AuditError, match=message):
        lower_bound(scores, np.array(coins), **{"delta": 1e-5, **options})


@pytest.mark.parametrize(
    "numbers", [(0, 0, 0, 0.0, 0.0), (2, 3, 1, 0.0, 0.0), (2, 2, 1, -1.0, 0.0), (2, 2, 1, 0.0, -0.1)]
)
def test_numbers_out_of_range_are_refused(numbers: tuple) -> None:
    with pytest.raises(AuditError):
        p_value(*numbers)


def test_it_agrees_with_jax_privacys_estimator() -> None:
    theirs = pytest.importorskip("jax_privacy.auditing", reason="jax-privacy is not installed; it brings jax")
    generator, delta = np.random.default_rng(4), 1e-5
    for mu, guesses in ((0.0, 100), (1.0, 60), (3.0, 100)):
        scores, coins = gaussian(mu, 400, generator)
        auditor = theirs.CanaryScoreAuditor(scores[coins], scores[~coins])
        threshold = theirs.Explicit(float(np.sort(scores)[-guesses]))
        expected = auditor.epsilon_one_run(0.05, delta, threshold_strategy=threshold)
        found = lower_bound(scores, coins, delta=delta, guesses=Guesses(guesses, 0)).epsilon
        assert found == pytest.approx(expected, abs=1e-4)
