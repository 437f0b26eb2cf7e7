"""What is shown of ε and σ never promises more privacy than the exact figures."""

import math
import re
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from dpkernels.rounding import shown_epsilon, shown_lower_bound, shown_sigma

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("value", "places", "up", "down"),
    [
        (7.97445, 2, "7.98", "7.97"),
        (7.97445, 3, "7.975", "7.974"),
        (8.0, 3, "8.000", "8.000"),
        (0.841, 3, "0.841", "0.841"),
        (1e-7, 3, "0.001", "0.000"),
        (123456.0001, 2, "123456.01", "123456.00"),
        (math.inf, 3, "∞", "∞"),
    ],
)
def test_epsilon_goes_up_and_sigma_down(value: float, places: int, up: str, down: str) -> None:
    assert shown_epsilon(value, places) == up
    assert shown_sigma(value, places) == down
    assert shown_lower_bound(value, places) == down


def test_for_any_value() -> None:
    for value in np.random.default_rng(0).uniform(0, 20, 1000).tolist():
        for places in range(5):
            exact, unit = Decimal(repr(value)), Decimal(1).scaleb(-places)
            assert 0 <= Decimal(shown_epsilon(value, places)) - exact < unit
            assert 0 <= exact - Decimal(shown_sigma(value, places)) < unit


def test_nan_is_refused() -> None:
    for function in (shown_epsilon, shown_sigma, shown_lower_bound):
        with pytest.raises(ValueError, match="nan"):
            function(math.nan)


# A formatted figure beside the name of ε or σ: `{epsilon:.3f}`, `{privacy['noise_multiplier']:g}`, `format(spent)`.
NAMES = r"(?:epsilon|sigma|noise_multiplier|spent|spends)\w*"
FORMATTED = re.compile(rf"\{{[^{{}}]*\b{NAMES}[^{{}}]*:[.\d]*[fge]\}}|format\([^()]*{NAMES}")
# A target is the user's own number, which no rounding may change; and what is not shown to anyone.
EXEMPT = ("target_epsilon:g}", "privacy.epsilon:g}", "self.epsilon:g}")


def unrounded(text: str) -> list[str]:
    return [found for found in FORMATTED.findall(text) if not found.endswith(EXEMPT)]


@pytest.mark.parametrize("top", ["dpkernels", "asr_finetune", "experiments"])
def test_no_other_place_formats_them(top: str) -> None:
    paths = [path for kind in ("py", "html", "md") for path in sorted((ROOT / top).rglob(f"*.{kind}"))]
    assert paths
    found = {str(path.relative_to(ROOT)): unrounded(path.read_text()) for path in paths}
    assert not {path: lines for path, lines in found.items() if lines}


@pytest.mark.parametrize(
    "line",
    [
        "{plan.epsilon:.3f}",
        "{privacy['noise_multiplier']:g}",
        '{{ "%.2f" | format(privacy.epsilon) }}',
        "{sigma:g}",
    ],
)
def test_another_place_would_be_found(line: str) -> None:
    assert unrounded(line)
