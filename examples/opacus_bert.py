"""Sentence pairs by BERT, of which the last layer is trained, or adapters: Opacus's tutorial on text classification.

    python examples/opacus_bert.py
    python examples/opacus_bert.py --model bert-base-cased --data snli --epochs 3 --batch-size 32
    python examples/opacus_bert.py --lora

Without --model a small BERT with random weights is built, and without --data sentences are made up.
"""

import argparse

import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig

from dpkernels import PrivacyEngine

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a checkpoint of BERT")
parser.add_argument("--data", help="a data set of premises and hypotheses of the library `datasets`")
parser.add_argument("--lora", action="store_true", help="train PEFT's adapters of all layers")
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--batch-size", type=int, default=32)
options = parser.parse_args()

if options.model:
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=3)
else:
    small = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=3
    )
    model = AutoModelForSequenceClassification.from_config(small)

if options.data:
    from datasets import load_dataset

    pairs = load_dataset(options.data, split="train").filter(lambda pair: pair["label"] >= 0)
    tokens = AutoTokenizer.from_pretrained(options.model)(
        pairs["premise"], pairs["hypothesis"], padding="max_length", truncation=True, max_length=128
    )
    ids, mask = torch.tensor(tokens["input_ids"]), torch.tensor(tokens["attention_mask"])
    labels = torch.tensor(pairs["label"])
else:
    labels = torch.arange(300) % 3
    ids = torch.randint(1000, 2000, (300, 24)) + 1000 * labels[:, None]
    mask = (torch.arange(24) < torch.randint(12, 25, (300, 1))).long()
data = TensorDataset(ids, mask, labels)

if options.lora:
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(r=8, target_modules=["query", "value"], modules_to_save=["classifier"])
    model = get_peft_model(model, adapters)
else:
    model.requires_grad_(False)
    for part in (model.bert.encoder.layer[-1], model.bert.pooler, model.classifier):
        part.requires_grad_(True)
model.train()  # with its dropout


def losses_of(model, batch):
    """One loss for each pair, [B]."""
    ids, mask, labels = batch
    logits = model(input_ids=ids, attention_mask=mask).logits
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


engine = PrivacyEngine()
model, optimizer, loader = engine.make_private_with_epsilon(
    module=model,
    optimizer=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4),
    data_loader=DataLoader(data, batch_size=options.batch_size),
    target_epsilon=7.5,
    target_delta=1e-4,
    epochs=options.epochs,
    max_grad_norm=0.1,
    physical_batch_size=8,
)
engine.self_check(losses_of)

for epoch in range(options.epochs):
    for batch in loader.flat():
        optimizer.backward(losses_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch + 1}: epsilon = {engine.get_epsilon():.2f} at delta = 1e-4")
