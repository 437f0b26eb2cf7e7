"""dpkernels.fix: what make_private refuses and can be replaced, and what the report says of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

import dpkernels
from dpkernels.nn import FrozenBatchNorm2d, attach, detach, swap
from tests.nn.convert.test_coverage_table import Wide
from tests.nn.per_sample import check_private
from tests.privacy.private_run import private_run


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().flatten(1).sum(1)


def images(*norms: nn.Module) -> nn.Module:
    """A small network that has seen data, in training mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *norms, nn.ReLU(inplace=True), nn.Conv2d(8, 2, 3))
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    model(torch.randn(16, 3, 9, 9))
    return model.train()


X = torch.linspace(-2, 2, 4 * 3 * 9 * 9).sin().view(4, 3, 9, 9)


def test_batch_norm_is_frozen_and_computes_what_evaluation_did() -> None:
    model = images(nn.BatchNorm2d(8))
    want, parameters = model.eval()(X), list(model.parameters())
    model.train()
    assert not dpkernels.coverage(model).complete
    report = dpkernels.fix(model)
    assert report.complete
    assert [(c.name, c.was, c.now) for c in report.changes] == [("1", "BatchNorm2d", "FrozenBatchNorm2d")]
    assert "1: BatchNorm2d -> FrozenBatchNorm2d. In training it normalises with" in str(report)
    assert "seen no batch" not in str(report)
    assert type(model[1]) is FrozenBatchNorm2d
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(model(X), want)
    assert torch.equal(model.eval()(X), want)
    assert dpkernels.coverage(model).complete
    check_private(model.train(), squares, (X,))
    assert dpkernels.fix(model).changes == ()


def test_a_batch_norm_that_has_seen_nothing_is_said_to_be_no_norm() -> None:
    report = dpkernels.fix(nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8, device="meta")))
    assert "It has seen no batch" in report.changes[0].effect
    assert "It has seen no batch" not in report.changes[1].effect


@pytest.mark.parametrize(
    ("channels", "given", "groups"), [(8, None, 8), (48, None, 16), (8, 2, 2), (7, None, 1)]
)
def test_batch_norm_becomes_group_norm_on_request(channels: int, given: int | None, groups: int) -> None:
    model = nn.Sequential(nn.BatchNorm2d(channels, eps=1e-3)).train()
    nn.init.normal_(model[0].weight)
    weight, x = model[0].weight, torch.randn(3, channels, 5, 5)
    want = nn.GroupNorm(groups, channels, eps=1e-3)
    want.load_state_dict({"weight": weight.detach(), "bias": model[0].bias.detach()})
    report = dpkernels.fix(model, batch_norm="group", num_groups=given)
    assert report.changes[0].now == f"GroupNorm({groups})"
    assert "The function changes" in str(report)
    assert repr(model[0]) == repr(want)
    assert model[0].weight is weight
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    assert torch.equal(model(x), want(x))
    check_private(model, squares, (x,))


def test_a_group_of_vectors_is_never_a_single_channel() -> None:
    """Of [B,C] it would be a constant, and nothing before it could be trained."""
    model = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16))
    assert dpkernels.fix(model, batch_norm="group").changes[0].now == "GroupNorm(8)"
    assert model(torch.randn(3, 4)).std() > 0.1
    report = dpkernels.fix(nn.Sequential(nn.BatchNorm1d(1)), batch_norm="group")
    assert report.changes == ()
    assert "1 channels do not make" in str(report)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input - input.mean(0))


class OwnInstanceNorm(nn.InstanceNorm2d):
    pass


@pytest.mark.parametrize(
    ("make", "keywords", "says"),
    [
        (lambda: OwnNorm(8), {}, "OwnNorm: a class of its own"),
        (lambda: OwnNorm(8), {"batch_norm": "group"}, "OwnNorm: a class of its own"),
        (lambda: OwnInstanceNorm(8, track_running_stats=True), {}, "OwnInstanceNorm: running statistics"),
        (lambda: nn.BatchNorm2d(8, track_running_stats=False), {}, 'batch_norm="group"'),
        (lambda: nn.SyncBatchNorm(8), {}, 'batch_norm="group"'),
        (lambda: nn.BatchNorm2d(8), {"batch_norm": "group", "num_groups": 3}, "8 channels do not make 3"),
    ],
)
def test_norms_that_cannot_be_replaced_are_named_with_the_reason(make: Any, keywords: Any, says: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), make(), nn.BatchNorm2d(8))
    kind = type(model[1])
    report = dpkernels.fix(model, **({"num_groups": None} | keywords))
    assert dict(report.refused)["1"].count(says) == 1
    assert f"1: {dict(report.refused)['1']}" in str(report)
    assert type(model[1]) is kind
    assert ("2" in {change.name for change in report.changes}) == (
        "num_groups" not in keywords
    )  # the rest is done


