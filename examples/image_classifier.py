"""An image classifier, trained with differential privacy.

A small convolutional network learns to tell ten patterns apart in noisy images. The patterns stand for a data
set; your own images come from a file that `numpy.savez("images.npz", images=..., labels=...)` wrote, images
[N, C, H, W].

    python examples/image_classifier.py
    python examples/image_classifier.py --data images.npz --epsilon 3 --steps 500 --batch-size 512
"""

import argparse

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import dpkernels
from dpkernels.rounding import shown_epsilon

parser = argparse.ArgumentParser()
parser.add_argument("--data", help="an .npz file with images [N, C, H, W] and labels [N]; default: patterns")
parser.add_argument("--epsilon", type=float, default=8.0)
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--batch-size", type=int, default=256)
options = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"

# The data: a tenth of it is kept for the test.
if options.data:
    arrays = np.load(options.data)
    images, labels = torch.tensor(arrays["images"]).float(), torch.tensor(arrays["labels"]).long()
else:
    labels = torch.randint(0, 10, (2200,))
    patterns = torch.randn(10, 1, 12, 12)
    images = patterns[labels] + torch.randn(len(labels), 1, 12, 12)
test_size = len(images) // 10
data = TensorDataset(images[test_size:], labels[test_size:])
test_images, test_labels = images[:test_size].to(device), labels[:test_size].to(device)

# The model: group norms in place of batch norms, which would mix the examples of a batch.
model = nn.Sequential(
    nn.Conv2d(images.shape[1], 16, 3, padding=1),
    nn.GroupNorm(4, 16),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Conv2d(16, 32, 3, padding=1),
    nn.GroupNorm(4, 32),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(2),
    nn.Flatten(),
    nn.Linear(128, int(labels.max()) + 1),
).to(device)


def losses_of(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    """One loss an example, [B]: nothing is averaged over the batch."""
    images, labels = (part.to(device) for part in batch)
    return cross_entropy(model(images), labels, reduction="none")


def accuracy() -> float:
    """The share of the test images that the model classifies correctly."""
    model.eval()
    with torch.no_grad():
        right = model(test_images).argmax(1) == test_labels
    model.train()
    return right.float().mean().item()


print(f"before training: accuracy {accuracy():.1%}")

# From here on every step is private. δ is below one over the number of examples.
engine = dpkernels.PrivacyEngine()
model, optimizer, loader = engine.make_private_with_epsilon(
    module=model,
    optimizer=torch.optim.Adam(model.parameters(), lr=5e-3),
    data_loader=DataLoader(data, batch_size=options.batch_size),
    target_epsilon=options.epsilon,
    target_delta=0.1 / len(data),
    steps=options.steps,
    max_grad_norm=1.0,
    physical_batch_size=128,
)
engine.self_check(losses_of)

for logical_batch in loader:
    for batch in logical_batch:
        optimizer.backward(losses_of(model, batch))
    optimizer.step()
    optimizer.zero_grad()

print(f"after {engine.steps} private steps: accuracy {accuracy():.1%}")
print(f"epsilon = {shown_epsilon(engine.get_epsilon(), 2)} at delta = {0.1 / len(data):.1e}")
