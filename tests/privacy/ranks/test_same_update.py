"""R processes take the step of one: same draws, same sums to the order of addition, same noise, one count."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.privacy.private_run import KEY, Unfused, private_run, train
from tests.privacy.ranks.processes import Processes

OPTIMIZERS: dict[str, Any] = {
    "sgd": torch.optim.SGD,
    "momentum": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9, nesterov=True),
    "adamw": torch.optim.AdamW,
    "unfused": Unfused,
}


def trained(rank: int, group: Any, steps: int = 5, optimizer: str = "adamw", **settings: Any) -> dict[str, Any]:
    """A run of a few steps under a fixed key: what it made."""
    run = private_run(
        key=KEY,
        lr=0.05,
        optimizer=OPTIMIZERS[optimizer],
        process_group=group,
        **{"examples": 60, "batch_size": 12, "physical_batch_size": 4, "sigma": 0.5, **settings},
    )
    taken = []
    for logical in run.loader:
        taken.append(sorted(index for part in logical.parts for index in part))
        for batch in logical:
            run.optimizer.backward(run.loss_fn(run.model, batch))
        run.optimizer.step()
        run.optimizer.zero_grad()
        if len(taken) == steps:
            break
    return {
        "parameters": {name: p.detach().clone() for name, p in run.model.named_parameters()},
        "examples": taken,
        "steps": run.engine.steps,
        "epsilon": run.engine.get_epsilon(1e-4) if run.optimizer.noise_multiplier else None,
    }


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_processes_take_the_step_of_one(processes: Processes, size: int, optimizer: str) -> None:
    (alone,) = processes.results(trained, 1, optimizer=optimizer)
    ranks = processes.results(trained, size, optimizer=optimizer)
    for part in ranks:
        for name, value in part["parameters"].items():
            torch.testing.assert_close(value, alone["parameters"][name], rtol=0, atol=1e-6)
            assert torch.equal(value, ranks[0]["parameters"][name])
        assert (part["steps"], part["epsilon"]) == (alone["steps"], alone["epsilon"])
    for step, examples in enumerate(alone["examples"]):
        dealt = [index for part in ranks for index in part["examples"][step]]
        assert sorted(dealt) == examples
