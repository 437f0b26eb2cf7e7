"""Weighted sums by Triton's kernels: how many float32 additions a term meets, and what examples do to each other's."""

import pytest
import torch
from torch import Tensor

from dpkernels import ops
from dpkernels.backends.triton_ops import availability
from tests.ops.conftest import TRITON_DEVICE

if availability.unavailable_reason(TRITON_DEVICE):
    pytest.skip(availability.unavailable_reason(TRITON_DEVICE), allow_module_level=True)
from dpkernels.backends.triton_ops import bounds, configs, grouped

pytestmark = pytest.mark.usefixtures("triton_backend")


def summed(way: str, x: Tensor, g: Tensor, factors: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Σ_i c_i g_iᵀx_i [p, d] by the kernel of one layer, without and with lengths, or by that of many layers."""
    out = torch.zeros(g.shape[2], x.shape[2], dtype=torch.float64)
    if way == "grouped":
        monkeypatch.setattr(grouped, "_FEWEST_PROGRAMS", 0)
        ops.weighted_sums([ops.GroupedLayer("linear", (x, g), outs=(out,))], factors)
    else:
        lengths = torch.full((len(x),), x.shape[1]) if way == "lengths" else None
        ops.linear_weighted_sum(x, g, factors, out, lengths=lengths)
    return out


@pytest.mark.parametrize("way", ["single", "lengths", "grouped"])
def test_a_long_sample_meets_no_more_roundings_than_its_norm_counts(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first piece of 2²⁴ takes the 1 of every piece that float32 adds to it: all of them, if nothing cut the sum."""
    frames = configs.config("linear_sum", torch.float32, 0).tiles["BT"]
    assert frames == configs.config("grouped_sums", torch.float32, 0).tiles["BT"]
    pieces = 4 * bounds.PIECES
    g = torch.zeros(1, pieces * frames, 16)
    g[0, ::frames] = 1.0
    g[0, 0] = 2.0**24
    given = summed(way, torch.ones(1, pieces * frames, 16), g, torch.ones(1), monkeypatch)
    lost = 2.0**24 + pieces - 1 - given
    assert (lost >= 1).all()  # the first pieces do meet in float32
    assert (lost <= bounds.PIECES).all()
