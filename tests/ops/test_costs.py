"""The cost model of keeping a layer's tensors and of materialising its gradient: both sides of each crossing."""

from __future__ import annotations

import math
import re
from dataclasses import astuple, replace
from pathlib import Path

import pytest

from dpkernels.ops import costs
from dpkernels.ops.costs import GRAM_SHARE, LONGEST, Costs, costs_on

ROOT = Path(__file__).resolve().parents[2]
SIMPLE = Costs(
    gram=0.01,
    gram_frame=0.0,
    direct=0.02,
    direct_frame=0.0,
    summed=0.02,
    widened=0.5,
    product=0.02,
    entry=1.5,
    lora_product=0.01,
    lora_frame=0.1,
    lora_entry=1.5,
    lora_call=100.0,
)


@pytest.mark.parametrize(
    ("outputs", "inputs", "rank", "crossing"),
    [
        (64, 64, 0, 51),  # in direct form: 0.02·L > 1.0
        (256, 256, 0, 114),  # in Gram form: 0.01·L²·512 > 256²
        (1024, 256, 0, 144),
        (256, 1024, 0, 144),
        (1024, 1024, 8, 67),  # L(0.01·8 + 0.1) > 1.5·8
        (1024, 1024, 1, 15),  # and 100 of the calls, for 2048 inputs and outputs
        (8, 8, 1, 71),
    ],
)
def test_both_sides_of_a_crossing(outputs: int, inputs: int, rank: int, crossing: int) -> None:
    assert SIMPLE.crossing(outputs, inputs, rank) == crossing
    for frames, saves in ((crossing - 1, False), (crossing, True), (2 * crossing, True), (LONGEST, True)):
        sizes = (frames, outputs, inputs, rank)
        assert (SIMPLE.saved(*sizes) > 0) == saves


def test_materialising_that_never_pays_has_no_crossing() -> None:
    assert replace(SIMPLE, product=0.1).crossing(64, 64) is None
    assert replace(SIMPLE, lora_product=0.0, lora_frame=0.0).crossing(64, 64, 4) is None


def test_the_norms_form_is_that_of_the_native_kernel() -> None:
    """At the share of operations of csrc/cpu/linear.cpp the model changes from the Gram form to the direct one."""
    source = (ROOT / "csrc/cpu/linear.cpp").read_text()
    assert re.search(r"kGramShare = ([0-9.]+);", source)[1] == str(GRAM_SHARE)  # type: ignore[index]
    assert "fewer = frames * (p + d) < kGramShare * 2.0 * p * d;" in source
    changes = math.ceil(GRAM_SHARE * 2 * 64 * 64 / 128)
    norm = replace(SIMPLE, summed=0, widened=0)
    assert norm.kept(changes - 1, 64, 64) == pytest.approx(0.01 * (changes - 1) ** 2 * 128)
    assert norm.kept(changes, 64, 64) == pytest.approx(0.02 * changes * 64 * 64)


def test_a_backend_has_costs_where_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = costs._fitted()
    assert all(math.isfinite(value) and value >= 0 for row in fitted.values() for value in astuple(row))
    served = {"cpu": "native", "cuda": "triton"}
    monkeypatch.setattr(costs.registry, "backend_of", lambda op, device_type: served[device_type])
    assert costs_on("cpu") == fitted["native"]
    assert costs_on("cuda") is None
