"""CIFAR-10 with a convolutional network, or with ResNet-18: Opacus's second example.

    python examples/opacus_cifar10.py
    python examples/opacus_cifar10.py --data FOLDER --model resnet18 --epochs 10 --batch-size 512

ResNet-18 and CIFAR-10 are torchvision's. Group norms replace its batch norms, as in Opacus's example: in a batch norm
every example's output depends on the others.
"""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpkernels

parser = argparse.ArgumentParser()
parser.add_argument("--data", help="the folder that holds CIFAR-10; without it, images are made up")
parser.add_argument("--model", choices=["convnet", "resnet18"], default="convnet")
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--epsilon", type=float, default=8.0)
options = parser.parse_args()

if options.data:
    from torchvision import datasets, transforms  # not among this package's dependencies

    scaled = [transforms.ToTensor(), transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))]
    augmented = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *scaled]
    data = datasets.CIFAR10(options.data, train=True, transform=transforms.Compose(augmented))
else:
    labels = torch.arange(320) % 10
    colours = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(colours[labels][:, :, None, None] + torch.randn(320, 3, 32, 32), labels)

if options.model == "resnet18":
    from torchvision import models

    model = models.resnet18(num_classes=10)
    print(dpkernels.fix(model, batch_norm="group"))  # in place of ModuleValidator.fix
else:
    model = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(128, 10)),
    )
optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)
criterion = nn.CrossEntropyLoss(reduction="none")

engine = dpkernels.PrivacyEngine()
model, optimizer, loader = engine.make_private_with_epsilon(
    module=model,
    optimizer=optimizer,
    data_loader=DataLoader(data, batch_size=options.batch_size),
    target_epsilon=options.epsilon,
    target_delta=1e-5,
    epochs=options.epochs,
    max_grad_norm=10.0,
    physical_batch_size=64,
)
steps = options.epochs * len(loader)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
engine.self_check(lambda model, batch: criterion(model(batch[0]), batch[1]))

for epoch in range(options.epochs):
    for images, labels in loader.flat(after_step=scheduler.step):  # a step of an empty batch counts, too
        optimizer.backward(criterion(model(images), labels))
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch + 1}: epsilon = {engine.get_epsilon():.2f} at delta = 1e-5")
