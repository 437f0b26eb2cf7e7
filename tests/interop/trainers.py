"""Small models of transformers with data and collators, a Trainer around them, and the engine's own loop beside it."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dpkernels.interop.trainer import (
    PrivacyArguments,
    PrivateSeq2SeqTrainer,
    PrivateTrainer,
    losses_per_example,
)
from dpkernels.privacy import PrivacyEngine

KEY = "0f" * 32
DELTA = 1e-3
WORDS, CLASSES, EXAMPLES = 20, 3, 24


@dataclass
class Case:
    """A model, its training set, and the collator that makes its batches."""

    model: nn.Module
    data: list[dict[str, Any]]
    kind: type = PrivateTrainer

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {name: padded(name, [row[name] for row in rows]) for name in rows[0]}


def padded(name: str, values: list[Any]) -> Tensor:
    tensors = [torch.as_tensor(value) for value in values]
    filler = -100 if name == "labels" else 0
    return (
        nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=filler)
        if tensors[0].dim()
        else (torch.stack(tensors))
    )


def tokens(generator: torch.Generator, longest: int = 9) -> Tensor:
    length = int(torch.randint(3, longest, (), generator=generator))
    return torch.randint(3, WORDS, (length,), generator=generator)


def case(name: str, *, dropout: float = 0.0) -> Case:
    """A model of a kind by name: "causal", "masked", "sequence", "several", "regression", "token", "seq2seq", "ctc"."""
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(1)
    texts = [tokens(generator) for _ in range(EXAMPLES)]
    masks = [torch.ones_like(ids) for ids in texts]
    rows = [{"input_ids": ids, "attention_mask": mask} for ids, mask in zip(texts, masks, strict=True)]
    if name == "causal":
        config = transformers.GPT2Config(
            vocab_size=WORDS,
            n_positions=12,
            n_embd=16,
            n_layer=2,
            n_head=2,
            bos_token_id=1,
            eos_token_id=2,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout),
        )
        return Case(
            transformers.GPT2LMHeadModel(config), [{**row, "labels": row["input_ids"]} for row in rows]
        )
    if name == "seq2seq":
        return whisper(generator, dropout)
    if name == "ctc":
        return wav2vec2_bert(generator, dropout)
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
        num_labels=1 if name == "regression" else CLASSES,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    labels = {
        "masked": lambda ids: torch.where(torch.arange(len(ids)) % 2 == 0, ids, -100),
        "sequence": lambda ids: int(ids[0]) % CLASSES,
        "several": lambda ids: torch.arange(CLASSES).float() % 2,
        "regression": lambda ids: float(ids[0]) / WORDS,
        "token": lambda ids: ids % CLASSES,
    }[name]
    kinds = {"masked": "BertForMaskedLM", "token": "BertForTokenClassification"}
    model = getattr(transformers, kinds.get(name, "BertForSequenceClassification"))(config)
    return Case(model, [{**row, "labels": labels(row["input_ids"])} for row in rows])


def whisper(generator: torch.Generator, dropout: float) -> Case:
    config = transformers.WhisperConfig(
        vocab_size=WORDS,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_source_positions=6,
        max_target_positions=12,
        decoder_start_token_id=1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        dropout=dropout,
    )
    data = [
        {"input_features": torch.randn(8, 12, generator=generator), "labels": tokens(generator)}
        for _ in range(EXAMPLES)
    ]
    return Case(transformers.WhisperForConditionalGeneration(config), data, PrivateSeq2SeqTrainer)


def wav2vec2_bert(generator: torch.Generator, dropout: float) -> Case:
    config = transformers.Wav2Vec2BertConfig(
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        feature_projection_input_dim=6,
        conv_depthwise_kernel_size=3,
        ctc_loss_reduction="mean",
        pad_token_id=0,
        apply_spec_augment=False,
        **dict.fromkeys(
            ("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout", "layerdrop"),
            dropout,
        ),
        final_dropout=dropout,
        conformer_conv_dropout=dropout,
    )
    data = []
    for _ in range(EXAMPLES):
        features = torch.randn(int(torch.randint(20, 30, (), generator=generator)), 6, generator=generator)
        mask = torch.ones(len(features), dtype=torch.long)
        data.append({"input_features": features, "attention_mask": mask, "labels": tokens(generator)})
    return Case(transformers.Wav2Vec2BertForCTC(config), data)


def privacy(**arguments: Any) -> PrivacyArguments:
    """With a fixed key, σ = 1 and no self-check."""
    given: dict[str, Any] = {"noise_multiplier": 1.0, "noise_key": KEY, "self_check": False}
    return PrivacyArguments(target_delta=DELTA, **{"max_grad_norm": 1.0, **given, **arguments})


def arguments(folder: Path, kind: type = PrivateTrainer, **given: Any) -> Any:
    """TrainingArguments of four steps, with a logical batch of 8 examples in micro-batches of 4."""
    of_kind = kind in (PrivateSeq2SeqTrainer,)
    make = transformers.Seq2SeqTrainingArguments if of_kind else transformers.TrainingArguments
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 100,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return make(output_dir=str(folder), **{**defaults, **given})


def trainer(folder: Path, of: Case, *, private: PrivacyArguments | None = None, **given: Any) -> Any:
    """A private trainer; arguments that it does not have are TrainingArguments'."""
    own = (
        "lengths",
        "speakers",
        "compute_loss_per_example",
        "callbacks",
        "optimizers",
        "eval_dataset",
        "model_init",
    )
    of_trainer = {name: given.pop(name) for name in own if name in given}
    of_trainer["data_collator"] = given.pop("data_collator", of.collate)
    of_trainer["train_dataset"] = given.pop("train_dataset", of.data)
    kind = given.pop("kind", of.kind)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="noise_key|noise_multiplier=0")
        return kind(
            None if "model_init" in of_trainer else of.model,
            arguments(folder, kind, **given),
            privacy=private or privacy(),
            **of_trainer,
        )


class Weights(transformers.TrainerCallback):
    """Keeps the model's parameters after each step."""

    def __init__(self) -> None:
        self.after: list[dict[str, Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.after.append(weights_of(model))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def engine_loop(of: Case, *, steps: int = 4, lr: float = 1e-2, **run: Any) -> list[dict[str, Tensor]]:
    """The parameters after each step of the engine's own loop, under the same key, as `trainer` trains by default."""
    model = copy.deepcopy(of.model)
    optimizer: Any = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="noise_key|no self_check")
        engine = PrivacyEngine(noise_key=bytes.fromhex(KEY))
        model, optimizer, loader = engine.make_private(
            module=model,
            optimizer=optimizer,
            data_loader=DataLoader(of.data, batch_size=8, collate_fn=of.collate),  # type: ignore[arg-type]
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            physical_batch_size=4,
            steps=steps,
            **run,
        )
        schedule = transformers.get_scheduler("linear", optimizer, 0, steps)
        after = []
        model.train()
        for logical_batch in loader:
            for batch in logical_batch:
                optimizer.backward(losses_per_example(model, batch))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            after.append(weights_of(model))
    return after
