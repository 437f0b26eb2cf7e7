"""A private training with Opacus: the script before the change.

[opacus_after.py](opacus_after.py) is the same training with dpkernels. `diff` shows the lines that change:

    diff examples/opacus_before.py examples/opacus_after.py
"""

import argparse

import torch
from opacus import PrivacyEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--examples", type=int, default=600)
parser.add_argument("--epochs", type=int, default=2)
options = parser.parse_args()

features = torch.randn(options.examples, 30)
data = TensorDataset(features, (features.sum(1) > 0).long())
model = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 2))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
criterion = nn.CrossEntropyLoss()

engine = PrivacyEngine(accountant="rdp")
model, optimizer, loader = engine.make_private_with_epsilon(
    module=model,
    optimizer=optimizer,
    data_loader=DataLoader(data, batch_size=120),
    target_epsilon=8,
    target_delta=1e-4,
    epochs=options.epochs,
    max_grad_norm=1.0,
)

for _ in range(options.epochs):
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=64, optimizer=optimizer) as batches:
        for x, y in batches:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()

accuracy = (model(data.tensors[0]).argmax(1) == data.tensors[1]).float().mean().item()
print(f"accuracy {accuracy:.1%}, epsilon = {engine.get_epsilon(1e-4):.2f}")
