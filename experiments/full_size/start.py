"""The recipes of both large models started on real recordings, at full size, on a CPU.

    python -m experiments.full_size.start --speech LibriSpeech --sentences sentences.txt --work FOLDER \\
        [--recipes wav2vec2_bert_lora ...]

`--speech` is a LibriSpeech tree (any part of it), `--sentences` public text, a sentence a line, from which Parakeet's
tokens are made. The checkpoints are the real configurations with random weights, written as the hub has them:
Wav2Vec2-BERT without output layer and vocabulary. Each recipe is run as a person would, with fewer and smaller steps:
the dry run, which checks data, memory, accounting and gradients, then training, which repeats the self-check, and at
the end the recogniser loaded by transformers and PEFT alone. It shows that a recipe starts, trains and can be used at
this size; the model learns nothing in two steps. What was seen is in start.json, a recipe at a time.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from asr_finetune.files import write_json
from asr_finetune.models.alphabets import BLANK, UNKNOWN
from bench.harness.machine import about
from bench.harness.table import markdown
from experiments.runs import ROOT, between

HERE = Path(__file__).parent
RECIPES = ("wav2vec2_bert_lora", "wav2vec2_bert_full", "parakeet_lora", "parakeet_full")
# Of 281,241 utterances little is left here: fewer of them a step, two steps, and noise as it comes.
SMALLER = {
    "train.batch_size": 4,
    "train.physical_batch_size": 2,
    "train.steps": 2,
    "train.warmup_steps": 0,
    "train.checkpoint_every": 1,
    "train.num_workers": 0,
    "privacy.epsilon": "null",
    "privacy.noise_multiplier": 0.7,
    "privacy.delta": 1e-3,
    "data.train_split": "train-clean-100",
    "data.max_seconds": 9,
    "data.test": "null",
}
LOADED = """
import sys, numpy, torch, transformers
kind, base, folder, adapter = sys.argv[1:]
processor = transformers.AutoProcessor.from_pretrained(folder)
kind = getattr(transformers, kind)
if adapter == "adapter":
    import peft
    new = {"vocab_size": len(processor.tokenizer), "pad_token_id": processor.tokenizer.pad_token_id}
    model = peft.PeftModel.from_pretrained(kind.from_pretrained(base, ignore_mismatched_sizes=True, **new), folder)
else:
    model = kind.from_pretrained(folder)
inputs = processor.feature_extractor(numpy.full(16000, 0.01, numpy.float32), sampling_rate=16000, return_tensors="pt")
with torch.no_grad():
    logits = model.eval()(**inputs).logits
assert torch.isfinite(logits).all()
assert not {name.partition(".")[0] for name in sys.modules} & {"dpkernels", "asr_finetune"}
print(list(logits.shape))
"""


def checkpoint(family: str, folder: Path, sentences: Path) -> Path:
    """The model of the real size with random weights, in Hugging Face format."""
    if (folder / "model.safetensors").exists():
        return folder
    torch.manual_seed(0)
    if family == "parakeet":
        tokenizer = _tokens(sentences)
        config = transformers.ParakeetCTCConfig(
            vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id
        )
        model: Any = transformers.ParakeetForCTC(config)
        keeper: Any = transformers.ParakeetProcessor(transformers.ParakeetFeatureExtractor(), tokenizer)
    else:
        model = transformers.Wav2Vec2BertModel(transformers.Wav2Vec2BertConfig())
        keeper = transformers.SeamlessM4TFeatureExtractor(feature_size=80, num_mel_bins=80, padding_value=1)
    for module in model.modules():
        # As they come from transformers, the signal vanishes in them.
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            module.reset_parameters()
    model.save_pretrained(folder)
    keeper.save_pretrained(folder)
    return folder


def _tokens(sentences: Path) -> Any:
    """1,024 pieces of words, learnt from public text."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=1024, special_tokens=[BLANK, UNKNOWN], unk_token=UNKNOWN)
    core.train_from_iterator(sentences.read_text(encoding="utf-8").lower().splitlines(), trainer)
    return transformers.ParakeetTokenizer(tokenizer_object=core, pad_token=BLANK, unk_token=UNKNOWN)


def timed(command: list[str]) -> dict[str, Any]:
    """Run a command; its seconds, the peak of its resident memory, and what it printed."""
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}\n{printed}")
    seconds = round(time.monotonic() - began)
    return {"seconds": seconds, "peak_gib": round(usage.ru_maxrss / 2**20, 1), "printed": printed}


def start(recipe: str, speech: Path, sentences: Path, work: Path) -> dict[str, Any]:
    """Dry run, training and loading of one recipe."""
    family = recipe.rsplit("_", 1)[0]
    base = checkpoint(family, work / family, sentences)
    output = work / "runs" / recipe
    settings = [part for key, value in SMALLER.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "asr_finetune", "train", "--config", recipe, "--model", str(base)]
    command += ["--train", str(speech), "--output", str(output), *settings]
    dry = timed([*command, "--dry-run"])
    trained = timed(command)
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    saved = next(folder for folder in (output / "adapter", output / "model") if folder.is_dir())
    kind = "ParakeetForCTC" if family == "parakeet" else "Wav2Vec2BertForCTC"
    loaded = timed([sys.executable, "-c", LOADED, kind, str(base), str(saved), saved.name])
    (passed,) = [line for line in trained["printed"].splitlines() if "self-check passed" in line]
    return {
        "recipe": recipe,
        "parameters": record["model"]["total_parameters"],
        "trained": record["model"]["trained_parameters"],
        "utterances": record["data"]["units"],
        "steps": record["privacy"]["steps"],
        "epsilon": round(record["privacy"]["epsilon"], 3),
        "self_check": passed.strip(),
        "dry_run": {key: dry[key] for key in ("seconds", "peak_gib")},
        "training": {key: trained[key] for key in ("seconds", "peak_gib")},
        "loaded": f"{saved.name}: logits {loaded['printed'].strip().splitlines()[-1]}",
    }


def page(recipes: dict[str, Any]) -> str:
    """The table of README.md."""
    rows = [
        [
            f"`{name}`",
            f"{found['parameters']:,}",
            f"{found['trained']:,}",
            f"{found['dry_run']['seconds']} s, {found['dry_run']['peak_gib']} GiB",
            f"{found['training']['seconds']} s, {found['training']['peak_gib']} GiB",
            "passed",
            found["loaded"],
        ]
        for name, found in recipes.items()
    ]
    head = ["recipe", "parameters", "trained", "dry run", "two steps", "self-check", "loaded elsewhere"]
    return markdown(head, rows, "lrrrrll")


def main() -> None:
    """Start the recipes that are asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.full_size.start",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--speech", type=Path, required=True)
    parser.add_argument("--sentences", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="for checkpoints of 2.4 GB and the runs")
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES)
    options = parser.parse_args()
    path = HERE / "start.json"
    saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"recipes": {}}
    for recipe in options.recipes:
        found = start(recipe, options.speech.resolve(), options.sentences.resolve(), options.work.resolve())
        saved["recipes"][recipe] = found | {"about": about("cpu")}
        write_json(path, saved)
        readme = HERE / "README.md"
        readme.write_text(
            between(readme.read_text(encoding="utf-8"), "start", page(saved["recipes"])), encoding="utf-8"
        )
        print(json.dumps(found, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
