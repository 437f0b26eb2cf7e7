"""What the processes of these tests do: functions of (rank, group, ...), which a test sends to them by name."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from dpkernels.privacy import back_propagate
from dpkernels.privacy.ranks import pieces
from tests.privacy.private_run import KEY, Run, Unfused, private_run

OPTIMIZERS: dict[str, Any] = {
    "sgd": torch.optim.SGD,
    "momentum": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9, nesterov=True),
    "adamw": torch.optim.AdamW,
    "unfused": Unfused,
}


def a_run(group: Any, *, optimizer: str = "adamw", **settings: Any) -> Run:
    """A private run of this group, under a fixed key unless the settings have another."""
    defaults = {
        "key": KEY,
        "lr": 0.05,
        "examples": 60,
        "batch_size": 12,
        "physical_batch_size": 4,
        "sigma": 0.5,
    }
    return private_run(optimizer=OPTIMIZERS[optimizer], process_group=group, **defaults | settings)


def steps_of(run: Run, steps: int, *, fails: bool = False) -> list[list[int]]:
    """Take steps; the examples of each that this process got. `fails`: more than two at once do not fit."""
    taken: list[list[int]] = []

    def losses_of(batch: Any) -> torch.Tensor:
        if fails and len(batch[0]) > 2:
            raise torch.OutOfMemoryError("more than two examples")
        return run.loss_fn(run.model, batch)

    for logical in run.loader:
        taken.append(sorted(index for part in logical.parts for index in part))
        back_propagate(run.optimizer, logical, losses_of)
        run.optimizer.step()
        if len(taken) == steps:
            break
        run.optimizer.zero_grad()
    return taken


def trained(rank: int, group: Any, **settings: Any) -> dict[str, Any]:
    """A run of a few steps: what it made."""
    with pytest.MonkeyPatch.context() as patch:
        return _trained(rank, group, patch, **settings)


def _trained(
    rank: int,
    group: Any,
    patch: pytest.MonkeyPatch,
    *,
    steps: int = 4,
    piece: int = pieces.PIECE_ENTRIES,
    staged: int | None = None,
    keep: bool = False,
    stochastic_rounding: bool = False,
    fails_on: int | None = None,
    checkpoint: Path | None = None,
    **settings: Any,
) -> dict[str, Any]:
    patch.setattr(pieces, "PIECE_ENTRIES", piece)
    if staged is not None:
        patch.setattr("dpkernels.privacy.ranks.exchange.STAGED_BYTES", staged)
    run = a_run(group, **settings)
    if settings.get("unit") == "speaker":
        run.engine.self_check(run.loss_fn)  # without it no step is taken
    run.optimizer.keep_gradients = keep
    run.optimizer.stochastic_rounding = stochastic_rounding
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        run.model.load_state_dict(saved["model"])
        run.optimizer.load_state_dict(saved["optimizer"])
        run.engine.load_state_dict(saved["engine"])
    taken = steps_of(run, steps, fails=fails_on == rank)
    gradients = (
        {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None} if keep else {}
    )
    state = run.optimizer.state_dict()
    if checkpoint is not None and rank == 0:
        whole = {"model": run.model.state_dict(), "optimizer": state, "engine": run.engine.state_dict()}
        torch.save(whole, checkpoint)
    run.engine.close()
    return {
        "parameters": {name: p.detach().clone() for name, p in run.model.named_parameters()} | gradients,
        "state": state["state"],
        "examples": taken,
        "steps": run.engine.steps,
        "keys": run.engine._noise_stream.words(4, draw=1, purpose=9).tolist(),
    }


def values_kept(rank: int, group: Any) -> int:
    """Entries of the optimizer's state that this process keeps after a step."""
    run = a_run(group)
    steps_of(run, 1)
    kept = [state["exp_avg"] for state in run.optimizer._shards.by_parameter.values()]
    kept += [state["exp_avg"] for state in run.optimizer.original_optimizer.state.values()]
    return sum(value.numel() for value in kept)


