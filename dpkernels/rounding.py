"""How ε and σ are shown: a number with few digits must not promise more privacy than the exact one."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal


def shown_epsilon(epsilon: float, places: int = 3) -> str:
    """ε as text, rounded up to `places` decimals: 7.9741 is shown as 7.975 (∞ as "∞").

    Args:
        epsilon: ε >= 0, or infinity.
        places: decimals.

    Raises:
        ValueError: `epsilon` is NaN.
    """
    return _rounded(epsilon, places, ROUND_CEILING)


def shown_sigma(sigma: float, places: int = 3) -> str:
    """The noise multiplier σ as text, rounded down to `places` decimals: 0.8419 is shown as 0.841.

    Args:
        sigma: σ >= 0.
        places: decimals.

    Raises:
        ValueError: `sigma` is NaN.
    """
    return _rounded(sigma, places, ROUND_FLOOR)


def shown_lower_bound(epsilon: float, places: int = 2) -> str:
    """A lower bound on ε as text, rounded down to `places` decimals: 1.239 is shown as 1.23.

    Args:
        epsilon: the bound, >= 0.
        places: decimals.

    Raises:
        ValueError: `epsilon` is NaN.
    """
    return _rounded(epsilon, places, ROUND_FLOOR)


def _rounded(value: float, places: int, rounding: str) -> str:
    if math.isnan(value):
        raise ValueError("nan cannot be shown: it is no ε and no σ")
    if math.isinf(value):
        return "∞"
    # The shortest decimal that reads back as the same float: 0.841 stays 0.841, though its float is a little larger.
    exact = Decimal(repr(float(value)))
    return f"{exact.quantize(Decimal(1).scaleb(-places), rounding):f}"
