"""transformers' Trainer, made private: a classifier of texts.

A script for Trainer has three changed lines, marked below. By default a tiny BERT with random weights learns made-up
lines of text, so that nothing is downloaded. `--model` takes a real checkpoint with its tokenizer.

    python examples/trainer.py
    python examples/trainer.py --model bert-base-uncased --steps 500 --batch-size 256 --output classifier
"""

import argparse
import tempfile

import torch
import transformers

from dpkernels.interop.trainer import (  # changed: in place of transformers.Trainer
    PrivacyArguments,
    PrivateTrainer,
)

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="folder or hub id of a checkpoint; default: a tiny BERT, random weights")
parser.add_argument("--epsilon", type=float, default=8.0)
parser.add_argument("--steps", type=int, default=24)
parser.add_argument("--batch-size", type=int, default=96)
parser.add_argument("--learning-rate", type=float, default=1e-2)
parser.add_argument("--output", help="folder for checkpoints and the model; default: a temporary one")
options = parser.parse_args()

WORDS = ["the", "soup", "bread", "tea", "was", "cold", "stale", "bitter", "warm", "fresh", "sweet", "today"]
lines = [
    (f"the {food} was {taste} today", int(taste in ("warm", "fresh", "sweet")))
    for food in ("soup", "bread", "tea")
    for taste in ("cold", "stale", "bitter", "warm", "fresh", "sweet")
] * 40

if options.model:
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=2)
    data = [{**tokenizer(text), "label": label} for text, label in lines]
    collate = transformers.DataCollatorWithPadding(tokenizer)
else:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"max_position_embeddings": 16, "initializer_range": 0.2}
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(WORDS), num_labels=2, **sizes)
    model = transformers.BertForSequenceClassification(config)
    data = [
        {"input_ids": [WORDS.index(word) for word in text.split()], "label": label} for text, label in lines
    ]
    collate = transformers.default_data_collator  # all lines have five words

with tempfile.TemporaryDirectory() as temporary:
    arguments = transformers.TrainingArguments(
        output_dir=options.output or temporary,
        per_device_train_batch_size=48,  # the largest micro-batch
        gradient_accumulation_steps=max(options.batch_size // 48, 1),  # times 48: the expected logical batch
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        logging_steps=8,
        disable_tqdm=True,
        report_to=[],
    )
    privacy = PrivacyArguments(  # changed: new
        target_epsilon=options.epsilon, target_delta=0.1 / len(data), max_grad_norm=1.0
    )
    trainer = PrivateTrainer(  # changed: was Trainer
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=data[: len(data) // 40],
        data_collator=collate,
        compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(-1) == found.label_ids).mean()},
        privacy=privacy,
    )
    trainer.train()
    print(f"accuracy on the training lines (NOT PRIVATE): {trainer.evaluate()['eval_accuracy']:.1%}")
    print(f"epsilon = {trainer.state.log_history[-1]['epsilon']:.3f} at delta = {privacy.target_delta:.1e}")
    if options.output:
        trainer.save_model()
