"""Per-sample norms of one layer: by Opacus's ghost clipping as it stands or with ours, and by float64 autograd."""

from __future__ import annotations

import copy
import warnings

import torch
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from torch import Tensor, nn


def ghost_norms(layer: nn.Module, x: Tensor, g: Tensor, *, batch_first: bool = True) -> dict[str, Tensor]:
    """name -> norms [B] as float64, from Opacus's hooks with whatever samplers are registered now; loss Σ y ⊙ g."""
    layer = copy.deepcopy(layer).train()
    with warnings.catch_warnings():
        # torch's full backward hooks warn of inputs that need no gradient, which an only layer's never do
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        wrapped = GradSampleModuleFastGradientClipping(layer, batch_first=batch_first, loss_reduction="sum")
        y = wrapped(x)
        y.backward(g.to(y.dtype))
    return {
        name: p._norm_sample.double()
        for name, p in layer.named_parameters()
        if p.requires_grad  # type: ignore[attr-defined]
    }


def exact_norms(layer: nn.Module, x: Tensor, g: Tensor, *, batch_first: bool = True) -> dict[str, Tensor]:
    """name -> norms [B] float64, one example at a time, of the same x and g."""
    layer = copy.deepcopy(layer).double()
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    dim = 0 if batch_first else 1
    rows = []
    for i in range(x.shape[dim]):
        one, its_g = x.narrow(dim, i, 1), g.narrow(dim, i, 1).double()
        y = layer(one.double() if one.is_floating_point() else one)
        rows.append([part.norm() for part in torch.autograd.grad(y, list(trained.values()), its_g)])
    return {name: torch.stack([row[k] for row in rows]) for k, name in enumerate(trained)}
