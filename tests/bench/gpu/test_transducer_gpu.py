"""bench.gpu.transducer without a GPU: whose losses are right, what its floor counts, and its table."""

from __future__ import annotations

import argparse

import pytest
import torch
from torch import Tensor

from bench.gpu import transducer
from bench.reports import kernel

KINDS = [(kind, name) for kind, contenders in transducer.CONTENDERS.items() for name in contenders]


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_a_contenders_losses_are_right(kind: str, name: str) -> None:
    if name != "dpkernels":
        pytest.importorskip(name)
    assert transducer.problem(kind, name, "cpu", torch.float32) == ""


def test_a_contender_with_wrong_losses_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(batch: transducer.Batch) -> Tensor:
        return 1.2 * transducer.of_ours(batch)

    def absent(batch: transducer.Batch) -> Tensor:
        raise ModuleNotFoundError("torchaudio")

    monkeypatch.setitem(transducer.CONTENDERS, "RNN-T", {"dpkernels": wrong, "torchaudio": absent})
    assert transducer.problem("RNN-T", "dpkernels", "cpu", torch.float32) == "wrong losses (off by 20%)"
    assert transducer.problem("RNN-T", "torchaudio", "cpu", torch.float32) == "not installed"


def test_the_floor_multiplies_as_often_as_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transducer, "ROWS", 8)
    size, multiplied = (2, 4, 3, 9), []
    honest = torch.mm

    def mm(a: Tensor, b: Tensor) -> Tensor:
        multiplied.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
        return honest(a, b)

    batch = transducer.make(size, (), "cpu", torch.float32, hidden=5)
    monkeypatch.setattr(torch, "mm", mm)
    transducer.floor(size, batch)()
    assert sum(multiplied) == transducer.operations(size, 5, 9) == 3 * 2 * 2 * 4 * 4 * 5 * 9


def test_the_table_says_who_ran_out_of_memory() -> None:
    contenders = {
        "dpkernels": {"status": "ok", "seconds": 0.03, "iqr": 0.002, "peak_mib": 400.0},
        "torchaudio": {"status": "out of memory"},
        "floor": {"status": "ok", "seconds": 0.02, "iqr": 0.0},
    }
    row = {"kind": "RNN-T", "size": [64, 188, 50, 8198], "operations": 1, "contenders": contenders}
    about = {
        "device": "a GPU",
        "versions": {"torch": "2"},
        "commit": "c",
        "dirty": False,
        "date": "2026-11-30T00",
    }
    text = kernel.transducer_loss({"about": about, "hidden": 640, "rows": [row]})
    assert "| RNN-T, B = 64, T = 188, U = 50, V = 8,198 | dpkernels | 30.0 ± 1.0 | 1.50× | 400 |" in text
    assert "|  | torchaudio | out of memory |  |  |" in text


def test_sizes_are_four_numbers() -> None:
    assert transducer.sizes_of("8,188,50,8198") == (8, 188, 50, 8198)
    for text in ("8,188,50", "8,188,50,0"):
        with pytest.raises(argparse.ArgumentTypeError, match="pass B,T,U,V"):
            transducer.sizes_of(text)
