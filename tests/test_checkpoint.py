from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from torch import nn

from dpkernels import checkpoint
from dpkernels.checkpoint import Checkpoint, CheckpointError
from dpkernels.files import write_atomically


class Crash(BaseException):
    """The process ends here."""


def of_step(step: int, **values: Any) -> Checkpoint:
    parameters = {"weight": torch.full((2, 3), float(step), requires_grad=True)}
    given = {
        "parameters": parameters,
        "optimizer": {"state": {0: {"step": torch.tensor(step)}}, "param_groups": [{"lr": 0.1}]},
        "privacy": {"runs": {"a": {"steps": step}}},
        "random": checkpoint.random_state(),
        "seconds": 1.5,
        "curve": [{"step": step, "wer": 0.5}],
    }
    return Checkpoint(step=step, **{**given, **values})


def stored(folder: Path) -> Checkpoint:
    found = checkpoint.load(folder)
    assert found is not None
    return found


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "anew"
    assert checkpoint.load(folder) is None
    checkpoint.save(folder, of_step(3))
    loaded, saved = stored(folder), of_step(3)
    assert torch.equal(loaded.parameters["weight"], saved.parameters["weight"])
    assert not loaded.parameters["weight"].requires_grad
    assert torch.equal(loaded.random["cpu"], saved.random["cpu"])
    for name in ("step", "optimizer", "privacy", "seconds", "curve"):
        assert getattr(loaded, name) == getattr(saved, name)
    checkpoint.save(folder, of_step(4, privacy=None))
    assert (stored(folder).step, stored(folder).privacy) == (4, None)
    assert {path.name for path in folder.iterdir()} == {checkpoint.FILE, checkpoint.PREVIOUS}


def half_written(file: BinaryIO) -> None:
    file.write(b"half")
    raise Crash


def crash(*_: Any) -> None:
    raise Crash


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    checkpoint.save(tmp_path, of_step(3))
    with monkeypatch.context() as patch:
        if where == "write":
            patch.setattr(torch, "save", lambda values, file: half_written(file))
        else:
            patch.setattr(os, where, crash)
        with pytest.raises(Crash):
            checkpoint.save(tmp_path, of_step(4))
    assert stored(tmp_path).step == 3
    assert len(list(tmp_path.iterdir())) == 1, "a temporary file is left"


def test_a_file_is_durable_before_it_takes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    for name in ("fsync", "replace"):
        original: Callable[..., None] = getattr(os, name)

        def noted(*args: Any, name: str = name, original: Callable[..., None] = original) -> None:
            order.append(name)
            original(*args)

        monkeypatch.setattr(os, name, noted)
    write_atomically(tmp_path / "a.txt", lambda file: file.write("grün".encode()))
    assert order == ["fsync", "replace", "fsync"]  # the last one is the folder's: the name itself
    assert (tmp_path / "a.txt").read_bytes() == "grün".encode()


class Code:
    """What must not run when a checkpoint is read."""

    def __reduce__(self) -> Any:
        return (os.mkdir, ("ran",))


def cut(path: Path) -> None:
    checkpoint.save(path.parent, of_step(3))
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: path.write_bytes(b"text"), "damaged"),
        (cut, "damaged"),
        (lambda path: torch.save({"format": 1, "step": Code()}, path), "damaged, or not a checkpoint"),
        (lambda path: torch.save([1, 2], path), "damaged, or not a checkpoint"),
        (lambda path: torch.save({"format": -1}, path), "has format -1, this version reads 1"),
        (lambda path: torch.save({}, path), "damaged, or not a checkpoint"),
        (lambda path: torch.save({"format": 1, "step": 3}, path), "damaged, or not a checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / checkpoint.FILE)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_changed_byte_is_damage(tmp_path: Path) -> None:
    """torch checks no record, and takes an entry with a folder's flag for an empty one: it returns stray memory."""
    values = of_step(3, parameters={"weight": torch.full((40,), 2.5)}, random=None)
    checkpoint.save(tmp_path, values)
    whole, path = (tmp_path / checkpoint.FILE).read_bytes(), tmp_path / checkpoint.FILE
    number = whole.index(b"\x00\x00\x20\x40" * 40)  # 2.5, forty times
    steps = (
        whole.index(b"steps") + whole[whole.index(b"steps") :].index(b"K\x03") + 1
    )  # 3, as pickle writes it
    flag = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"/data/0")) + 38  # external attributes of the tensor
    for place, change in ((number + 2, 1), (steps, 2), (flag, 0x10)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :])
        with pytest.raises(checkpoint.DamagedCheckpoint, match=r"state.pt is damaged"):
            checkpoint.load(tmp_path)
    path.write_bytes(whole)
    assert stored(tmp_path).parameters["weight"].tolist() == [2.5] * 40


