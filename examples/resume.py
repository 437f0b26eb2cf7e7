"""A run that is killed and goes on: checkpoint and ledger.

The ledger records every step before its result is applied; a checkpoint holds what the training needs to go
on. Here a first process stops in the middle, after steps that no checkpoint has. The second one begins at the
last checkpoint. The steps in between are taken again, with fresh noise, and count twice, because their first
results were released: epsilon says so.

The second run ends when the ledger holds the planned number of steps.

    python examples/resume.py
    python examples/resume.py --folder runs/resume --steps 200 --killed-after 130 --checkpoint-every 50
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import dpkernels
from dpkernels.privacy import read_ledger
from dpkernels.rounding import shown_epsilon

parser = argparse.ArgumentParser()
parser.add_argument(
    "--folder", type=Path, help="for ledger and checkpoint; default: one that is removed at the end"
)
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--killed-after", type=int, default=7)
parser.add_argument("--checkpoint-every", type=int, default=5)
options = parser.parse_args()

torch.manual_seed(0)  # the data set must be the same in both runs; noise and sampling take no seed
features = torch.randn(500, 10)
data = TensorDataset(features, (features[:, 0] > 0).long())


def losses_of(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    """One loss an example, [B]."""
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def run(folder: Path, killed_after: int | None = None) -> None:
    """Train from the checkpoint, if there is one, until the step budget is spent or the run is "killed"."""
    model = nn.Linear(10, 2)
    engine = dpkernels.PrivacyEngine(ledger=folder / "ledger.jsonl")
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-2),
        data_loader=DataLoader(data, batch_size=50),
        noise_multiplier=1.5,
        max_grad_norm=1.0,
        steps=options.steps,  # in all: the loader counts what the ledger holds
        target_epsilon=10,  # step() raises rather than pass it
        target_delta=1e-5,
    )
    engine.self_check(losses_of)

    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        engine.load_state_dict(saved["engine"])  # raises where the ledger lacks what the checkpoint had spent
        print(f"continued from the checkpoint of step {saved['step']}; the ledger holds {engine.steps} steps")

    for logical_batch in loader:
        for batch in logical_batch:
            optimizer.backward(losses_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()
        if engine.steps == killed_after:
            break
        if engine.steps % options.checkpoint_every == 0:
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(saved | {"engine": engine.state_dict(), "step": engine.steps}, checkpoint)

    print(f"{engine.steps} steps are spent: epsilon = {shown_epsilon(engine.get_epsilon())}")
    engine.close()  # gives up the ledger's lock, as the end of a process does


with tempfile.TemporaryDirectory() as temporary:
    folder = options.folder or Path(temporary)
    folder.mkdir(parents=True, exist_ok=True)
    run(folder, killed_after=options.killed_after)
    run(folder)
    ledger = read_ledger(folder / "ledger.jsonl")
    print(f"the ledger: {ledger.steps} steps in {len(ledger.runs)} runs")