@pytest.mark.parametrize(
    "make", [lambda: nn.SyncBatchNorm(8), lambda: nn.BatchNorm2d(8, track_running_stats=False)]
)
def test_what_cannot_be_frozen_can_become_a_group_norm(make: Any) -> None:
    model = nn.Sequential(make())
    assert dpkernels.fix(model, batch_norm="group").complete
    assert type(model[0]) is nn.GroupNorm


def test_instance_norm_drops_its_running_statistics() -> None:
    model = images(nn.InstanceNorm2d(8, affine=True, track_running_stats=True))
    want = copy.deepcopy(model).train()(X)
    report = dpkernels.fix(model)
    assert "In evaluation it normalises with the sample's own" in str(report)
    assert torch.equal(model(X), want)
    assert torch.equal(model.eval()(X), want)
    assert not list(model.buffers())
    assert "running_mean" not in str(list(model.state_dict()))


def test_embeddings() -> None:
    model = nn.Sequential(
        nn.Embedding(9, 4, sparse=True, scale_grad_by_freq=True), nn.Embedding(9, 4, max_norm=1.0)
    )
    report = dpkernels.fix(model)
    assert [(c.name, c.was) for c in report.changes] == [
        ("0", "Embedding(sparse=True)"),
        ("0", "Embedding(scale_grad_by_freq=True)"),
    ]
    assert [name for name, _ in report.refused] == ["1.weight"]
    assert "max_norm=1.0" in str(report)
    check_private(nn.Sequential(model[0]), squares, (torch.randint(0, 9, (3, 5)),))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("form", [weight_norm, parametrizations.weight_norm])
def test_weight_norm_is_taken_off_where_it_has_no_rule(form: Any) -> None:
    model = nn.Sequential(form(nn.Conv1d(4, 6, 3)), nn.Tanh(), form(nn.Linear(5, 2)).requires_grad_(False))
    x = torch.randn(3, 4, 7)
    want, frozen = model(x), type(model[2])
    if dpkernels.coverage(model).complete:
        pytest.skip("it has a rule")
    report = dpkernels.fix(model)
    assert report.complete
    assert [(c.name, c.was, c.now) for c in report.changes] == [("0", "Conv1d under weight_norm", "Conv1d")]
    assert "Make the optimizer now" in str(report)
    assert list(model[0].state_dict()) == ["bias", "weight"]
    assert type(model[2]) is frozen  # not trained: not touched
    torch.testing.assert_close(model(x), want)
    check_private(nn.Sequential(model[0]), squares, (x,))


def test_the_rest_is_refused_by_name_and_the_model_without_it_is_private() -> None:
    model = nn.Sequential(
        images(nn.BatchNorm2d(8)), Wide(), parametrizations.spectral_norm(nn.Linear(3, 300))
    )
    report = dpkernels.fix(model)
    table = dpkernels.coverage(model)
    assert [name for name, _ in report.refused] == [row.name for row in table.refused]
    assert [reason for _, reason in report.refused] == [row.refusal for row in table.refused]
    assert "1.table: no rule for it" in str(report)
    model[1:].requires_grad_(False)
    assert dpkernels.fix(model).complete
    attach(swap(model))
    with pytest.raises(RuntimeError, match="private already"):
        dpkernels.fix(model)
    detach(model)


def test_a_fixed_model_is_taken_by_make_private() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(ValueError, match="BatchNorm"):
        private_run(model=model)
    model(torch.randn(16, 4, 6))
    dpkernels.fix(model)
    run = private_run(model=model, sigma=0.0)
    for name, value in run.clipped_sum(range(4)).items():
        torch.testing.assert_close(run.release(range(4))[name] * 8, value, rtol=1e-4, atol=1e-6)


def test_arguments() -> None:
    with pytest.raises(ValueError, match=r"batch_norm.*'layer'"):
        dpkernels.fix(nn.Linear(2, 2), batch_norm="layer")
    with pytest.raises(ValueError, match="num_groups=4"):
        dpkernels.fix(nn.Linear(2, 2), num_groups=4)
    with pytest.raises(TypeError, match="got list"):
        dpkernels.fix([])  # type: ignore[arg-type]
    assert str(dpkernels.fix(nn.Linear(2, 2))) == "0 modules changed"
