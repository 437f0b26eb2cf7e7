"""A speech recogniser, fine-tuned on recordings that must be protected.

The program runs the commands of `asr-finetune` one after the other: a dry run of the recipe
`wav2vec2_bert_lora`, training, report. By default it makes recordings with a synthesiser, and a tiny
recogniser with random weights, at sizes that run in seconds and learn nothing. `--data`, `--test` and
`--model` take real ones, and `--full` the recipe's own sizes.

    python examples/speech.py
    python examples/speech.py --data train.jsonl --test test.jsonl --model facebook/w2v-bert-2.0 --full --delta 1e-6

A manifest has one JSON object a line: {"audio": "a.wav", "text": "what is said"}.
"""

import argparse
import tempfile
from pathlib import Path

import transformers

from asr_finetune.cli import app

parser = argparse.ArgumentParser()
parser.add_argument("--data", help="manifest, LibriSpeech tree or `datasets` id; default: synthetic speech")
parser.add_argument("--test", help="the same for the test recordings")
parser.add_argument(
    "--model", help="folder or hub id of a Wav2Vec2-BERT; default: a tiny one, random weights"
)
parser.add_argument("--full", action="store_true", help="the recipe's own batch size, steps and rank")
parser.add_argument("--epsilon", default="8")
parser.add_argument("--delta", default="1e-2")
parser.add_argument("--output", type=Path, help="the run's folder; default: one that is removed at the end")
options = parser.parse_args()


def asr_finetune(*arguments: object) -> None:
    """One command, as typed in a shell."""
    print("\n$ asr-finetune", *arguments, flush=True)
    app([str(argument) for argument in arguments], standalone_mode=False)


def speech(name: str, *sentences: str) -> Path:
    """Recordings of the sentences, each said by three synthetic voices; returns the manifest that lists them."""
    texts = work / f"{name}.txt"
    texts.write_text("\n".join(sentences), encoding="utf-8")
    asr_finetune("synthesise", "--texts", texts, "--output", work / name, "--voices", 3)
    return work / name / "manifest.jsonl"


def tiny_checkpoint() -> Path:
    """A checkpoint with the architecture of the real one, and random weights."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.Wav2Vec2BertConfig(**sizes, feature_projection_input_dim=160)
    transformers.Wav2Vec2BertModel(config).save_pretrained(work / "checkpoint")
    transformers.SeamlessM4TFeatureExtractor().save_pretrained(work / "checkpoint")
    return work / "checkpoint"


with tempfile.TemporaryDirectory() as temporary:
    work = Path(temporary)
    run = options.output or work / "run"

    # Flags and --set go over the recipe's own values.
    settings = ["--config", "wav2vec2_bert_lora", "--epsilon", options.epsilon, "--delta", options.delta]
    settings += ["--model", options.model or tiny_checkpoint(), "--output", run]
    settings += [
        "--train",
        options.data or speech("train", "good morning", "open the door", "what time is it"),
    ]
    settings += ["--test", options.test or speech("test", "good night", "the time")]
    changes = ["data.train_split=null", "data.test_split=null"]
    if not options.full:
        changes += [
            "train.batch_size=4",
            "train.steps=2",
            "train.physical_batch_size=3",
            "train.warmup_steps=0",
        ]
        changes += ["train.num_workers=0", "method.rank=2", "evaluate.bootstrap=0"]
    for change in changes:
        settings += ["--set", change]

    # A dry run checks the data, the model, the memory and the gradients of a few examples. It spends nothing.
    asr_finetune("train", *settings, "--dry-run")

    # The training. Given again after an interruption, the same command goes on; its ledger counts what was spent.
    asr_finetune("train", *settings)

    # One HTML page for the auditor. What is trained is in the run's folder "adapter", in PEFT's own format.
    asr_finetune("report", run)
