"""Triton's workspaces are uninitialised memory: what stands there before must change no bit."""

import pytest
import torch
from torch import Tensor

from dpkernels.backends.triton_ops import (
    bias,
    depthwise_conv1d,
    embedding,
    launching,
    layer_norm,
    linear,
    lora,
    vectors,
)
from tests.ops.cases import make

STALE = (0.0, -1e8, 1e30, float("nan"))


@pytest.fixture(params=STALE)
def stale(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    def scratch(like: Tensor, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        # of an integer dtype there is no NaN: any other frame's number, or count
        value = request.param if dtype.is_floating_point else 1
        return torch.full(shape, value, dtype=dtype, device=like.device)

    for module in (bias, depthwise_conv1d, embedding, layer_norm, linear, lora, vectors):
        monkeypatch.setattr(module, "scratch", scratch)
    return float(request.param)


# T(p+d) = 2pd: half-Gram and direct take as many operations. One frame less, and one more.
TIES = [(16, 16, 16), (24, 16, 48), (15, 16, 16), (17, 16, 16), (1, 1, 1)]


@pytest.mark.thinned(15)
@pytest.mark.parametrize("method", ["auto", "gram", "direct"])
@pytest.mark.parametrize("size", TIES)
def test_linear_norms(triton_backend: str, stale: float, size: tuple[int, int, int], method: str) -> None:
    frames, d, p = size
    torch.manual_seed(4)
    case = make("linear", 2, frames, d, p, lengths=torch.tensor([frames, max(0, frames - 1)]))
    (given,) = case.norms(method=method)
    exact = torch.stack([case.gradients(i)[0].square().sum() for i in range(2)])
    assert (given.double() >= exact).all()
    assert (given.double() <= exact * 1.02 + 1e-30).all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "scratch", launching.scratch)
        assert torch.equal(given, case.norms(method=method)[0])


@pytest.mark.thinned(4)
@pytest.mark.parametrize("family", ["bias", "lora", "layer_norm", "depthwise_conv1d", "embedding"])
def test_other_norms(triton_backend: str, stale: float, family: str) -> None:
    torch.manual_seed(4)
    case = make(family, 2, 9)
    for parameter, given in enumerate(case.norms()):
        exact = torch.stack([case.gradients(i)[parameter].square().sum() for i in range(2)])
        assert (given.double() >= exact * (1 - 1e-12)).all()
        assert (given.double() <= exact * 1.02 + 1e-30).all()
