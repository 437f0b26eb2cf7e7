"""privacy.md 5 under adaptive per-layer clipping: each layer's norm follows a count of its own; K counts cost √K."""

from __future__ import annotations

import json
import math
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dpkernels.privacy import AdaptiveClipping, noisy_count, read_ledger
from dpkernels.privacy.step.adaptive import UNIT, AdaptiveLayers
from dpkernels.privacy.step.clipping import per_layer_clip_norms
from tests.privacy.private_run import KEY, Net, Run, losses_of, private_run
from tests.privacy.step.test_adaptive_clipping import EXAMPLES, LARGE, SPEAKERS, share_below
from tests.privacy.strategy_models import INDICES, clip, excess, gradients_one_by_one, one, small

NAMES = [name for name, _ in Net().named_parameters()]
K = len(NAMES)
CPU = torch.device("cpu")


def layers_run(**arguments: Any) -> Run:
    defaults = {"sigma": 0, "clip": 0.5, "clipping": LARGE, "strategy": "per_layer"}
    return private_run(**defaults | arguments)


def layers_of(sampling: Any = EXAMPLES, *, whole_units: bool = False, count: int = 3) -> AdaptiveLayers:
    trained = {f"p{number}": nn.Parameter(torch.zeros(1)) for number in range(count)}
    constants = noisy_count(AdaptiveClipping(0.3), 1.0, sampling, whole_units=whole_units, counts=count)
    return AdaptiveLayers(constants, per_layer_clip_norms(1.0, trained), list(trained), sensitivity=1.0)


def test_each_layer_is_clipped_to_its_norm_of_the_step() -> None:
    run = layers_run()
    for _ in range(2):
        norms = run.optimizer.clip_state
        assert list(norms) == NAMES
        rows = gradients_one_by_one(run.model, losses_of, [one(run, i) for i in INDICES])
        lengths = {name: [float(row[name].norm()) for row in rows] for name in NAMES}
        expected = clip(rows, [[name] for name in NAMES], list(norms.values()))
        released = run.release(INDICES[:3], INDICES[3:])
        for name, before in norms.items():
            torch.testing.assert_close(8 * released[name], expected[name], rtol=1e-3, atol=1e-6)
            voted = [length for length in lengths[name] if length]
            count = (share_below(voted, before) - len(voted) / 2) / 8
            assert run.optimizer.clip_state[name] == pytest.approx(before * math.exp(-count), rel=1e-3), name
    assert run.optimizer.clip_state["unused.weight"] == pytest.approx(0.5 / math.sqrt(K))
    assert run.engine.clip_norm == pytest.approx(math.hypot(*run.optimizer.clip_state.values()))


@given(
    st.lists(st.floats(0.0, 1e300) | st.sampled_from([math.inf, math.nan, 0.0]), min_size=3, max_size=3),
    st.sampled_from([((0,), (1,), (2,)), ((0, 1), (2,)), ((0, 1, 2),)]),
)
@settings(max_examples=100, deadline=None)
def test_one_unit_changes_all_counts_by_their_sensitivity_at_most(
    squares: list[float], records: tuple[tuple[int, ...], ...]
) -> None:
    for sampling, whole_units, rows in ((EXAMPLES, False, 1), (SPEAKERS, False, 4), (SPEAKERS, True, 1)):
        layers = layers_of(sampling, whole_units=whole_units)
        parameters = list(layers.present.of)
        norms_sq = [torch.full((rows,), each, dtype=torch.float64) for each in squares[: len(records)]]
        votes = layers.votes([[parameters[place] for place in record] for record in records], norms_sq, CPU)
        assert math.hypot(*votes.tolist()) <= layers.count.sensitivity * UNIT * (1 + 1e-15)


def test_the_sensitivity_is_reached() -> None:
    """By an example whose gradient is small in every layer: γ = 0.3 makes that a vote of 0.7 each."""
    layers = layers_of()
    votes = layers.votes([list(layers.present.of)], [torch.tensor([1e-20], dtype=torch.float64)], CPU)
    assert math.hypot(*votes.tolist()) / UNIT == pytest.approx(0.7 * math.sqrt(3)) == layers.count.sensitivity


def test_who_does_not_use_a_layer_has_no_vote_there() -> None:
    """A record is there if one example of a micro-batch uses the layer: the others must vote as if it were not."""
    layers = layers_of()
    first, *_ = layers.present.of
    alone, votes = (
        layers.votes([[first]], [torch.tensor(squares, dtype=torch.float64)], CPU)
        for squares in ([4.0], [0.0, 4.0, 0.0])
    )
    assert votes.tolist() == alone.tolist() != [0, 0, 0]
    assert layers.votes([], [], CPU).tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_no_example_adds_more_than_the_present_norms(kind: str) -> None:
    run = layers_run(model=small(kind), clip=1e-3)
    run.release(INDICES)
    assert run.optimizer.clip_norm > 1e-3
    assert 0.5 < excess(run) <= 1.0


def test_noise_is_of_the_present_norms_on_every_parameter() -> None:
    """σ_g is twice σ here; the second step's norms are larger."""
    double = AdaptiveClipping(0.5, 1.0, unclipped_num_std=math.sqrt(K / 3))
    run = layers_run(sigma=1.0, clip=1e-3, clipping=double, key=KEY)
    for _ in range(2):
        norm = run.optimizer.clip_norm
        noise = torch.cat([g.flatten() for g in run.release(tuple(range(8))).values()]) * 8 / norm
        assert float(noise.square().mean().sqrt()) == pytest.approx(2.0, rel=0.1)
    assert norm > 1.2e-3


def test_a_resumed_run_goes_on_with_the_same_norms() -> None:
    run = layers_run(sigma=1.0)
    run.release(INDICES)
    state = json.loads(json.dumps(run.engine.state_dict()))
    resumed = layers_run(sigma=1.0)
    resumed.engine.load_state_dict(state)
    assert resumed.optimizer.clip_state == run.optimizer.clip_state
    assert resumed.optimizer._adaptive.noise_scale == run.optimizer._adaptive.noise_scale
    norms = state["clip_norm"]
    for wrong in (1.0, {**norms, "more": 1.0}, dict(list(norms.items())[1:]), {**norms, NAMES[0]: 0.0}, {}):
        with pytest.raises(ValueError, match=r"clip_norm=.* the checkpoint is of another run"):
            resumed.engine.load_state_dict({**state, "clip_norm": wrong})


def test_the_ledger_holds_the_norms_and_both_noises(tmp_path: Path) -> None:
    with closing(layers_run(sigma=1.0, ledger=tmp_path / "ledger.jsonl").engine):
        (run,) = read_ledger(tmp_path / "ledger.jsonl").runs
    assert run.settings["clipping"] == "per_layer"
    assert run.settings["noisy_count"]["counts"] == K
    assert run.settings["noisy_count"]["sensitivity"] == 0.5 * math.sqrt(K)
