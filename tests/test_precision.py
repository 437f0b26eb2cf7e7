"""Frozen weights in a half type, trained ones in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dpkernels.precision import HalfLayerNorm, hold_frozen, widened_state

HALF = torch.bfloat16


def test_half_layer_norm_is_autocasts_rounded_once() -> None:
    norm = nn.LayerNorm(64)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.requires_grad_(False)
    x = torch.randn(3, 5, 64, dtype=HALF)
    hold_frozen(norm, HALF)
    assert type(norm) is HalfLayerNorm
    with torch.autocast("cpu", HALF):
        y = norm(x)
    wide = F.layer_norm(x.double(), (64,), norm.weight.double(), norm.bias.double(), norm.eps)
    assert y.dtype == HALF
    # bfloat16 of the exact value, or its neighbour where float32's rounding crossed the middle
    torch.testing.assert_close(y.double(), wide, rtol=2.0**-8, atol=1e-6)


def test_it_normalises_what_it_is_given_and_rounds_what_it_gives() -> None:
    """Frames of mean 10 and deviation 0.01: rounded before, nothing but the rounding would be left."""
    norm = nn.LayerNorm(64).requires_grad_(False)
    x = 10 + 0.01 * torch.randn(3, 64)
    exact = norm(x)
    hold_frozen(norm, HALF)
    assert norm(x).dtype == HALF
    torch.testing.assert_close(norm(x).float(), exact, rtol=2.0**-8, atol=1e-6)


def test_other_norms_stay_whole_and_a_norm_that_is_trained_later_is_one_again() -> None:
    model = nn.Sequential(
        nn.LayerNorm(4), nn.BatchNorm1d(4), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.LayerNorm(4)
    )
    model.requires_grad_(False)
    model[0].requires_grad_(True)
    model[4].bias.requires_grad_(True)
    hold_frozen(model, HALF)
    kinds = [nn.LayerNorm, nn.BatchNorm1d, HalfLayerNorm, nn.GroupNorm, nn.LayerNorm]
    assert [type(module) for module in model] == kinds
    assert [module.weight.dtype == HALF for module in model] == [False, False, True, False, False]
    model.requires_grad_(True)
    hold_frozen(model, HALF)
    assert type(model[2]) is nn.LayerNorm
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_widened_tensors_that_shared_memory_still_do() -> None:
    shared = torch.ones(3, dtype=HALF)
    square = torch.ones(2, 2, dtype=HALF)
    wide = widened_state(
        {"a": shared, "b": shared, "c": torch.ones(2, dtype=torch.int64), "d": square, "e": square.t()}
    )
    assert wide["d"].stride() != wide["e"].stride()
    assert wide["a"].dtype == torch.float32
    assert wide["a"].data_ptr() == wide["b"].data_ptr()
    assert wide["c"].dtype == torch.int64
