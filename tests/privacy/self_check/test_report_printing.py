"""A self-check's report prints as a table of its worst, not as all of its records."""

from __future__ import annotations

import math

from dpkernels.privacy import SelfCheckReport
from dpkernels.privacy.self_check.findings import Difference, worst_first


def report(parameters: int, **fields: object) -> SelfCheckReport:
    """Three examples in two modes of each parameter; the larger a parameter's number, the larger its error."""
    differences = [
        Difference(f"layers.{place}.weight", sample, 1e-6 * (place + 1) / (sample + 1), 2.5, mode)
        for place in range(parameters)
        for sample in range(3)
        for mode in ("eval", "train")
    ]
    return SelfCheckReport(worst_first(differences), tolerance=2e-3, **fields)  # type: ignore[arg-type]


def test_the_worst_parameters_are_shown_once_each_worst_first() -> None:
    shown = str(report(12)).splitlines()
    assert shown[0] == (
        "72 comparisons of 12 parameters in eval and train mode: 0 beyond the tolerance of 0.002 (NOT PRIVATE)"
    )
    assert shown[1].split() == ["parameter", "error", "norm", "example", "mode"]
    assert [line.split()[0] for line in shown[2:7]] == [
        f"layers.{place}.weight" for place in range(11, 6, -1)
    ]
    assert shown[2].split()[1:] == ["1.20e-05", "2.50e+00", "0", "eval"]
    assert shown[7] == "and 7 parameters with smaller errors: see report.differences"
    assert len(shown) == 8


def test_printing_a_notebook_cell_is_the_same_and_short() -> None:
    assert repr(report(12)) == str(report(12))
    assert len(repr(report(1000))) < 1000


def test_what_failed_and_what_was_not_asked_is_said() -> None:
    found = SelfCheckReport([Difference("w", 1, math.nan, 1.0, "train", ", rows reversed")], 1e-3, "layers.0")
    assert "1 beyond the tolerance of 0.001" in str(found)
    assert "train, rows reversed" in str(found)
    assert "depends on its batch: 'layers.0'" in str(found)
    assert str(report(1, unchecked=("padding: no collate_fn pads",))).endswith(
        "\nnot asked: padding: no collate_fn pads"
    )


def test_an_empty_report_says_so() -> None:
    assert str(SelfCheckReport()) == (
        "0 comparisons of 0 parameters in no mode: 0 beyond the tolerance of 0 (NOT PRIVATE)"
    )
