"""The checker: a contender that computes something else gets no time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.cases.models import CASES, Case, trained, working_copy
from bench.contenders import CannotRun, Settings, compiled_pairs, registry
from bench.contenders.functorch import PerSample
from bench.contenders.plain import NonPrivate
from bench.harness import session
from bench.harness.checker import CANNOT, OK, WRONG, check, norm, one_by_one, relative_error, total
from bench.harness.session import Bench
from bench.names import NON_PRIVATE, TIMED_STRATEGIES, ours
from tests.slow import slow_cases

CASE = CASES["tiny-lora"]


class ClipsAfterTheSum(NonPrivate):
    """The classic fault: one factor for the whole batch."""

    private = True

    def step(self) -> None:
        super().step()
        gradient = self.released()
        factor = min(1.0, self.settings.clip / norm(gradient))
        for name, parameter in self.parameters.items():
            parameter.grad = gradient[name] * factor / self.size


class ForgetsOneParameter(PerSample):
    def released(self) -> dict[str, Tensor]:
        found = super().released()
        found.pop(next(iter(found)))
        return found


class GivesNaN(PerSample):
    def released(self) -> dict[str, Tensor]:
        return {name: value * torch.nan for name, value in super().released().items()}


class Refuses(NonPrivate):
    def prepare(self) -> None:
        raise CannotRun("for a reason")


PLANTED = {"after the sum": ClipsAfterTheSum, "one short": ForgetsOneParameter, "NaN": GivesNaN}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["tiny-lora-mixed", "lora-layer", "depthwise-layer", *slow_cases("tiny-lora", "tiny-full")]
)
def test_every_contender_of_a_case_is_right_or_says_why_not(name: str) -> None:
    case = CASES[name]
    dtype = torch.bfloat16 if case.mixed else torch.float32
    model = case.model(16, dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    verdicts = check(registry(), case, model, case.batch(3, 16, dtype))
    assert {key: v for key, v in verdicts.items() if v.status != OK} == {}
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.slow
def test_compiled_contenders_are_right() -> None:
    torch._dynamo.reset()
    verdicts = check(compiled_pairs(), CASE, CASE.model(16), CASE.batch(3, 16))
    assert {key: v for key, v in verdicts.items() if v.status != OK} == {}
    assert len(verdicts) == 4


def test_planted_faults_are_found() -> None:
    verdicts = check(PLANTED | {"refuses": Refuses}, CASE, CASE.model(16), CASE.batch(3, 16))
    assert {name: v.status for name, v in verdicts.items()} == dict.fromkeys(PLANTED, WRONG) | {
        "refuses": CANNOT
    }
    assert verdicts["refuses"].reason == "for a reason"
    assert "relative error" in verdicts["after the sum"].reason


def test_some_examples_are_clipped_and_some_are_not() -> None:
    norms = [norm(gradient) for gradient in one_by_one(CASE, CASE.model(16), CASE.batch(3, 16))]
    clip = sorted(norms)[1]
    assert min(norms) < clip < max(norms)


def test_total_clips_each_example_by_itself() -> None:
    gradients = [{"a": torch.tensor([3.0, 4.0])}, {"a": torch.tensor([0.0, 1.0])}]
    assert torch.allclose(total(gradients, 2.0)["a"], torch.tensor([1.2, 2.6]))
    assert torch.equal(total(gradients, None)["a"], torch.tensor([3.0, 5.0]))


def test_another_shape_is_infinitely_wrong() -> None:
    assert relative_error({"a": torch.zeros(1, 2)}, {"a": torch.zeros(2)}) == float("inf")


@pytest.mark.slow
def test_a_wrong_contender_gets_no_time(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    contenders = {NON_PRIVATE: NonPrivate, **PLANTED}
    monkeypatch.setattr(session, "registry", lambda: contenders)
    bench = Bench(pytestconfig, "cpu", torch.float32, quick=True, rounds=2, seconds=60, model=False)
    monkeypatch.setattr(Bench, "_report", lambda *arguments: None)
    rows = {row.contender: row for row in bench.run("step", CASE, 2, 16)}
    assert rows[NON_PRIVATE].median_ms is not None
    for name in PLANTED:
        assert (rows[name].status, rows[name].median_ms, rows[name].ratio) == (WRONG, None, None)


def test_twins_share_what_is_frozen_and_nothing_else() -> None:
    model = CASE.model(16)
    other = working_copy(model)
    same = {name: p is dict(other.named_parameters())[name] for name, p in model.named_parameters()}
    assert {name for name, shared in same.items() if not shared} == set(trained(model))


def test_a_case_is_the_same_every_time() -> None:
    def bits(case: Case) -> list[Tensor]:
        return [*case.model(16).state_dict().values(), *case.batch(2, 16).values()]

    assert all(torch.equal(a, b) for a, b in zip(bits(CASE), bits(CASE), strict=True))


def test_private_contenders_take_turns_in_one_process() -> None:
    """Each of their runs seeds the global generators, after the others have begun their logical batches."""
    case, place = CASES["linear-layer"], (torch.float32, "cpu")
    model, batch = case.model(4, *place), case.batch(2, 4, *place)
    runners = [
        registry()[ours(name)](case, working_copy(model), batch, Settings()) for name in TIMED_STRATEGIES
    ]
    for _ in range(2):
        for runner in runners:
            runner.prepare()
        for runner in runners:
            runner.step()
