"""lora_gradients: each sample's own gradients, to the rounding of their accumulation."""

import pytest
import torch

from dpkernels import ops
from dpkernels.backends import registry
from tests.ops.cases import SCALING, make
from tests.ops.tolerances import DTYPES, SUM_OFF


@pytest.mark.thinned(5)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "size", [(3, 7, 5, 4, 3), (2, 70, 130, 257, 8), (1, 1, 1, 1, 1), (2, 600, 33, 40, 17)]
)
def test_equals_autograd(backend: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, frames, d, p, rank = size
    case = make("lora", batch, frames, d, p, dtype=dtype, rank=rank)
    gradients = ops.lora_gradients(*case.tensors.values(), scaling=SCALING)
    for parameter, given in enumerate(gradients):
        assert given.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert given.is_contiguous()
        assert given.shape == (batch, *case.out_shapes[parameter])
        for i in range(batch):
            # The composition's products are in an order of BLAS's own: γ_T, not γ of a chunk.
            most = SUM_OFF[dtype] * max(1.0, frames / 128) * case.scale(i)[parameter]
            assert float((given[i].double() - case.gradients(i)[parameter]).norm()) <= most


@pytest.mark.parametrize("sizes", [(0, 3, 4, 5), (2, 0, 4, 5)])
def test_of_nothing(backend: str, sizes: tuple[int, ...]) -> None:
    case = make("lora", *sizes)
    of_a, of_b = ops.lora_gradients(*case.tensors.values())
    assert of_a.shape == (sizes[0], 3, 4)
    assert of_b.shape == (sizes[0], 5, 3)
    assert not of_a.any()
    assert not of_b.any()


def test_any_strides(backend: str) -> None:
    case = make("lora", 3, 9, 6, 5)
    strided = {name: t.transpose(1, 2).contiguous().transpose(1, 2) for name, t in case.tensors.items()}
    for given, dense in zip(
        ops.lora_gradients(*strided.values()), ops.lora_gradients(*case.tensors.values()), strict=True
    ):
        assert torch.allclose(given, dense, rtol=1e-6, atol=1e-6)


def test_not_finite_stays_with_its_sample(backend: str) -> None:
    case = make("lora", 3, 9)
    case.tensors["x"][1, 2, 0] = torch.nan
    of_a, of_b = ops.lora_gradients(*case.tensors.values())
    assert of_a[1].isnan().any()
    assert of_a[[0, 2]].isfinite().all()
    assert of_b.isfinite().all()


def test_opcheck() -> None:
    args = tuple(make("lora").tensors.values())
    torch.library.opcheck(torch.ops.dpkernels.lora_gradients.default, args, {"scaling": SCALING})


def test_refuses_what_lora_norm_sq_refuses() -> None:
    x, h, g, dh = make("lora").tensors.values()
    with pytest.raises(ValueError, match="dh: expected"):
        ops.lora_gradients(x, h, g, dh[:, :, :1])
    with pytest.raises(ValueError, match="scaling: expected a finite number"):
        ops.lora_gradients(x, h, g, dh, scaling=float("nan"))
    assert "lora_gradients" in registry.ops()
