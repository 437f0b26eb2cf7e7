"""A lower bound on ε from one training run (Steinke, Nasr and Jagielski 2023, arXiv 2305.08846, Theorem 5.2).

Of m canaries each is included in the training data by a fair coin of its own. An attacker who sees only what the run
released, and not the coins, guesses "included" or "excluded" for r of the canaries and abstains from the others. If the
run is (ε, δ)-differentially private, the number V of correct guesses exceeds what an attacker of randomised response
would achieve by little:

    P[V >= v] <= β + 2·m·δ·α,   W ~ Binomial(r, e^ε/(1 + e^ε)),
    β = P[W >= v],   α = max over 1 <= i <= v of P[v - i <= W < v]/i.

Where the right side is at most 1 - confidence, more than ε must have been spent, or something improbable happened.

**The numbers of guesses** must not depend on the coins. They are fixed beforehand: one number by the caller, or a list
of numbers, over which the allowed error 1 - confidence is divided equally (a union bound). So the best of the list may
be stated.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from dpkernels.errors import UserError

LEAST_GUESSES = 16
"""`default_guesses` has no fewer guesses than this, where there are enough canaries: fewer could not show an ε of 1."""
_TOLERANCE = 1e-6  # of ε


class AuditError(UserError, ValueError):
    """Scores, coins or numbers from which no bound follows; the message has the reason and the fix."""


class Guesses(NamedTuple):
    """How many canaries the attacker guesses: those of the highest scores as included, of the lowest as excluded."""

    highest: int
    lowest: int

    @property
    def total(self) -> int:
        """r, the number of guesses."""
        return self.highest + self.lowest


@dataclass(frozen=True)
class LowerBound:
    """The result of an audit.

    Attributes:
        epsilon: the lower bound; 0.0 if nothing is shown. It exceeds the true ε with a probability of at most
            1 - confidence.
        delta: the δ at which it holds.
        confidence: of the bound.
        canaries: m.
        included: how many of them were included.
        guesses: the numbers of guesses that gave the bound.
        correct: how many of these guesses were correct.
        tried: how many numbers of guesses share the allowed error; 1 if one was fixed beforehand.
        largest: the bound that would follow if every guess were correct: no audit of m canaries shows more.
    """

    epsilon: float
    delta: float
    confidence: float
    canaries: int
    included: int
    guesses: Guesses
    correct: int
    tried: int
    largest: float


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """The probability bound of so many correct guesses against an (ε, δ)-DP run: β + 2·m·δ·α, at most 1.

    Args:
        canaries: m >= 1.
        guesses: r, from 0 to m.
        correct: v, from 0 to r.
        epsilon: ε >= 0.
        delta: δ in [0, 1).

    Raises:
        AuditError: a number out of range.
    """
    if not 0 <= correct <= guesses <= canaries or canaries < 1:
        raise AuditError(
            f"p_value: expected correct <= guesses <= canaries, got {correct}, {guesses} and {canaries}: each guess is "
            "about a canary of its own"
        )
    _check_delta(delta)
    if not epsilon >= 0:
        raise AuditError(f"p_value: epsilon={epsilon} must be >= 0")
    if correct == 0:
        return 1.0
    beta = float(special.bdtrc(correct - 1, guesses, special.expit(epsilon)))
    if delta == 0:
        return beta
    below = np.arange(correct - 1, -1, -1)  # v - 1, v - 2, ..., 0
    log_pmf = special.gammaln(guesses + 1) - special.gammaln(below + 1) - special.gammaln(guesses - below + 1)
    log_pmf += below * special.log_expit(epsilon) + (guesses - below) * special.log_expit(-epsilon)
    alpha = float(np.max(np.cumsum(np.exp(log_pmf)) / np.arange(1, correct + 1)))
    return min(1.0, beta + 2 * canaries * delta * alpha)


def default_guesses(canaries: int) -> tuple[Guesses, ...]:
    """The numbers of guesses that `lower_bound` divides its error over: r = m - 2·√m, m/2, m/4, ... to LEAST_GUESSES.

    Each r is tried with as many guesses of either kind; of m - 2·√m, these are hardly ever more than there are included
    (or excluded) canaries. From m/2 on guesses of inclusion alone are tried, too: a fault that concerns a few examples
    shows in the highest scores only.
    """
    totals = [max(canaries - 2 * math.ceil(math.sqrt(canaries)), 1)]
    while canaries // 2 ** len(totals) >= LEAST_GUESSES:
        totals.append(canaries // 2 ** len(totals))
    plans = [Guesses(total - total // 2, total // 2) for total in totals]
    return (*plans, *(Guesses(total, 0) for total in totals[1:]))


def correct_guesses(scores: Any, coins: Any, guesses: Guesses) -> int:
    """V: how many of the highest scores belong to included canaries, plus how many of the lowest to excluded ones.

    Equal scores are ordered by the canaries' places, which say nothing about the coins.

    Args:
        scores: [m] finite, higher for a canary that looks more like an included one.
        coins: [m] bool, whether each was included.
        guesses: at most m together.

    Raises:
        AuditError: lengths that differ, a score that is not finite, coins that are not bool, too many guesses.
    """
    scores, coins = _checked(scores, coins)
    _check_guesses(guesses, len(scores))
    ranked = coins[np.argsort(-scores, kind="stable")]
    included = ranked[: guesses.highest].sum()
    excluded = guesses.lowest - ranked[len(ranked) - guesses.lowest :].sum()
    return int(included + excluded)


def lower_bound(
    scores: Any,
    coins: Any,
    *,
    delta: float,
    confidence: float = 0.95,
    guesses: Guesses | Sequence[Guesses] | None = None,
) -> LowerBound:
    """The largest ε that the scores refute at this δ and confidence.

    Args:
        scores: [m], computed from what the run released and from public facts, not from the coins. Higher for a
            canary that looks included: its loss under the starting model minus that under the final one, for example.
        coins: [m] bool: whether each canary was included, each with probability 1/2 and independent of all else.
        delta: δ of the claim in [0, 1).
        confidence: in (0, 1): with this probability the bound is not above the true ε.
        guesses: numbers of guesses, chosen without looking at scores and coins of this run. One `Guesses` has all of
            the allowed error; a sequence shares it equally. None: `default_guesses(m)`.

    Raises:
        AuditError: see `correct_guesses`; δ or confidence out of range; no numbers of guesses.
    """
    scores, coins = _checked(scores, coins)
    plans, level = _plans(guesses, len(scores), delta, confidence)
    results = []
    for plan in plans:
        correct = correct_guesses(scores, coins, plan)
        results.append((_bound(len(scores), plan.total, correct, delta, level), plan, correct))
    epsilon, plan, correct = max(results, key=lambda result: result[0])
    return LowerBound(
        epsilon=epsilon,
        delta=delta,
        confidence=confidence,
        canaries=len(scores),
        included=int(coins.sum()),
        guesses=plan,
        correct=correct,
        tried=len(plans),
        largest=largest_bound(len(scores), delta=delta, confidence=confidence, guesses=guesses),
    )


def largest_bound(
    canaries: int,
    *,
    delta: float,
    confidence: float = 0.95,
    guesses: Guesses | Sequence[Guesses] | None = None,
) -> float:
    """The bound that follows where every guess is correct: with m canaries, no audit shows more.

    With δ = 0 and all canaries guessed it is logit((1 - confidence)^(1/m)): 5.8 for m = 1,000 at 95 %. With the default
    numbers of guesses it is 5.1 there.

    Args, raises: as `lower_bound`.
    """
    plans, level = _plans(guesses, canaries, delta, confidence)
    return max(_bound(canaries, plan.total, plan.total, delta, level) for plan in plans)


@functools.lru_cache(maxsize=4096)
def _bound(canaries: int, guesses: int, correct: int, delta: float, level: float) -> float:
    """An ε with p_value <= level, to within _TOLERANCE of one above it; 0 if ε = 0 is not refuted.

    p_value need not grow with ε where 2·m·δ > 1. Whatever ε is found, every smaller one is refuted with it, since a run
    that is (ε, δ)-DP is (ε', δ)-DP for every ε' above.
    """

    def refuted(epsilon: float) -> bool:
        return p_value(canaries, guesses, correct, epsilon, delta) <= level

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
    while high - low > _TOLERANCE:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def _plans(
    guesses: Guesses | Sequence[Guesses] | None, canaries: int, delta: float, confidence: float
) -> tuple[tuple[Guesses, ...], float]:
    """The numbers of guesses, and the share of the allowed error that each of them has."""
    if canaries < 1:
        raise AuditError(f"canaries={canaries}: an audit needs at least one; give some hundreds")
    _check_delta(delta)
    if not 0 < confidence < 1:
        raise AuditError(f"confidence={confidence} must lie between 0 and 1, e.g. 0.95")
    if guesses is None:
        guesses = default_guesses(canaries)
    plans = (guesses,) if isinstance(guesses, Guesses) else tuple(guesses)
    if not plans:
        raise AuditError("guesses is empty: give Guesses(highest, lowest), several of them, or None")
    for plan in plans:
        _check_guesses(plan, canaries)
    return plans, (1 - confidence) / len(plans)


def _check_guesses(guesses: Guesses, canaries: int) -> None:
    if min(guesses) < 0 or not 1 <= guesses.total <= canaries:
        raise AuditError(
            f"{guesses}: of {canaries} canaries at least one and at most all can be guessed, each once; lower the "
            "numbers of guesses"
        )


def _check_delta(delta: float) -> None:
    if not 0 <= delta < 1:
        raise AuditError(f"delta={delta} must lie in [0, 1)")


def _checked(scores: Any, coins: Any) -> tuple[np.ndarray, np.ndarray]:
    scores, coins = np.asarray(scores, dtype=np.float64), np.asarray(coins)
    if scores.ndim != 1 or scores.shape != coins.shape:
        raise AuditError(
            f"scores have shape {scores.shape} and coins {coins.shape}: expected one of each for every canary, [m]"
        )
    if coins.dtype != np.bool_:
        raise AuditError(f"coins are {coins.dtype}: expected bool, True for a canary that was included")
    if not np.isfinite(scores).all():
        place = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise AuditError(
            f"scores[{place}] is {scores[place]}: a score that is not finite cannot be ranked; leave the canary out "
            "before its coin is drawn, or give it the lowest score by a rule that does not know the coins"
        )
    return scores, coins