def test_a_checkpoint_without_a_checksum_is_read(tmp_path: Path) -> None:
    """Those of before there were checksums."""
    checkpoint.save(tmp_path, of_step(3))
    values = torch.load(tmp_path / checkpoint.FILE, weights_only=True)
    del values["checksum"]
    torch.save(values, tmp_path / checkpoint.FILE)
    assert stored(tmp_path).step == 3


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize(
    ("damaged", "step", "said"),
    [
        ((), 5, []),
        ((checkpoint.FILE,), 4, ["the checkpoint before it is used"]),
        (
            (checkpoint.FILE, checkpoint.PREVIOUS),
            None,
            ["the checkpoint before it is used", "the weights start anew"],
        ),
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, damaged: tuple[str, ...], step: int | None, said: list[str]
) -> None:
    for number in (3, 4, 5):
        checkpoint.save(tmp_path, of_step(number))
    for name in damaged:
        damage(tmp_path / name)
    messages: list[str] = []
    for again in (False, True):  # what is damaged is said once
        found = checkpoint.load_usable(tmp_path, messages.append)
        assert (found and found.step) == step, again
    assert len(messages) == len(said)
    assert all(part in message for part, message in zip(said, messages, strict=True))
    checkpoint.save(tmp_path, of_step(6))
    damage(tmp_path / checkpoint.FILE)
    found = checkpoint.load_usable(tmp_path, messages.append)
    assert (found and found.step) == step, "a damaged file took the place of the one before"


def test_the_only_checkpoint_may_be_damaged(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, of_step(3))
    damage(tmp_path / checkpoint.FILE)
    messages: list[str] = []
    assert checkpoint.load_usable(tmp_path, messages.append) is None
    assert "there is none before it, so the weights start anew" in messages[0]
    assert checkpoint.load_usable(tmp_path / "none", messages.append) is None


def test_what_is_not_damaged_is_never_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer version's file, a disk that cannot be read, or too little memory."""
    checkpoint.save(tmp_path, of_step(3))
    checkpoint.save(tmp_path, of_step(4))
    before = (tmp_path / checkpoint.FILE).read_bytes()
    for error in (PermissionError("no"), MemoryError()):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "load", lambda *_, error=error, **__: raises(error))
            with pytest.raises(type(error)):
                checkpoint.load_usable(tmp_path, print)
    assert (tmp_path / checkpoint.FILE).read_bytes() == before
    torch.save({"format": 2}, tmp_path / checkpoint.FILE)
    with pytest.raises(CheckpointError, match="continue with the version that wrote it"):
        checkpoint.load_usable(tmp_path, print)
    assert (tmp_path / checkpoint.FILE).is_file()


def raises(error: BaseException) -> None:
    raise error


class Adapted(nn.Module):
    """A frozen layer, a trained one, and an adapter of which one factor is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(3, 2).requires_grad_(False)
        self.head = nn.Linear(2, 2, bias=False)
        self.lora_A = nn.Linear(3, 1, bias=False).requires_grad_(False)


def test_frozen_adapter_factors_are_kept_with_what_is_trained() -> None:
    assert list(checkpoint.kept_parameters(Adapted())) == ["head.weight", "lora_A.weight"]


def test_parameters_are_put_back() -> None:
    first, second = Adapted(), Adapted()
    checkpoint.restore_parameters(
        second, {name: p.detach() for name, p in checkpoint.kept_parameters(first).items()}
    )
    for name, parameter in checkpoint.kept_parameters(second).items():
        assert torch.equal(parameter, first.get_parameter(name))
    assert second.head.weight.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head.weight": None}, r"lacks \['head\.weight'\] and has \[\]"),
        ({"other": torch.zeros(1)}, r"lacks \[\] and has \['other'\]"),
        ({"head.weight": torch.zeros(2, 3)}, r"'head\.weight' has shape \(2, 3\), but \(2, 2\) in the model"),
    ],
)
def test_another_models_parameters_are_refused(changes: dict[str, Any], message: str) -> None:
    model = Adapted()
    saved = {name: p.detach() for name, p in checkpoint.kept_parameters(model).items()} | changes
    before = model.lora_A.weight.clone()
    with pytest.raises(CheckpointError, match=message):
        checkpoint.restore_parameters(model, {k: v + 1 for k, v in saved.items() if v is not None})
    if "shape" not in message:
        assert torch.equal(model.lora_A.weight, before)


def test_random_states_come_back() -> None:
    state = checkpoint.random_state()
    first = torch.rand(3)
    checkpoint.restore_random(state)
    assert torch.equal(torch.rand(3), first)
