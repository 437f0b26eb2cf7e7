"""A layer of your own: first as it is, then with a rule.

`Gain` multiplies every feature by a trained factor. It is small, so it is private without any work: its per-
sample gradients are materialised by asking its backward for one example after the other. A rule makes that
fast. The rule is a subclass that says in its backward what an example's gradient is. At the end both are
compared with gradients taken one by one.

    python examples/custom_layer.py
    python examples/custom_layer.py --features 1024 --batch-size 64
"""

import argparse

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.data import DataLoader, TensorDataset

import dpkernels
from dpkernels.nn import ExpandedRecord, GhostModule, register_swap

parser = argparse.ArgumentParser()
parser.add_argument("--features", type=int, default=12)
parser.add_argument("--batch-size", type=int, default=8)
options = parser.parse_args()
MAX_NORM = 0.5


class Gain(nn.Module):
    """y = x ⊙ w, for x [B, T, d] and w [d]."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        """The product, feature by feature."""
        return x * self.weight


class GhostGain(GhostModule, Gain):
    """The same layer with a rule: sample i's gradient of w is Σ_t x_it ⊙ g_it, a vector."""

    ghost_covers = ghost_forms = ("weight",)  # what the rule is for, and what is kept as per-sample gradients

    def forward(self, x: Tensor) -> Tensor:
        """As Gain's; in a private step the backward also puts a record on the tape."""
        if not self._ghost_active(self.weight):
            return super().forward(x)
        return GainFunction.apply(x, self.weight, self)


class GainFunction(torch.autograd.Function):
    """Returns the gradient of x, and a record in place of the gradient of w."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, layer: GhostGain) -> Tensor:
        """The layer's value; what the backward needs is kept."""
        ctx.save_for_backward(x, weight)
        ctx.parameter, ctx.tape, ctx.label = weight, layer.ghost_tape, layer.ghost_label()
        return x * weight

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor, None, None]:
        """dx = g ⊙ w; the sum over time is taken here, so that only [B, d] is kept."""
        x, weight = ctx.saved_tensors
        per_sample = (x.float() * g.float()).sum(dim=1)
        ctx.tape.add(ExpandedRecord(ctx.label, ctx.parameter, per_sample))
        return g * weight, None, None


def make_model() -> nn.Module:
    """A model with the layer in it; the same weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, options.features), Gain(options.features), nn.Linear(options.features, 1)
    )


def losses_of(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Squared errors, averaged over an example's own frames: [B]."""
    x, y = batch
    return (model(x).squeeze(-1) - y).square().mean(dim=1)


data = TensorDataset(torch.randn(100, 5, 6), torch.randn(100, 5))
batch = [part[: options.batch_size] for part in data.tensors]


def private_sum(model: nn.Module) -> dict[str, Tensor]:
    """The clipped sum of a private step, without noise so that it can be compared; parameter by parameter."""
    model, optimizer, _ = dpkernels.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        data_loader=DataLoader(data, batch_size=options.batch_size),
        noise_multiplier=0.0,  # not private: the engine warns
        max_grad_norm=MAX_NORM,
    )
    print(dpkernels.coverage(model))
    optimizer.keep_gradients = True
    optimizer.backward(losses_of(model, batch))
    optimizer.step()
    return {name: p.grad * options.batch_size for name, p in model.named_parameters()}


def one_by_one(model: nn.Module) -> dict[str, Tensor]:
    """The same sum in plain PyTorch: each example's gradient alone, scaled to norm MAX_NORM at most."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    sums = [torch.zeros_like(p) for p in parameters]
    for row in range(options.batch_size):
        loss = losses_of(model, [part[row : row + 1] for part in batch]).sum()
        gradient = torch.autograd.grad(loss, parameters)
        norm = torch.stack([part.norm() for part in gradient]).norm()
        for total, part in zip(sums, gradient, strict=True):
            total += part * (MAX_NORM / norm).clamp(max=1)
    return dict(zip(names, sums, strict=True))


exact = one_by_one(make_model())
print("\nGain as it is:")
expanded = private_sum(make_model())
register_swap(Gain, GhostGain)
print("\nGain with its rule:")
ruled = private_sum(make_model())

for title, sums in {"as it is": expanded, "with its rule": ruled}.items():
    error = max((sums[name] - exact[name]).norm() / exact[name].norm() for name in exact)
    print(f"{title}: at most {error:.1e} from the gradients taken one by one")
    assert error < 1e-3
