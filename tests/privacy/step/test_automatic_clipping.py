"""privacy.md 1, 3, 5 under automatic clipping: each gradient scaled by C/(‖g‖ + γ), to less than C; S as ever."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dpkernels import ops
from tests.privacy.private_run import Net, private_run, train
from tests.privacy.step.test_clipping import INDICES, check_clipped_sum, contribution_excess

STRATEGIES = ("bookkeeping", "mixed", "two_pass")
CLIPS = (1e-3, 0.5, 100.0)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("clip", CLIPS)
def test_the_sum_is_that_of_automatic_clipping(strategy: str, clip: float) -> None:
    run = private_run(sigma=0, clip=clip, strategy=strategy, clipping="automatic")
    check_clipped_sum(run)
    assert float(run.release(INDICES)["unused.weight"].abs().max()) == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_example_adds_more_than_c(dtype: torch.dtype, strategy: str) -> None:
    """Also where its gradient is far smaller than γ, which multiplies it by up to C/γ."""
    for scale in (1.0, 1e-6, 1e6):
        run = private_run(
            sigma=0,
            clip=0.3,
            dtype=dtype,
            strategy=strategy,
            clipping="automatic",
            loss_fn=lambda model, batch, scale=scale: (
                scale * torch.nn.functional.cross_entropy(model(batch[0]).float(), batch[1], reduction="none")
            ),
        )
        excess = contribution_excess(run)
        assert excess <= 1.0
        assert excess > (0.9 if scale >= 1.0 else 0.0)


def test_what_is_not_finite_adds_nothing_and_is_counted() -> None:
    run = private_run(sigma=0, clip=0.5, clipping="automatic")
    run.data.tensors[0][1] = torch.nan
    check = run.clipped_sum((0, 2, 3))
    released = run.release((0, 1, 2, 3))
    for name, total in check.items():
        torch.testing.assert_close(released[name], total / 8, rtol=1e-4, atol=1e-7)
    assert run.optimizer.last_step.non_finite == 1


def test_sensitivity_noise_and_epsilon_are_those_of_flat_clipping(tmp_path: Path) -> None:
    runs = {
        clipping: private_run(clip=0.7, clipping=clipping, ledger=tmp_path / clipping)
        for clipping in ("flat", "automatic")
    }
    flat, automatic = runs["flat"].optimizer, runs["automatic"].optimizer
    assert automatic.sensitivity == flat.sensitivity >= 0.7
    for run in runs.values():
        train(run, 3)
    assert runs["automatic"].engine.get_epsilon(1e-3) == runs["flat"].engine.get_epsilon(1e-3)


def test_the_ledger_says_how_it_was_clipped(tmp_path: Path) -> None:
    private_run(clipping="automatic", ledger=tmp_path / "ledger.jsonl").engine.close()
    text = (tmp_path / "ledger.jsonl").read_text(encoding="utf-8")
    assert '"clipping": "automatic"' in text
    assert '"stability": 0.01' in text


def test_the_learning_rate_is_all_that_c_scales() -> None:
    """No norm to tune: SGD without noise takes the same steps with C and lr, and with C·2¹⁰ and lr/2¹⁰."""
    steps = []
    for clip, lr in ((1.0, 0.5), (1024.0, 0.5 / 1024)):
        torch.manual_seed(1)
        run = private_run(sigma=0, clip=clip, lr=lr, clipping="automatic", model=Net())
        run.release(INDICES)
        steps.append(torch.cat([p.detach().flatten() for p in run.model.parameters()]))
    torch.testing.assert_close(*steps, rtol=1e-6, atol=1e-7)


def test_planted_factors_of_half_the_norm_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ops.automatic_clip_factors
    monkeypatch.setattr(
        ops, "automatic_clip_factors", lambda norm_sq, c, stability: original(norm_sq / 4, c, stability)
    )
    assert contribution_excess(private_run(sigma=0, clip=0.3, clipping="automatic")) > 1.0
