"""Mixed precision, and the clipping strategies side by side.

The model computes in bfloat16 under autocast, its parameters stay float32. Each strategy trains the same
model on the same batch, without noise so that the results can be compared. The three that clip the whole
gradient give the same update, but for the rounding of bfloat16; `per_layer` clips each layer on its own and
gives another one.

    python examples/strategies.py
    python examples/strategies.py --width 1024 --frames 750 --batch-size 32
"""

import argparse
import time
import warnings

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import dpkernels

parser = argparse.ArgumentParser()
parser.add_argument("--width", type=int, default=64)
parser.add_argument("--frames", type=int, default=40)
parser.add_argument("--batch-size", type=int, default=8)
options = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"


class Block(nn.Module):
    """A residual block, whose activations are computed again in the backward where that is asked for."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.first, self.second = (
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.Linear(width, width),
        )
        self.recompute = False

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        """What is added to x."""
        return self.second(torch.relu(self.first(self.norm(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x plus the inner part."""
        return x + (checkpoint(self.inner, x, use_reentrant=False) if self.recompute else self.inner(x))


def make_model(recompute: bool) -> nn.Module:
    """The same weights each time."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(options.width) for _ in range(3)), nn.Linear(options.width, 1)).to(device)
    for block in model[:-1]:
        block.recompute = recompute
    return model


def losses_of(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    """Squared errors in float32, averaged over an example's own frames: [B]."""
    x, y = (part.to(device) for part in batch)
    with torch.autocast(device, dtype=torch.bfloat16):
        output = model(x)
    return (output.squeeze(-1).float() - y).square().mean(dim=1)


torch.manual_seed(1)
size = options.batch_size
data = TensorDataset(
    torch.randn(4 * size, options.frames, options.width), torch.randn(4 * size, options.frames)
)
batch = [part[:size] for part in data.tensors]


def update(strategy: str, recompute: bool) -> torch.Tensor:
    """The clipped sum over the batch size, all parameters in one vector."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="noise_multiplier=0")  # there is nothing private here
        model, optimizer, _ = dpkernels.PrivacyEngine().make_private(
            module=(model := make_model(recompute)),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
            data_loader=DataLoader(data, batch_size=size),
            noise_multiplier=0.0,
            max_grad_norm=0.1,
            strategy=strategy,
        )
    optimizer.keep_gradients = True
    for _ in range(2):  # the first step also learns which axes carry the batch
        optimizer.zero_grad()
        start = time.perf_counter()
        optimizer.backward(losses_of(model, batch))
        optimizer.step()
        milliseconds = 1000 * (time.perf_counter() - start)
    print(f"{strategy:12} {'recomputed' if recompute else 'kept':12} {milliseconds:8.1f} ms")
    return torch.cat([p.grad.flatten() for p in model.parameters()])


print(f"{'strategy':12} {'activations':12} {'one step':>11}")
reference = update("bookkeeping", recompute=False)
for strategy in ("bookkeeping", "mixed", "two_pass"):
    for recompute in (False, True):
        difference = (update(strategy, recompute) - reference).norm() / reference.norm()
        assert difference < 1e-2, difference
other = (update("per_layer", recompute=True) - reference).norm() / reference.norm()
print(f"flat clipping: the same update with every strategy; per_layer's differs by {other:.0%}")
