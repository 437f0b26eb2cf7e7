"""IMDB's reviews, by a mean of embedded words: Opacus's third example.

    python examples/opacus_imdb.py
    python examples/opacus_imdb.py --data imdb --tokenizer bert-base-cased --epochs 10  # of the `datasets` library

Reviews have different lengths, and `collate` pads them. `self_check` collates some itself, and finds a model whose
result depends on the padding.
"""

import argparse

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from dpkernels import PrivacyEngine

parser = argparse.ArgumentParser()
parser.add_argument("--data", help="a data set of the library `datasets`; without it, reviews are made up")
parser.add_argument("--tokenizer", default="bert-base-cased")
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--batch-size", type=int, default=64)
options = parser.parse_args()

if options.data:
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    reviews = load_dataset(options.data, split="train")
    texts = tokenizer(reviews["text"], truncation=True, max_length=512)["input_ids"]
    data = [(torch.tensor(ids), label) for ids, label in zip(texts, reviews["label"], strict=True)]
    words = len(tokenizer)
else:
    words, data = 1000, []
    for number in range(400):  # the words of a bad review are the smaller numbers
        ids = torch.randint(1, 600, (20 + number % 60,)) + 400 * (number % 2)
        data.append((ids, number % 2))


def collate(reviews):
    """Texts [B, longest], padded with 0, and labels [B]."""
    texts, labels = zip(*reviews, strict=True)
    return pad_sequence(texts, batch_first=True), torch.tensor(labels)


class Classifier(nn.Module):
    """Two linear layers on the mean of the words' embeddings."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(words, 16, padding_idx=0)
        self.hidden, self.out = nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, texts):
        """Logits [B, 2]."""
        lengths = (texts != 0).sum(1, keepdim=True)
        return self.out(self.hidden(self.embedding(texts).sum(1) / lengths))  # a padding's row is 0


model = Classifier()
optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
criterion = nn.CrossEntropyLoss(reduction="none")

engine = PrivacyEngine()
model, optimizer, loader = engine.make_private(
    module=model,
    optimizer=optimizer,
    data_loader=DataLoader(data, batch_size=options.batch_size, collate_fn=collate),
    noise_multiplier=0.6,
    max_grad_norm=1.0,
)
engine.self_check(lambda model, batch: criterion(model(batch[0]), batch[1]))

for epoch in range(options.epochs):
    for texts, labels in loader.flat():
        optimizer.backward(criterion(model(texts), labels))
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch + 1}: epsilon = {engine.get_epsilon(1e-4):.2f} at delta = 1e-4")
