"""On a GPU a private step releases what it releases on the CPU: the same clipped sums, and the same noise."""

import pytest
import torch
from torch import Tensor, nn

from dpkernels.backends.triton_ops import grouped
from dpkernels.privacy.keywords import STRATEGIES
from tests.privacy.private_run import KEY, Run, losses_of, private_run
from tests.privacy.strategy_models import BOUND, INDICES, KINDS, distance, small

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def run_on(device: str, kind: str, strategy: str, sigma: float, checkpointed: bool = False) -> Run:
    def losses(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return losses_of(model, [part.to(device) for part in batch])

    return private_run(
        sigma=sigma,
        clip=BOUND,
        model=small(kind, checkpointed=checkpointed).to(device),
        loss_fn=losses,
        strategy=strategy,
        key=KEY,
    )


def released(run: Run) -> dict[str, Tensor]:
    return {name: part.cpu() for name, part in run.release(INDICES[:3], INDICES[3:]).items()}


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_clipped_sum_is_that_of_the_cpu(
    strategy: str, kind: str, checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped, "_FEWEST_PROGRAMS", 0)
    ours = released(run_on("cuda", kind, strategy, 0.0, checkpointed))
    assert distance(ours, released(run_on("cpu", kind, strategy, 0.0))) < 1e-3


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_noise_and_step_are_those_of_the_cpu(kind: str) -> None:
    ours, theirs = (released(run_on(device, kind, "bookkeeping", 1.0)) for device in ("cuda", "cpu"))
    quiet = released(run_on("cpu", kind, "bookkeeping", 0.0))
    noise = {name: theirs[name] - quiet[name] for name in quiet}
    # of the sums only: the noise has the same bits
    assert distance({n: ours[n] - noise[n] for n in ours}, quiet, each=False) < 2e-3
    assert distance(theirs, quiet, each=False) > 1
