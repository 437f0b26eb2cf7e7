"""MNIST with a small convolutional network: Opacus's first example, with its loop of one level.

    python examples/opacus_mnist.py
    python examples/opacus_mnist.py --data FOLDER --epochs 10  # torchvision's copy of MNIST

The lines that differ from a script for Opacus are marked.
"""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpkernels import PrivacyEngine

parser = argparse.ArgumentParser()
parser.add_argument("--data", help="the folder that holds MNIST; without it, images are made up")
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--sigma", type=float, default=1.0)
options = parser.parse_args()

if options.data:
    from torchvision import datasets, transforms  # not among this package's dependencies

    scaled = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    data = datasets.MNIST(options.data, train=True, transform=scaled)
else:
    labels = torch.arange(320) % 10
    stripes = torch.sin(torch.arange(28) * (labels[:, None] + 1) / 4)[:, None, None].expand(-1, 1, 28, -1)
    data = TensorDataset(stripes + torch.randn(320, 1, 28, 28) / 4, labels)

model = nn.Sequential(
    *(nn.Conv2d(1, 16, 8, 2, padding=3), nn.ReLU(), nn.MaxPool2d(2, 1)),
    *(nn.Conv2d(16, 32, 4, 2), nn.ReLU(), nn.MaxPool2d(2, 1)),
    *(nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10)),
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
criterion = nn.CrossEntropyLoss(reduction="none")  # one loss for each example

engine = PrivacyEngine()
model, optimizer, loader = engine.make_private(
    module=model,
    optimizer=optimizer,
    data_loader=DataLoader(data, batch_size=options.batch_size),
    noise_multiplier=options.sigma,
    max_grad_norm=1.0,
    physical_batch_size=32,  # in place of a BatchMemoryManager
)
engine.self_check(lambda model, batch: criterion(model(batch[0]), batch[1]))  # before any training

for epoch in range(options.epochs):
    for images, labels in loader.flat():  # micro-batches of all logical batches
        optimizer.backward(criterion(model(images), labels))  # in place of loss.backward()
        optimizer.step()  # acts at the end of a logical batch
        optimizer.zero_grad()
    print(f"epoch {epoch + 1}: epsilon = {engine.get_epsilon(1e-4):.2f} at delta = 1e-4")
