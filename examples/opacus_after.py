"""The same private training with dpkernels: the script after the change.

[opacus_before.py](opacus_before.py) is the script before it. [From Opacus](../docs/opacus.md) explains each
line.

    diff examples/opacus_before.py examples/opacus_after.py
"""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpkernels import PrivacyEngine
from dpkernels.rounding import shown_epsilon

parser = argparse.ArgumentParser()
parser.add_argument("--examples", type=int, default=600)
parser.add_argument("--epochs", type=int, default=2)
options = parser.parse_args()

features = torch.randn(options.examples, 30)
data = TensorDataset(features, (features.sum(1) > 0).long())
model = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 2))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
criterion = nn.CrossEntropyLoss(reduction="none")

engine = PrivacyEngine()
model, optimizer, loader = engine.make_private_with_epsilon(
    module=model,
    optimizer=optimizer,
    data_loader=DataLoader(data, batch_size=120),
    target_epsilon=8,
    target_delta=1e-4,
    epochs=options.epochs,
    max_grad_norm=1.0,
    physical_batch_size=64,
)
engine.self_check(lambda model, batch: criterion(model(batch[0]), batch[1]))

for _ in range(options.epochs):
    for logical_batch in loader:
        for x, y in logical_batch:
            optimizer.backward(criterion(model(x), y))
        optimizer.step()
        optimizer.zero_grad()

accuracy = (model(data.tensors[0]).argmax(1) == data.tensors[1]).float().mean().item()
print(f"accuracy {accuracy:.1%}, epsilon = {shown_epsilon(engine.get_epsilon(1e-4), 2)}")
