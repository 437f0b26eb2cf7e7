"""A clipping norm that nobody tunes: `clipping="adaptive"` beside flat clipping, from three starting values.

At a C far below the norms of the gradients nothing is learnt in the time given, and far above them the noise, which C
scales, drowns the sum. Adaptive clipping starts from the same three values and follows the median of the norms, by a
noisy count in each step; ε is the same, and covers the count.

    python examples/adaptive_clipping.py
    python examples/adaptive_clipping.py --strategy per_layer
"""

import argparse

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import dpkernels

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=120)
parser.add_argument(
    "--strategy", default="bookkeeping", help="per_layer: a norm, and a count, for each layer"
)
options = parser.parse_args()

CLASSES, FEATURES = 10, 20
torch.manual_seed(0)
centres = torch.randn(CLASSES, FEATURES)


def make_data(examples: int) -> TensorDataset:
    """Points around the centre of their class."""
    labels = torch.randint(0, CLASSES, (examples,))
    return TensorDataset(centres[labels] + 1.2 * torch.randn(examples, FEATURES), labels)


def losses_of(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    """[B], one loss for each example."""
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


train, test = make_data(4000), make_data(1000)


def trained(max_grad_norm: float, clipping: str) -> tuple[float, float]:
    """Accuracy after a private training, and C at its end."""
    torch.manual_seed(1)
    model: nn.Module = nn.Sequential(nn.Linear(FEATURES, 64), nn.Tanh(), nn.Linear(64, CLASSES))
    engine = dpkernels.PrivacyEngine(accountant="rdp")
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(train, batch_size=200),
        target_epsilon=3,
        target_delta=1e-5,
        steps=options.steps,
        max_grad_norm=max_grad_norm,
        clipping=clipping,
        strategy=options.strategy,
    )
    engine.self_check(losses_of)
    for batch in loader.flat():
        optimizer.backward(losses_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        correct = model(test.tensors[0]).argmax(1) == test.tensors[1]
    return float(correct.float().mean()), engine.clip_norm  # C is public: it was made of noisy counts


constant = "per_layer" if options.strategy == "per_layer" else "flat"
for start in (0.01, 1.0, 100.0):
    fixed, _ = trained(start, constant)
    adapted, norm = trained(start, "adaptive")
    print(f"C = {start:g}: accuracy {fixed:.1%}; adaptive: {adapted:.1%}, C = {norm:.3g} at the end")
