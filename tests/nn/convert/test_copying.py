"""A private model is copied and saved as an ordinary one: torch's classes, no tape, no hook of ours."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dpkernels
from dpkernels.nn import FrozenBatchNorm1d, GhostConv1d, GhostLinear, attach, detach, ghost_subclass, swap
from dpkernels.nn.convert.swapping import register_swap
from dpkernels.nn.copying import HANDLES
from tests.nn.per_sample import assert_same_module, check_private
from tests.privacy.private_run import KEY, Net, private_run, train


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.gain.view(1, 1, 4)


class Leaf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class OwnConv(nn.Conv1d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.transpose(1, 2)).transpose(1, 2)


register_swap(OwnConv, ghost_subclass(OwnConv, GhostConv1d))  # a class made at run time


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Gain(), Leaf(), nn.LayerNorm(4), OwnConv(4, 4, 3, padding=1))


def by_torch(model: nn.Module) -> Any:
    written = io.BytesIO()
    torch.save(model, written)
    written.seek(0)
    return torch.load(written, weights_only=False)


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "deepcopy": copy.deepcopy,
    "torch.save": by_torch,
    "protocol 1": lambda model: pickle.loads(pickle.dumps(model, 1)),
    "protocol 5": lambda model: pickle.loads(pickle.dumps(model, 5)),
}
X = torch.linspace(-2, 2, 3 * 5 * 4).sin().view(3, 5, 4)


@pytest.mark.parametrize("root", ["plain", "expanded", "ghost"])
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_is_the_model_before_swap(way: str, root: str) -> None:
    plain = {"plain": net, "expanded": Gain, "ghost": lambda: nn.Linear(4, 2)}[root]()
    model = swap(copy.deepcopy(plain))
    tape = attach(model)
    losses = model(X).flatten(1).sum(1)  # what layers keep of a forward stays behind, too
    tape.open(3)
    losses.sum().backward()
    tape.close()
    copied = WAYS[way](model)
    assert [type(m) for m in copied.modules()] == [type(m) for m in plain.modules()]
    for module, was in zip(copied.modules(), plain.modules(), strict=True):
        assert vars(module).keys() == vars(was).keys()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in copied.modules())
    assert_same_module(plain, copied)
    assert torch.equal(copied(X), plain(X))
    copied(X).sum().backward()
    assert all(p.grad is not None for p in copied.parameters())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("way", WAYS)
def test_the_model_itself_stays_private_and_its_copy_can_be_made_private(way: str) -> None:
    model = swap(net())
    tape = attach(model)
    copied = WAYS[way](model)
    seen: list[None] = []
    tape.before_forward = lambda: seen.append(None)
    tape.open(3)
    model(X).sum().backward()
    assert tape.close()
    forwards = len(seen)
    assert forwards > 0
    copied(X)
    assert len(seen) == forwards
    detach(model)
    check_private(copied, lambda m, x: m(x).square().flatten(1).sum(1), (X,))


@pytest.mark.parametrize("way", WAYS)
def test_hooks_of_others_stay(way: str) -> None:
    model = swap(nn.Sequential(nn.Linear(4, 4)))
    model.register_forward_hook(doubled)
    attach(model)
    model.register_forward_pre_hook(negated, with_kwargs=True)
    copied = WAYS[way](model)
    assert torch.equal(copied(X), 2 * model[0](-X))
    assert torch.equal(copied(X), model(X))


def test_dictionaries_by_number_stay() -> None:
    """Hooks are kept by number, too."""
    model = swap(nn.Sequential(nn.Linear(4, 4)))
    attach(model)
    model.by_number = {handle.id: "the user's" for handle in vars(model)[HANDLES]}  # type: ignore[assignment]
    for way in WAYS.values():
        assert way(model).by_number == model.by_number


def doubled(_module: nn.Module, _arguments: Any, y: Tensor) -> Tensor:
    return 2 * y


def negated(_module: nn.Module, arguments: Any, keywords: Any) -> Any:
    return (-arguments[0],), keywords


def test_what_was_swapped_or_detached_keeps_its_ghost_layers_and_is_saved_too() -> None:
    model = swap(net())
    for way in WAYS.values():
        assert isinstance(way(model)[0].layer, GhostLinear)
        assert type(way(model)[3]) is OwnConv
    attach(model)
    detach(model)
    assert "__reduce_ex__" not in vars(model)
    assert torch.equal(by_torch(model)(X), model(X))


def test_a_frozen_batch_norm_stays_one() -> None:
    """Its class computes something else than torch's in training."""
    model = swap(dpkernels.nn.freeze_batch_norm(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))))
    attach(model)
    for way in WAYS.values():
        assert type(way(model)[1]) is FrozenBatchNorm1d
        assert torch.equal(way(model).train()(X[0]), model(X[0]))


def test_a_saved_private_model_loads_without_this_package(tmp_path: Path) -> None:
    model = swap(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.PReLU()))
    attach(model)
    torch.save(model, tmp_path / "model.pt")
    torch.save((X, model(X).detach()), tmp_path / "values.pt")
    code = (
        "import sys; sys.modules['dpkernels'] = None\n"
        "import torch; torch.set_num_threads(1)\n"
        "model = torch.load('model.pt', weights_only=False); x, y = torch.load('values.pt')\n"
        "print(torch.equal(model(x), y), type(model[0]).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["True", "Linear"], done.stderr


@pytest.mark.slow
def test_a_private_model_can_be_sent_to_a_spawned_process() -> None:
    model = swap(nn.Sequential(nn.Linear(4, 4), nn.PReLU()))
    attach(model)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_compute, args=(model, theirs))
    process.start()
    assert ours.poll(120)
    assert ours.recv() == (["Sequential", "Linear", "PReLU"], model(torch.ones(2, 4)).tolist())
    process.join(60)
    assert process.exitcode == 0


def _compute(model: nn.Module, pipe: Any) -> None:
    pipe.send(([type(m).__name__ for m in model.modules()], model(torch.ones(2, 4)).tolist()))


@pytest.mark.filterwarnings("ignore:.*self_check.*")
def test_of_a_private_run_only_the_model_is_saved() -> None:
    """No key, tape, watch or optimizer goes with it."""
    run = private_run(key=KEY)
    train(run, 2)
    written = pickle.dumps(run.model)
    assert KEY not in written
    assert b"dpkernels" not in written
    copied = pickle.loads(written)
    assert {type(m) for m in copied.modules()} == {Net, nn.Linear, nn.LayerNorm}
    assert all(
        torch.equal(copied.state_dict()[name], value) for name, value in run.model.state_dict().items()
    )
    train(run, 1)  # the run goes on
