"""The models of Opacus's examples, and ResNet-18 with group norms: for the group *opacus*.

Images are the harness's "input_features" [B, C, T, T]. Models of token ids take these beside a factor [B, 1] of the
logits, by which the examples' gradients differ in norm.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

CLASSES = 10
_VOCABULARY = {"imdb": 10_000, "char-lstm": 128, "bert": 30_522}


class Images(nn.Module):
    """A network of images in the harness's form."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_features: Tensor) -> SimpleNamespace:
        """Logits [B, classes] of images [B, C, T, T]."""
        return SimpleNamespace(logits=self.network(input_features))


class Tokens(nn.Module):
    """A network of token ids in the harness's form."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_features: Tensor, ids: Tensor) -> SimpleNamespace:
        """Logits [B, classes] of ids [B, T], times the factors [B, 1]."""
        return SimpleNamespace(logits=self.network(ids) * input_features)


class _MeanOfWords(nn.Module):
    """IMDB: embedded words, averaged, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(_VOCABULARY["imdb"], 16)
        self.hidden, self.out = nn.Linear(16, 16), nn.Linear(16, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.out(self.hidden(self.words(ids).mean(1)))
        return logits


class _NamesLSTM(nn.Module):
    """char-LSTM: the last hidden state of an LSTM over characters."""

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(_VOCABULARY["char-lstm"], 64)
        self.lstm, self.out = nn.LSTM(64, 128, batch_first=True), nn.Linear(128, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.out(self.lstm(self.characters(ids))[0][:, -1])
        return logits


class _BertClassifier(nn.Module):
    """BERT, of which the last layer, the pooler and the classifier are trained, as in Opacus's tutorial."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        config = transformers.BertConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            intermediate_size=4 * width,
            num_labels=CLASSES,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.bert = transformers.BertForSequenceClassification(config)
        self.bert.requires_grad_(False)
        for part in (self.bert.bert.encoder.layer[-1], self.bert.bert.pooler, self.bert.classifier):
            part.requires_grad_(True)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.bert(input_ids=ids).logits
        return logits


def mnist(case: Any, frames: int) -> nn.Module:
    """Two convolutions and two linear layers, for images of frames × frames pixels."""
    features = nn.Sequential(
        *(nn.Conv2d(1, 16, 8, 2, padding=3), nn.ReLU(), nn.MaxPool2d(2, 1)),
        *(nn.Conv2d(16, 32, 4, 2), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Flatten()),
    )
    width = features(torch.zeros(1, 1, frames, frames)).shape[1]
    return Images(nn.Sequential(features, nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, CLASSES)))


def cifar10(case: Any, frames: int) -> nn.Module:
    """Four 3×3 convolutions with average pooling."""
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)]
    layers += [nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return Images(nn.Sequential(*layers, nn.Linear(128, CLASSES)))


class _Block(nn.Module):
    """Two 3×3 convolutions with group norms, added to their input."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.GroupNorm(32, after), nn.ReLU()),
            *(nn.Conv2d(after, after, 3, padding=1, bias=False), nn.GroupNorm(32, after)),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.GroupNorm(32, after)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet18(case: Any, frames: int) -> nn.Module:
    """ResNet-18 with group norms in place of batch norms."""
    stem = (nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.GroupNorm(32, 64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    blocks = [_Block(64, 64, 1), _Block(64, 64, 1)]
    for before in (64, 128, 256):
        blocks += [_Block(before, 2 * before, 2), _Block(2 * before, 2 * before, 1)]
    return Images(
        nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES))
    )


def imdb(case: Any, frames: int) -> nn.Module:
    """A mean of embedded words."""
    return Tokens(_MeanOfWords())


def char_lstm(case: Any, frames: int) -> nn.Module:
    """An LSTM over the characters of a name."""
    return Tokens(_NamesLSTM())


def bert(case: Any, frames: int) -> nn.Module:
    """BERT with its last layer trained."""
    return Tokens(_BertClassifier(case.width, case.layers))


def image_batch(case: Any, size: int, frames: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random images of one channel (MNIST) or three, with labels."""
    channels = 1 if case.family == "mnist" else 3
    return {
        "input_features": torch.randn(size, channels, frames, frames, generator=generator),
        "labels": torch.randint(0, CLASSES, (size,), generator=generator),
    }


def token_batch(case: Any, size: int, frames: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random ids, with labels."""
    return {
        "input_features": torch.ones(size, 1),
        "ids": torch.randint(0, _VOCABULARY[case.family], (size, frames), generator=generator),
        "labels": torch.randint(0, CLASSES, (size,), generator=generator),
    }
