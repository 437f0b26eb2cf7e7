"""Several processes, or GPUs, that train one model: one draw, one noise, one ledger.

Each process gets a part of every logical batch; batch size, noise and epsilon are those of the whole. The training
loop is that of one process. What differs: the process group is initialised first, every process takes every
step, and what is printed or written comes from one of them.

    python examples/several_processes.py
    torchrun --nproc-per-node 2 examples/several_processes.py
    torchrun --nproc-per-node 8 examples/several_processes.py --examples 100000 --batch-size 4096 --save model.pt
"""

import argparse
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import dpkernels
from dpkernels.privacy import join_processes, ranks_of
from dpkernels.rounding import shown_epsilon

parser = argparse.ArgumentParser()
parser.add_argument("--examples", type=int, default=2000)
parser.add_argument("--batch-size", type=int, default=256, help="expected, of all processes together")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--ledger", type=Path, help="process 0 writes it; default: the count is in memory")
parser.add_argument("--save", type=Path, help="where process 0 saves model, optimizer and engine")
options = parser.parse_args()

# Join the processes that torchrun started: NCCL between GPUs, gloo between CPUs, and a GPU for each. A process that
# waits this long for another one gives up. Without torchrun nothing is joined.
joined = join_processes(timeout=timedelta(minutes=5))
ranks = ranks_of(None)  # this process's number, and how many there are
device = "cuda" if torch.cuda.is_available() else "cpu"

torch.manual_seed(0)  # data and model have to be the same in all processes; noise and sampling take no seed
features = torch.randn(options.examples, 20)
data = TensorDataset(features, (features[:, 0] * features[:, 1] > 0).long())
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2)).to(device)


def losses_of(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    """One loss an example, [B]."""
    x, y = (part.to(device) for part in batch)
    return cross_entropy(model(x), y, reduction="none")


engine = dpkernels.PrivacyEngine(ledger=options.ledger)
model, optimizer, loader = engine.make_private_with_epsilon(
    module=model,
    optimizer=torch.optim.AdamW(model.parameters(), lr=3e-2),
    data_loader=DataLoader(data, batch_size=options.batch_size),
    target_epsilon=8,
    target_delta=1e-5,
    steps=options.steps,
    max_grad_norm=1.0,
)
engine.self_check(losses_of)

for logical_batch in loader:  # this process's part of it: micro-batches, possibly none
    for batch in logical_batch:
        optimizer.backward(losses_of(model, batch))
    optimizer.step()  # the processes meet, process 0 counts, each adds noise to its part of the parameters
    optimizer.zero_grad()

with torch.no_grad():
    x, y = (part.to(device) for part in data.tensors)
    accuracy = (model(x).argmax(1) == y).float().mean()
    fingerprint = torch.cat([p.double().flatten() for p in model.parameters()]).norm().item()
assert len(set(ranks.gathered(fingerprint))) == 1, "the processes have different parameters"

# The optimizer's state is in parts, and every process has to be there where it is put together.
saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "engine": engine.state_dict()}
if ranks.is_first:
    print(f"{ranks.size} process{'es' if ranks.size > 1 else ''}, the same parameters in each")
    print(f"accuracy on the training data (NOT PRIVATE): {accuracy:.1%}")
    print(f"epsilon = {shown_epsilon(engine.get_epsilon(), 2)} at delta = {1e-5:.1e}")
    if options.save is not None:
        torch.save(saved, options.save)  # one file, for any number of processes
engine.close()
if joined:
    dist.destroy_process_group()