class Backwards(TensorDataset):
    """The same examples, as a machine has them that lists its files in another order."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        super().__init__(*(tensor.flip(0) for tensor in tensors))


Backwards.__name__ = "TensorDataset"


def set_up(rank: int, group: Any, settings: list[dict[str, Any]], change: str = "") -> None:
    """make_private with settings of each rank."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))
    with torch.no_grad():
        for place, value in enumerate(model.parameters()):
            value.fill_(0.1 * place)
        if change == "frozen value" and rank == 1:
            model[0].weight[0, 0] += 1e-6
    model[0].requires_grad_(change == "frozen on one rank" and rank == 1)
    with pytest.MonkeyPatch.context() as patch:
        if change == "order of examples" and rank == 1:
            patch.setattr("tests.privacy.private_run.TensorDataset", Backwards)
        if change == "version" and rank == 1:
            patch.setattr("dpkernels.__version__", "0.0.1")
        a_run(group, model=model, **settings[rank])


def first_values(rank: int, group: Any) -> torch.Tensor:
    """A trained parameter after make_private, where each rank began with a value of its own."""
    model = torch.nn.Linear(6, 3)  # of another seed on each rank
    return a_run(group, model=model).model.weight.detach().clone()


def left_out(rank: int, group: Any, fault: str, ledger: Path) -> dict[str, Any]:
    """A step which one rank must not take: what every rank raised, and what was spent and changed."""
    target = {"target_epsilon": 0.2, "target_delta": 1e-4} if fault == "budget" else {}
    run = a_run(group, ledger=ledger, steps=4, **target)
    before = [p.detach().clone() for p in run.model.parameters()]
    raised = ""
    try:
        if fault == "draws" and rank == 1:
            run.loader._sampler.draw()
        logical = next(iter(run.loader))
        if not (fault == "a backward left out" and rank == 1):
            back_propagate(run.optimizer, logical, lambda batch: run.loss_fn(run.model, batch))
        if fault == "a buffer" and rank == 1:
            run.model.register_buffer("late", torch.zeros(1))
        if fault == "learning rates" and rank == 1:
            run.optimizer.param_groups[0]["lr"] = 0.01
        if fault == "trained parameters" and rank == 1:
            run.optimizer._guard.at_step()  # whoever changes them between two steps
            run.model.last.weight.data[0, 0] += 1
        if fault == "ledger" and rank == 0:
            run.engine._budget._ledger.close()  # what a full disk does to it, on the rank that writes
        if fault == "operations" and rank == 1:
            run.optimizer.state_dict()
        else:
            run.optimizer.step()
    except Exception as error:  # noqa: BLE001  what the test compares
        raised = f"{type(error).__name__}: {error}"
    run.engine.close()
    if fault in ("learning rates", "trained parameters"):
        return {"raised": raised, "steps": run.engine.steps, "moved": False}
    moved = any(not torch.equal(p, b) for p, b in zip(run.model.parameters(), before, strict=True))
    return {"raised": raised, "steps": run.engine.steps, "moved": moved}


def dies(rank: int, group: Any, where: str, ledger: Path) -> dict[str, Any]:
    """Three steps, in the second of which rank 1 is killed: what the others raised, and what a later step raises."""
    run = a_run(group, ledger=ledger)
    steps_of(run, 1)
    run.optimizer.zero_grad()
    if rank == 1:
        _die_in(run, where)
    raised = []
    for _ in range(2):
        try:
            steps_of(run, 1)
        except Exception as error:  # noqa: BLE001  what the test compares
            raised.append(f"{type(error).__name__}: {error}")
    return {"raised": raised, "steps": run.engine.steps}


def _die_in(run: Run, where: str) -> None:
    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    optimizer: Any = run.optimizer
    if where == "a backward":
        optimizer.backward = die
    elif where == "the meeting":
        optimizer._guard.before_step = die
    elif where == "the exchange of sums":
        optimizer._exchange.sums_to_owners = die
    elif where == "the exchange of parameters":
        optimizer._exchange.to_all = die
