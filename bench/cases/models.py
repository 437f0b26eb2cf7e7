"""The models and batches of the *step* and *model* groups: speech recognisers of known shapes, random weights.

Every contender of a case trains the same parameters from the same weights on the same batch. Full fine-tuning
leaves out what not every contender can train: batch norm (statistics mix the examples), Parakeet's bias_u and
bias_v (raw parameters that Opacus has no rule for), and Whisper's tied token table and positions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import peft
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import dpkernels.nn
from bench.cases import opacus_examples

Batch = dict[str, Tensor]  # "input_features", …: the model's keywords; "labels" is the loss's

SEED = 20
_LABELS = 20  # labels of an utterance, at most: some 12 s of speech
_PARAKEET_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "linear1", "linear2"]


class Criterion(nn.Module):
    """A loss [B] or its mean, by its `reduction`: the form that Opacus's ghost clipping wraps."""

    def __init__(self, losses: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.losses, self.reduction = losses, "mean"

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses = self.losses(logits, labels)
        return losses if self.reduction == "none" else losses.mean()


@dataclass(frozen=True)
class Case:
    """A model, what of it is trained, and batches of any size.

    Attributes:
        name: "parakeet-lora", …; what the results are filed under.
        title: for people.
        family: a key of FAMILIES.
        rank: LoRA's r; None for full fine-tuning.
        width, layers: of the model; the family's own units.
        mixed: what is trained is float32, and the forward runs under autocast to the benchmark's (half) type.
    """

    name: str
    title: str
    family: str
    rank: int | None = None
    width: int = 256
    layers: int = 6
    mixed: bool = False

    def model(self, frames: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
        """A fresh model for batches of `frames` encoder frames, in training mode, the same on every call."""
        # built where it will be: drawing 608.8 M weights on the host takes longer than a GPU's whole benchmark
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(SEED)
            model = FAMILIES[self.family].build(self, frames)
            if self.rank is not None:
                model = _with_lora(model, FAMILIES[self.family].targets, self.rank)
        model.to(device=device, dtype=dtype).train()
        if self.mixed:
            for parameter in trained(model).values():
                parameter.data = parameter.data.float()
        return model

    def batch(self, size: int, frames: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Batch:
        """`size` utterances of `frames` encoder frames each, none of them padded."""
        generator = torch.Generator().manual_seed(SEED + 1)
        batch = FAMILIES[self.family].batch(self, size, frames, generator)
        # Loudness differs between utterances, so that gradients differ in norm and some are clipped.
        loudness = torch.linspace(0.5, 2.0, size).view(-1, *[1] * (batch["input_features"].dim() - 1))
        batch["input_features"] = (batch["input_features"] * loudness).to(dtype)
        return {name: value.to(device) for name, value in batch.items()}

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """One loss an utterance, [B]."""
        return FAMILIES[self.family].losses(logits, labels)

    def at_rank(self, rank: int) -> Case:
        """The same model with adapters of another rank."""
        return replace(self, rank=rank)


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of a batch; under autocast where its type is not that of what is trained."""
    features = batch["input_features"]
    kept = next((p.dtype for p in model.parameters() if p.requires_grad), features.dtype)
    with torch.autocast(features.device.type, features.dtype, enabled=kept != features.dtype):
        logits: Tensor = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return logits


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> trained parameter."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def working_copy(model: nn.Module) -> nn.Module:
    """A copy that shares the frozen parameters: six contenders of a 608.8 M model with adapters fit in memory."""
    frozen: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, frozen)


@dataclass(frozen=True)
class Family:
    """How a family of models is built and fed."""

    build: Callable[[Case, int], nn.Module]
    batch: Callable[[Case, int, int, torch.Generator], Batch]
    losses: Callable[[Tensor, Tensor], Tensor]
    targets: list[str]


def _with_lora(model: nn.Module, targets: list[str], rank: int) -> nn.Module:
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=targets)
    adapted = peft.get_peft_model(model, config)
    for module in adapted.modules():
        if isinstance(module, _OneLayer):
            module.norm.requires_grad_(True)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zeros as they come: A's gradient would be 0, and nothing of it checked
            nn.init.normal_(parameter, std=0.02)
    return adapted


def _parakeet(case: Case, frames: int) -> nn.Module:
    large = case.width >= 1024
    config = transformers.ParakeetCTCConfig(
        vocab_size=1025 if large else 257,
        pad_token_id=1024 if large else 256,
        encoder_config={
            "hidden_size": case.width,
            "num_hidden_layers": case.layers,
            "num_attention_heads": 8 if large else 4,
            "intermediate_size": 4 * case.width,
            "subsampling_conv_channels": 256 if large else 64,
            "dropout": 0.0,
            "dropout_positions": 0.0,
            "activation_dropout": 0.0,
            "attention_dropout": 0.0,
            "layerdrop": 0.0,
        },
    )
    config._attn_implementation = "sdpa"
    model = transformers.ParakeetForCTC(config)
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            module.reset_parameters()  # transformers' N(0, 0.02) lets the signal vanish in the subsampling
    dpkernels.nn.freeze_batch_norm(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith(("bias_u", "bias_v")) and ".conv.norm." not in name)
    return model


def _parakeet_batch(case: Case, size: int, frames: int, generator: torch.Generator) -> Batch:
    labels = min(_LABELS, frames // 2)
    blank = 1024 if case.width >= 1024 else 256
    return {
        "input_features": torch.randn(size, 8 * frames, 80, generator=generator),
        "labels": torch.randint(0, blank, (size, labels), generator=generator),
    }


def _ctc_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """−ln p(labels | audio) a frame; the blank is the last class, every utterance fills its frames."""
    size, frames, classes = logits.shape
    log_probs = logits.float().log_softmax(-1) if logits.dtype != torch.float64 else logits.log_softmax(-1)
    frame_counts, label_counts = (frames,) * size, (labels.shape[1],) * size
    losses = F.ctc_loss(
        log_probs.transpose(0, 1), labels, frame_counts, label_counts, blank=classes - 1, reduction="none"
    )
    return losses / frames


def _whisper_config(case: Case, frames: int) -> Any:
    config = transformers.WhisperConfig(
        d_model=case.width,
        encoder_layers=case.layers,
        decoder_layers=case.layers,
        encoder_attention_heads=case.width // 64,
        decoder_attention_heads=case.width // 64,
        encoder_ffn_dim=4 * case.width,
        decoder_ffn_dim=4 * case.width,
        max_source_positions=frames,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
    )
    config._attn_implementation = "sdpa"
    return config


def _whisper(case: Case, frames: int) -> nn.Module:
    model = transformers.WhisperForConditionalGeneration(_whisper_config(case, frames))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embed_tokens" not in name and "embed_positions" not in name)
    return model


def _whisper_batch(case: Case, size: int, frames: int, generator: torch.Generator) -> Batch:
    tokens = torch.randint(0, 50_000, (size, _LABELS + 1), generator=generator)
    return {
        "input_features": torch.randn(size, 80, 2 * frames, generator=generator),
        "decoder_input_ids": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
    }


def _whisper_encoder(case: Case, frames: int) -> nn.Module:
    return transformers.WhisperForAudioClassification(_whisper_config(case, frames))


def _whisper_encoder_batch(case: Case, size: int, frames: int, generator: torch.Generator) -> Batch:
    return {
        "input_features": torch.randn(size, 80, 2 * frames, generator=generator),
        "labels": torch.randint(0, 2, (size,), generator=generator),
    }


def _class_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    flat = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return flat.view(labels.shape).mean(1)


class _OneLayer(nn.Module):
    """One layer behind a trained LayerNorm: so its backward has an input gradient to compute, as in a model."""

    def __init__(self, layer: nn.Module, width: int, channels_first: bool) -> None:
        super().__init__()
        self.norm, self.layer, self.channels_first = nn.LayerNorm(width), layer, channels_first

    def forward(self, input_features: Tensor) -> SimpleNamespace:
        x = self.norm(input_features)
        out = self.layer(x.transpose(1, 2) if self.channels_first else x)
        return SimpleNamespace(logits=out[0] if isinstance(out, tuple) else out)


class OneAttention(nn.Module):
    """Self-attention in torch's layout, [T,B,d], behind a trained LayerNorm.

    `norm_first`: the norm is before the change of layout, where it has the batch first, or behind it: the same values.
    Opacus wants one layout in all of a model.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.layer, self.norm_first = nn.LayerNorm(width), nn.MultiheadAttention(width, 8), True

    def forward(self, input_features: Tensor) -> SimpleNamespace:
        frames, late = input_features, not self.norm_first
        x = self.norm(frames.transpose(0, 1) if late else frames)
        x = x if late else x.transpose(0, 1)
        return SimpleNamespace(logits=self.layer(x, x, x, need_weights=False)[0].transpose(0, 1))


def _one_layer(case: Case, frames: int) -> nn.Module:
    width, kind = case.width, case.family.removesuffix("-layer")
    if kind == "attention":
        return OneAttention(width)
    layer: nn.Module = nn.Linear(width, 4 * width)
    if kind in _RECURRENT:
        layer = _RECURRENT[kind](width, width, batch_first=True)
    elif kind == "depthwise":
        layer = nn.Conv1d(width, width, 9, padding=4, groups=width)
    return _OneLayer(layer, width, kind == "depthwise")


class _Residual(nn.Module):
    """One linear layer, added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.proj(x), alpha=0.1)


class _Stack(nn.Sequential):
    """Many small layers: a step's time is almost all Python."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__(*(_Residual(width) for _ in range(layers)))

    def forward(self, input_features: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=super().forward(input_features))


def _layer_batch(case: Case, size: int, frames: int, generator: torch.Generator) -> Batch:
    features = torch.randn(size, frames, case.width, generator=generator)
    return {"input_features": features, "labels": torch.zeros(size, 1, dtype=torch.int64)}


def _layer_losses(outputs: Tensor, labels: Tensor) -> Tensor:
    return outputs.flatten(1).square().mean(1)


FAMILIES = {
    "parakeet": Family(_parakeet, _parakeet_batch, _ctc_losses, _PARAKEET_TARGETS),
    "whisper": Family(_whisper, _whisper_batch, _token_losses, ["q_proj", "v_proj"]),
    "whisper-encoder": Family(
        _whisper_encoder,
        _whisper_encoder_batch,
        _class_losses,
        ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    ),
}

_RECURRENT: dict[str, Callable[..., nn.Module]] = {"lstm": nn.LSTM, "gru": nn.GRU}
_LAYERS = (
    ("linear", "Linear 512→2048", None),
    ("lora", "LoRA Linear 512→2048, r=8", 8),
    ("depthwise", "depthwise Conv1d 512, k=9", None),
    *((kind, f"{kind.upper()} 512→512", None) for kind in _RECURRENT),
    ("attention", "MultiheadAttention 512, 8 heads", None),
)
FAMILIES["stack"] = Family(
    lambda case, frames: _Stack(case.width, case.layers), _layer_batch, _layer_losses, ["proj"]
)
_OPACUS = (
    # name, title, model, batch, width, layers
    ("mnist", "MNIST convnet", opacus_examples.mnist, opacus_examples.image_batch, 32, 2),
    ("cifar10", "CIFAR-10 convnet", opacus_examples.cifar10, opacus_examples.image_batch, 128, 4),
    ("resnet18", "ResNet-18, group norms", opacus_examples.resnet18, opacus_examples.image_batch, 64, 18),
    ("imdb", "IMDB, mean of embedded words", opacus_examples.imdb, opacus_examples.token_batch, 16, 2),
    (
        "char-lstm",
        "Names, LSTM over characters",
        opacus_examples.char_lstm,
        opacus_examples.token_batch,
        128,
        1,
    ),
    ("bert", "BERT-base, last layer", opacus_examples.bert, opacus_examples.token_batch, 768, 12),
)
FAMILIES |= {name: Family(model, batch, _class_losses, []) for name, _, model, batch, *_ in _OPACUS}
FAMILIES |= {
    f"{kind}-layer": Family(_one_layer, _layer_batch, _layer_losses, ["layer"]) for kind, *_ in _LAYERS
}

CASES = {
    case.name: case
    for case in (
        Case("parakeet-lora", "Parakeet-CTC 9.7 M, LoRA r=8", "parakeet", 8),
        Case("parakeet-full", "Parakeet-CTC 9.7 M, full", "parakeet"),
        Case("whisper-lora", "Whisper-tiny, LoRA r=8", "whisper", 8, 384, 4),
        Case("whisper-full", "Whisper-tiny, full", "whisper", None, 384, 4),
        Case(
            "whisper-large-encoder-lora",
            "Whisper-large's encoder, 2 of 32 layers, LoRA r=16",
            "whisper-encoder",
            16,
            1280,
            2,
        ),
        Case("parakeet-600m-lora", "Parakeet-CTC 608.8 M, LoRA r=8", "parakeet", 8, 1024, 24),
        Case(
            "parakeet-600m-lora-mixed",
            "Parakeet-CTC 608.8 M, LoRA, mixed",
            "parakeet",
            8,
            1024,
            24,
            mixed=True,
        ),
        *(Case(f"{kind}-layer", f"One {title}", f"{kind}-layer", rank, 512) for kind, title, rank in _LAYERS),
        *(Case(name, title, name, None, width, layers) for name, title, _, _, width, layers in _OPACUS),
        # For `bench.host`, and `bench.compare --size 2 --frames 2`: the host's time of a step.
        Case("host-lora", "192 LoRA layers 8→8, r=2", "stack", 2, 8, 192),
        Case("host-linear", "192 linear layers 8→8", "stack", None, 8, 192),
        Case("host-parakeet-lora", "Narrow Parakeet-CTC, 192 LoRA layers, r=2", "parakeet", 2, 16, 24),
        # For tests of the benchmarks themselves.
        Case("tiny-lora", "Parakeet-CTC, tiny, LoRA r=2", "parakeet", 2, 32, 1),
        Case("tiny-lora-mixed", "Parakeet-CTC, tiny, LoRA r=2, mixed", "parakeet", 2, 32, 1, mixed=True),
        Case("tiny-full", "Parakeet-CTC, tiny, full", "parakeet", None, 32, 1),
    )
}
