from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpkernels.nn import (
    FrozenBatchNorm,
    FrozenBatchNorm1d,
    GhostLayerNorm,
    GhostRMSNorm,
    attach,
    batch_norms_in_training,
    freeze_batch_norm,
    swap,
    uncovered,
)
from tests.nn.per_sample import assert_same_module, check_private


def cubes(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    y = y if y.dtype is torch.float64 else y.float()
    return (y + 0.3 * y**2).flatten(1).sum(1)


def randomised(model: nn.Module) -> nn.Module:
    for p in model.parameters():
        nn.init.normal_(p)
    for name, b in model.named_buffers():
        if b.is_floating_point():
            nn.init.uniform_(b, 0.5, 2) if "var" in name else nn.init.normal_(b)
    return model


NORMS: list[Any] = [
    lambda: nn.LayerNorm(6),
    lambda: nn.LayerNorm(6, bias=False),
    lambda: nn.LayerNorm((2, 6)),
    lambda: nn.RMSNorm(6),
    lambda: nn.RMSNorm(6, eps=1e-2),
    lambda: nn.RMSNorm((2, 6)),
]


@pytest.mark.thinned(5)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", NORMS)
@pytest.mark.parametrize("shape", [(4, 2, 6), (4, 3, 2, 6)])
def test_layer_and_rms_norm(make: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    plain = randomised(make()).to(dtype)
    ghost = swap(copy.deepcopy(plain))
    assert type(ghost) in (GhostLayerNorm, GhostRMSNorm)
    assert_same_module(plain, ghost)
    x = (torch.randn(shape) * 3 + 1).to(dtype)
    assert torch.equal(plain(x), ghost(x))
    tape = attach(ghost)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y1, y2 = plain(x1), ghost(x2)
    assert torch.equal(y1, y2)
    tape.open(len(x))
    y1.float().pow(2).sum().backward()
    y2.float().pow(2).sum().backward()
    assert len(tape.close()) == len(list(plain.parameters()))
    # by norm: an entry that cancels is off by any factor, in torch's own bfloat16 arithmetic too
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    difference = (x1.grad.double() - x2.grad.double()).norm()
    assert difference <= tolerance * x1.grad.double().norm()
    check_private(nn.Sequential(nn.Tanh(), plain, nn.Tanh()), cubes, (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_of_quiet_inputs_has_torchs_default_epsilon(dtype: torch.dtype) -> None:
    # a root mean square of 0.1 is about √ε of bfloat16
    plain = randomised(nn.RMSNorm(6)).to(dtype)
    x = (torch.randn(4, 3, 6) * 0.1).to(dtype)
    assert torch.equal(plain(x), swap(copy.deepcopy(plain))(x))
    check_private(plain, cubes, (x,))


def test_two_dimensional_input_and_frozen_parts() -> None:
    for frozen in ("weight", "bias"):
        plain = randomised(nn.Sequential(nn.LayerNorm(6), nn.Tanh(), nn.LayerNorm(6)))
        for layer in (plain[0], plain[2]):
            getattr(layer, frozen).requires_grad_(False)
        check_private(plain, cubes, (torch.randn(4, 6),))


def test_autocast_gives_the_dtype_that_torch_gives() -> None:
    for make in NORMS:
        plain = randomised(make())
        ghost = swap(copy.deepcopy(plain))
        tape = attach(ghost)
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(4, 2, 6).to(dtype)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                want, y = plain(x), ghost(x)
            assert torch.equal(want, y)
            assert want.dtype == y.dtype
            tape.open(4)
            y.float().sum().backward()
            tape.close()


BATCH_NORMS: list[Any] = [
    (lambda: nn.BatchNorm1d(3), (4, 3)),
    (lambda: nn.BatchNorm1d(3), (4, 3, 5)),
    (lambda: nn.BatchNorm2d(3), (4, 3, 5, 2)),
    (lambda: nn.BatchNorm3d(3), (4, 3, 2, 2, 2)),
    (lambda: nn.BatchNorm1d(3, affine=False), (4, 3, 5)),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("make", "shape"), BATCH_NORMS)
def test_frozen_batch_norm(make: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    plain = randomised(nn.Sequential(nn.Tanh(), make(), nn.Tanh())).to(dtype)
    x = torch.randn(shape).to(dtype)
    frozen = freeze_batch_norm(copy.deepcopy(plain))
    assert isinstance(frozen[1], FrozenBatchNorm)
    assert_same_module(plain, frozen)
    want = plain.eval()(x)
    before = frozen[1].running_mean.clone()
    assert torch.equal(frozen.train()(x), want)
    assert torch.equal(frozen[1].running_mean, before)
    if plain[1].affine:
        check_private(frozen, cubes, (x,))


def test_batch_norms_in_training_are_named() -> None:
    model = nn.Sequential(
        nn.BatchNorm1d(3), nn.BatchNorm2d(3).eval(), nn.BatchNorm1d(3, track_running_stats=False)
    )
    assert batch_norms_in_training(model) == ["0", "2"]
    assert batch_norms_in_training(model.eval()) == ["2"]
    with pytest.raises(ValueError, match=r"'2' \(BatchNorm1d\): no running statistics"):
        freeze_batch_norm(model)
    del model[2]
    assert batch_norms_in_training(freeze_batch_norm(model).train()) == []
    with pytest.raises(ValueError, match="SyncBatchNorm"):
        freeze_batch_norm(nn.Sequential(nn.SyncBatchNorm(3)))


def test_unfrozen_batch_norm_has_no_rule() -> None:
    found = uncovered(swap(nn.Sequential(nn.BatchNorm1d(3).eval())))
    assert [u.name for u in found] == ["0.weight", "0.bias"]
    assert "freeze_batch_norm" in found[0].reason
    with pytest.raises(ValueError, match="running statistics"):
        FrozenBatchNorm1d(3, track_running_stats=False)(torch.randn(4, 3))


def test_gradcheck_in_the_plain_path() -> None:
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    for layer in (GhostLayerNorm(6), GhostRMSNorm(6), FrozenBatchNorm1d(3)):
        assert torch.autograd.gradcheck(layer.double(), (x,))
