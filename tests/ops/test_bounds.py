"""Where a bound is all that a norm says: terms that cancel, in float32 and float64; and sums in another dtype."""

import pytest
import torch

from dpkernels import ops


@pytest.mark.parametrize("method", ["direct", "gram"])
def test_float64_norms_have_a_bound_too(torch_backend: str, method: str) -> None:
    """1e17 + 1 - 1e17 is 0 in float64, and 1 in truth: the norm must say at least that."""
    x = torch.ones(1, 3, 1, dtype=torch.float64)
    g = torch.tensor([[[1e17], [1.0], [-1e17]]], dtype=torch.float64)
    assert float(ops.linear_norm_sq(x, g, method=method)) >= 1.0


def test_the_direct_norm_is_bounded_on_both_sides(torch_backend: str) -> None:
    """The computed norm is at least ‖G‖ − γS, and what the sum adds at most ‖G‖ + γS: 2γS lie between the two, and 2u
    for the scaling. Where all terms cancel, the bound is all that is said.
    """
    frames, u = 128, 2.0**-24
    x = torch.ones(1, frames, 1)
    g = torch.tensor([1.0, -1.0]).repeat(frames // 2).view(1, frames, 1)
    gamma = frames * u / (1 - frames * u)
    said = float(ops.linear_norm_sq(x, g, method="direct")) ** 0.5
    assert said >= (2 * gamma + 2 * u) * frames
    assert said <= 1.1 * (2 * gamma + 2 * u) * frames


def test_a_lora_sum_in_another_dtype_is_put_back(backend: str) -> None:
    """out_b of another dtype than out_a is summed in that one's, and copied back."""
    torch.manual_seed(0)
    x, h, g, dh = (torch.randn(2, 3, width) for width in (5, 2, 4, 2))
    factors = torch.tensor([0.5, 2.0])
    out_a, out_b = torch.zeros(2, 5, dtype=torch.float64), torch.zeros(4, 2)
    ops.lora_weighted_sum(x, h, g, dh, factors, out_a, out_b, scaling=3.0)
    torch.testing.assert_close(out_b, 3.0 * torch.einsum("b,btp,btr->pr", factors, g, h))
