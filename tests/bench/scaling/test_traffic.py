"""The three counts of what a step sends agree where they must."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from bench.scaling.traffic import Watch, plan, socket_bytes, watched
from dpkernels.privacy import DPOptimizer
from dpkernels.privacy.ranks import exchange
from dpkernels.privacy.ranks.pieces import cut, owners
from tests.bench.test_run import run

SHAPES = [(40, 30), (7,), (), (0,), (300,)]
TENSORS = [torch.empty(shape, device="meta") for shape in SHAPES]


def given(watch: Watch, ranks: int, rank: int) -> None:
    """Move sums and parameters of SHAPES as rank `rank` of `ranks`, with collectives that only count."""

    def nothing(output: Tensor, source: Tensor, **_: Any) -> None: ...

    parameters = [torch.zeros(shape) for shape in SHAPES]
    process: Any = SimpleNamespace(size=ranks, rank=rank, group=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "_REDUCE_SCATTER", watch.counted("sums", nothing))
        patch.setattr(exchange, "ALL_GATHER", watch.counted("results", nothing))
        moves = exchange.Exchange(process, owners(cut(parameters), ranks))
        moves.sums_to_owners([p.double() for p in parameters])
        moves.to_all(parameters)


@pytest.mark.parametrize("staged", [2**26, 1024, 200])
@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_the_plan_is_what_the_collectives_are_given(
    monkeypatch: pytest.MonkeyPatch, ranks: int, staged: int
) -> None:
    monkeypatch.setattr(exchange, "STAGED_BYTES", staged)
    expected = plan(TENSORS, ranks)
    for rank in range(ranks):
        watch = Watch()
        given(watch, ranks, rank)
        assert watch.calls == {"sums": expected.rounds, "results": expected.rounds}
        assert watch.given == {"sums": expected.bytes_in(), "results": expected.bytes_out()}
    assert expected.entries == 1508
    longest = max(sum(piece.entries for piece in part) for part in owners(cut(TENSORS), ranks))
    assert ranks * longest <= expected.padded < ranks * (longest + expected.rounds)
    assert expected.bytes_in() >= 8 * expected.entries


def test_the_steps_of_an_optimizer_are_watched() -> None:
    """The names that `watched` puts its counters in place of are there."""
    names = ["sums_to_owners", "to_all"]
    moves, ranks = SimpleNamespace(**dict.fromkeys(names, lambda: None)), SimpleNamespace(_told=lambda: None)
    before = vars(exchange).copy()
    with watched(cast("DPOptimizer", SimpleNamespace(_ranks=ranks, _exchange=moves))) as watch:
        assert {name for name, value in vars(exchange).items() if value is not before[name]} == {
            "_REDUCE_SCATTER",
            "ALL_GATHER",
        }
        moves.sums_to_owners()
        moves.to_all()
        ranks._told()
    assert watch.calls == {"in": 1, "out": 1, "facts": 1}
    assert vars(exchange) == before


def test_one_process_sends_nothing() -> None:
    alone = plan([torch.empty(5, 3)], 1)
    assert (alone.rounds, alone.padded, alone.sent()) == (0, 0, 0.0)
    watch = Watch()
    given(watch, 1, 0)
    assert watch.given == {}


def test_sockets_say_what_they_sent() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as ours,
        server.accept()[0] as theirs,
    ):
        before = socket_bytes()
        if before is None:
            pytest.skip("this kernel does not count the bytes of a connection")
        ours.sendall(bytes(12345))
        received = 0
        while received < 12345:
            received += len(theirs.recv(2**16))
        after = socket_bytes()
    assert after is not None
    assert after - before == 12345


@pytest.mark.slow
@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads Linux's count of a connection's bytes"
)
def test_the_benchmark_as_it_is_typed(tmp_path: Path) -> None:
    path = tmp_path / "scaling.json"
    sizes = ("--cases", "tiny-full", "--size", "2", "--frames", "16", "--rounds", "2")
    done = run("-m", "bench.scaling", *sizes, "--output", str(path))
    assert done.returncode == 0, done.stderr
    rows = {row["way"]: row for row in json.loads(path.read_text())["rows"]}
    assert set(rows) == {"one process", "weak", "strong"}
    for way in ("weak", "strong"):
        row = rows[way]
        assert row["error"] <= 1e-5
        assert (row["given_in"], row["given_out"]) == (row["planned_in"], row["planned_out"])
        if row["sent"] is not None:
            assert row["sent"] >= row["planned_sent"]
