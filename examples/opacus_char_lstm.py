"""Names and their languages, by an LSTM over characters: Opacus's fourth example.

    python examples/opacus_char_lstm.py
    python examples/opacus_char_lstm.py --data FOLDER --epochs 50 --batch-size 800  # LANGUAGE.txt, a name a line

Opacus needs its own DPLSTM. Here torch's nn.LSTM is private as it is; a DPLSTM works too, but takes longer.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dpkernels import PrivacyEngine

parser = argparse.ArgumentParser()
parser.add_argument("--data", type=Path, help="a folder of LANGUAGE.txt; without it, names are made up")
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--batch-size", type=int, default=80)
options = parser.parse_args()

LENGTH = 15  # characters of a name; the others are left out, and shorter names are padded at their start
if options.data:
    files = sorted(options.data.glob("*.txt"))
    names = [
        (name, place) for place, file in enumerate(files) for name in file.read_text("utf-8").splitlines()
    ]
else:
    endings, letters = ["ov", "ini", "sen", "eau"], "bdgklmnprst"
    syllables = torch.randint(len(letters), (600, 2))
    names = [
        ("".join(letters[i] + "a" for i in row) + endings[number % 4], number % 4)
        for number, row in enumerate(syllables.tolist())
    ]


def characters(name):
    """The codes of the last LENGTH characters."""
    codes = [min(ord(letter), 127) for letter in name[-LENGTH:]]
    return [0] * (LENGTH - len(codes)) + codes


data = TensorDataset(
    torch.tensor([characters(name) for name, _ in names]), torch.tensor([language for _, language in names])
)


class Classifier(nn.Module):
    """The last hidden state of an LSTM, and a linear layer."""

    def __init__(self, languages):
        super().__init__()
        self.embedding = nn.Embedding(128, 64)
        self.lstm, self.out = nn.LSTM(64, 128, batch_first=True), nn.Linear(128, languages)

    def forward(self, names):
        """Logits [B, languages]."""
        return self.out(self.lstm(self.embedding(names))[0][:, -1])


model = Classifier(languages=len({language for _, language in names}))
optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
criterion = nn.CrossEntropyLoss(reduction="none")

engine = PrivacyEngine()
model, optimizer, loader = engine.make_private_with_epsilon(
    module=model,
    optimizer=optimizer,
    data_loader=DataLoader(data, batch_size=options.batch_size),
    target_epsilon=8,
    target_delta=1e-4,
    epochs=options.epochs,
    max_grad_norm=1.5,
)
engine.self_check(lambda model, batch: criterion(model(batch[0]), batch[1]))

for epoch in range(options.epochs):
    for batch, languages in loader.flat():
        optimizer.backward(criterion(model(batch), languages))
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch + 1}: epsilon = {engine.get_epsilon():.2f} at delta = 1e-4")
