"""GPT-2 with LoRA, through transformers and PEFT.

Adapters are trained on private lines of text; the base model stays frozen. By default the model is a tiny
GPT-2 with random weights that reads bytes, so that nothing is downloaded. `--model` takes a real checkpoint
with its tokenizer.

    python examples/gpt2_lora.py
    python examples/gpt2_lora.py --model gpt2 --text notes.txt --rank 8 --steps 500 --batch-size 256 --output adapter
"""

import argparse
from pathlib import Path

import peft
import torch
import transformers
from torch.utils.data import DataLoader

import dpkernels
from dpkernels.losses import cross_entropy_per_example
from dpkernels.rounding import shown_epsilon

parser = argparse.ArgumentParser()
parser.add_argument(
    "--model", help="folder or hub id of a GPT-2 checkpoint; default: a tiny one, random weights"
)
parser.add_argument("--text", type=Path, help="a text file, one example a line; default: made-up lines")
parser.add_argument("--rank", type=int, default=4)
parser.add_argument("--epsilon", type=float, default=8.0)
parser.add_argument("--steps", type=int, default=16)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--learning-rate", type=float, default=1e-2)
parser.add_argument("--output", type=Path, help="folder for the adapter, in PEFT's own format")
options = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"

if options.text:
    lines = [line for line in options.text.read_text(encoding="utf-8").splitlines() if line.strip()]
else:
    lines = [f"patient {number} was seen on day {number % 7} of the week" for number in range(400)]

# The model: a checkpoint, or the same architecture at a size that trains in seconds.
if options.model:
    base = transformers.AutoModelForCausalLM.from_pretrained(options.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    data = [tokenizer(line, truncation=True, max_length=256)["input_ids"] for line in lines]
else:
    sizes = {
        "vocab_size": 256,
        "n_positions": 128,
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 2,
        "initializer_range": 0.3,
    }
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    data = [list(line.encode())[:128] for line in lines]

adapter = peft.LoraConfig(
    r=options.rank,
    lora_alpha=2 * options.rank,
    target_modules=["c_attn", "c_proj"],
    fan_in_fan_out=True,  # GPT-2's Conv1D keeps its weight transposed
)
model = peft.get_peft_model(base, adapter).to(device)
model.print_trainable_parameters()
print(dpkernels.coverage(model))


def collate(examples: list[list[int]]) -> dict[str, torch.Tensor]:
    """Pad on the right; -100 marks what is padding and not learnt."""
    length = max(len(tokens) for tokens in examples)
    ids, labels = (
        torch.zeros(len(examples), length, dtype=torch.long),
        torch.full((len(examples), length), -100),
    )
    for row, tokens in enumerate(examples):
        ids[row, : len(tokens)] = labels[row, : len(tokens)] = torch.tensor(tokens)
    return {"input_ids": ids, "attention_mask": (labels != -100).long(), "labels": labels}


def losses_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean over each line's own tokens, [B]. transformers' own loss averages over the whole batch instead."""
    batch = {name: part.to(device) for name, part in batch.items()}
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return cross_entropy_per_example(logits[:, :-1], batch["labels"][:, 1:])


engine = dpkernels.PrivacyEngine()
model, optimizer, loader = engine.make_private_with_epsilon(
    module=model,
    optimizer=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.learning_rate),
    data_loader=DataLoader(data, batch_size=options.batch_size, collate_fn=collate),
    target_epsilon=options.epsilon,
    target_delta=0.1 / len(data),
    steps=options.steps,
    max_grad_norm=1.0,
    physical_batch_size=32,
    lengths=[len(tokens) for tokens in data],  # lines of like lengths go together: less padding
)
engine.self_check(losses_of)

for logical_batch in loader:
    losses = []
    for batch in logical_batch:
        losses.append(losses_of(model, batch))
        optimizer.backward(losses[-1])
    optimizer.step()
    optimizer.zero_grad()
    if losses and engine.steps % 4 == 0:
        mean = torch.cat(losses).mean().item()
        print(f"step {engine.steps}: loss {mean:.3f} (NOT PRIVATE: for the trainer's eyes)")

print(f"epsilon = {shown_epsilon(engine.get_epsilon(), 2)} at delta = {0.1 / len(data):.1e}")
if options.output:
    model.save_pretrained(options.output)
    print(f"the adapter is in {options.output}")
