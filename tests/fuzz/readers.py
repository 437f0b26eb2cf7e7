"""Damaged files: what reads them gives the exact truth or an error that names the file, and never a smaller ε."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar
from unittest import mock

import torch

from asr_finetune.config.schema import DataConfig
from asr_finetune.data.listings import find_listings, read_listing
from asr_finetune.report.verify import read_chain
from dpkernels import checkpoint
from dpkernels.checkpoint import Checkpoint
from dpkernels.errors import UserError
from dpkernels.privacy import read_ledger
from dpkernels.privacy.accounting.accountant import Mechanism
from dpkernels.privacy.accounting.ledger import Ledger
from tests.fuzz.draw import Draw

T = TypeVar("T")
SETTINGS = {
    "mechanism": {"sample_rate": 0.1, "noise_multiplier": 1.0, "dataset_size": None, "max_batch_size": None},
    "unit": "example",
    "dataset_size": 10,
    "adjacency": "add or remove one example",
}
_JSON = (
    "null",
    "true",
    "-1",
    "1e999",
    "NaN",
    '"',
    '"\\ud800"',
    "[",
    "{",
    "[" * 5000,
    "9" * 5000,
    "0",
    "{}",
    "\x00",
)


# ---- damage


def flipped(draw: Draw, data: bytes) -> bytes:
    """One to three bytes are others."""
    changed = bytearray(data)
    for _ in range(draw.integer(1, 3)):
        place = draw.integer(0, len(data) - 1)
        changed[place] ^= draw.integer(1, 255)
    return bytes(changed)


def cut(draw: Draw, data: bytes) -> bytes:
    """Without its end."""
    return data[: draw.integer(0, len(data) - 1)]


def removed(draw: Draw, data: bytes) -> bytes:
    """Without a piece, more often a whole line."""
    first, end = _piece(draw, data)
    return data[:first] + data[end:]


def duplicated(draw: Draw, data: bytes) -> bytes:
    """With a piece twice, or a copy of it elsewhere."""
    first, end = _piece(draw, data)
    to = end if draw.chance(0.5) else _piece(draw, data)[0]
    return data[:to] + data[first:end] + data[to:]


def overwritten(draw: Draw, data: bytes) -> bytes:
    """A piece is zeros, as a file system leaves it, or other bytes."""
    first, end = _piece(draw, data)
    filling = bytes(end - first) if draw.chance(0.5) else draw.rng.bytes(end - first)
    return data[:first] + filling + data[end:]


def inserted(draw: Draw, data: bytes) -> bytes:
    """With other bytes somewhere."""
    place = draw.integer(0, len(data))
    more = draw.one_of((b"\n", b"\x00" * 8, draw.rng.bytes(5), draw.one_of(_JSON).encode()))
    return data[:place] + more + data[place:]


def _piece(draw: Draw, data: bytes) -> tuple[int, int]:
    """Begin and end of a piece that is not the whole."""
    if draw.chance(0.5) and data.count(b"\n") > 1:
        begins = [0, *(i + 1 for i, byte in enumerate(data) if byte == 10)]
        line = draw.integer(0, len(begins) - 2)
        return begins[line], begins[min(len(begins) - 1, line + draw.integer(1, 2))]
    first = draw.integer(0, len(data) - 1)
    return first, min(len(data), first + draw.integer(1, max(1, len(data) // 3)))


DAMAGE: tuple[Callable[[Draw, bytes], bytes], ...] = (
    flipped,
    cut,
    removed,
    duplicated,
    overwritten,
    inserted,
)


def damaged(draw: Draw, data: bytes) -> bytes:
    """Damage of one of the kinds; the note has its name."""
    kind = draw.one_of(DAMAGE)
    draw.note("damage", kind.__name__)
    return kind(draw, data)


# ---- readers


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A folder for one case, where nothing waits for the disk."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, mock.patch.object(os, "fsync"):
        yield Path(folder)


def written_ledger(draw: Draw, path: Path) -> tuple[int, str]:
    """Write a ledger of some runs; the steps it counts, and the hash of its last line."""
    last, spent = "", 0
    for run in range(draw.integer(1, 3)):
        ledger = Ledger(path, {"run": f"run{run}", **SETTINGS})
        for _ in range(draw.integer(0, 4)):
            ledger.spend_step()
        if draw.chance(0.3):
            ledger.note_epsilon(1.5, 1e-5, "pld", ledger.run.steps)
        if draw.chance(0.3):
            ledger.carry("of a checkpoint", Mechanism(**SETTINGS["mechanism"]), draw.integer(1, 1000))  # type: ignore[arg-type]
        last = ledger.last_hash
        ledger.close()
        if draw.chance(0.2) and run == 0:  # a crash, which the next run seals
            path.write_bytes(path.read_bytes()[: -draw.integer(2, 30)])
    spent = read_ledger(path).steps
    return spent, last


def _unless_refused(path: Path, read: Callable[[], T]) -> T | None:
    """What a reader returns; None where it refuses the file, by an error that names it."""
    try:
        return read()
    except UserError as error:
        said = str(error)
    assert str(path) in said, f"the error does not name the file: {said}"
    return None


def _is_earlier(data: bytes, hurt: bytes) -> bool:
    """Whether a crash at an earlier moment leaves this ledger: only a checkpoint's hash shows what is missing in it.

    It is a beginning of the whole one, before zeros that a file system leaves, or before a torn line that was there.
    """
    lines = hurt[: hurt.rfind(b"\n") + 1]
    return data.startswith(hurt.rstrip(b"\x00")) or (not data.endswith(b"\n") and data.startswith(lines))


def ledger(draw: Draw) -> None:
    """A damaged ledger is refused by name, counts no step less, or lacks the line that a checkpoint asks for."""
    with _folder() as folder:
        path = folder / "ledger.jsonl"
        spent, last = written_ledger(draw, path)
        data = path.read_bytes()
        hurt = damaged(draw, data)
        path.write_bytes(hurt)
        draw.note("ledger", hurt)
        earlier = _is_earlier(data, hurt)
        contents = _unless_refused(path, lambda: read_ledger(path))
        if contents is not None:
            counted = contents.steps >= spent or last not in contents.hashes
            assert counted, f"{contents.steps} steps are read of {spent}"
            if not earlier:
                assert contents.steps >= spent, (
                    f"{contents.steps} steps are read of {spent}, which were spent"
                )
            with contextlib.suppress(UserError):  # and a run that goes on counts on from there
                again = Ledger(path, {"run": "again", **SETTINGS})
                again.spend_step()
                again.close()
                assert read_ledger(path).steps == contents.steps + 1, "a step more is not a step more"
                path.write_bytes(hurt)
        chain = read_chain(hurt)
        if not chain.broken and not earlier:
            assert chain.steps >= spent, f"verify counts {chain.steps} steps of {spent}"


def forged(draw: Draw) -> None:
    """Entries with hashes that are right, but other contents: another version's, or somebody's."""
    from dpkernels.privacy.accounting.ledger import _line

    previous, lines = "0" * 64, b""
    for _ in range(draw.integer(1, 4)):
        entry = {"kind": "run", "format": 1, "run": "a", **SETTINGS} if not lines else {"kind": "step"}
        entry = draw.one_of((entry, {**entry, "kind": draw.one_of(("carried", "torn", "epsilon", "run", 7))}))
        for name in draw.one_of(((), ("run",), ("steps",), ("mechanism",), ("kind",), ("format",))):
            entry = {**entry, name: draw.one_of((None, -5, 1.5, "text", [], {}, True))}
            if draw.chance(0.3):
                del entry[name]
        line, previous = _line(previous, draw.one_of((entry, entry, entry, [], "text", None, 3)))
        lines += line
    draw.note("ledger", lines)
    with _folder() as folder:
        path = folder / "ledger.jsonl"
        path.write_bytes(lines)
        contents = _unless_refused(path, lambda: read_ledger(path))
        if contents is not None:
            assert all(run.steps >= 0 for run in contents.runs), "a run has spent less than nothing"
            assert all(run.mechanism and run.id for run in contents.runs)
    assert all(steps >= 0 for _, steps in read_chain(lines).runs.values())


def saved(draw: Draw) -> None:
    """A damaged checkpoint is refused by name, or gives every value that was saved."""
    step = draw.integer(1, 1000)
    values = Checkpoint(
        step=step,
        parameters={
            f"layer.{n}": torch.full((draw.integer(1, 60),), float(n)) for n in range(draw.integer(1, 3))
        },
        optimizer={"state": {0: {"step": torch.tensor(float(step))}}, "param_groups": [{"lr": 0.1}]},
        privacy={"runs": {"a": {"steps": step, "mechanism": SETTINGS["mechanism"]}}},
        random=None,
        seconds=1.5,
        curve=[{"step": step}],
    )
    with _folder() as folder:
        checkpoint.save(folder, values)
        path = folder / checkpoint.FILE
        hurt = damaged(draw, path.read_bytes())
        path.write_bytes(hurt)
        found = _unless_refused(path, lambda: checkpoint.load(folder))
        if found is None:
            return
        for name in ("step", "privacy", "seconds", "curve", "random"):
            assert getattr(found, name) == getattr(values, name), f"{name} is {getattr(found, name)}"
        assert found.optimizer["param_groups"] == values.optimizer["param_groups"]
        assert found.optimizer["state"][0]["step"] == step
        assert found.parameters.keys() == values.parameters.keys()
        assert all(torch.equal(found.parameters[name], t) for name, t in values.parameters.items())


def listing(draw: Draw) -> None:
    """A damaged listing gives records, each usable or with the reason why it is not, or is refused by name."""
    rows = [
        {
            "audio": f"{n}.wav",
            "text": f"text {n}",
            "speaker": n,
            "split": "train",
            "duration": 1.5,
            "id": f"r{n}",
        }
        for n in range(draw.integer(1, 5))
    ]
    suffix = draw.note("suffix", draw.one_of((".jsonl", ".json", ".csv", ".tsv")))
    if suffix in (".jsonl", ".json"):
        lines = [json.dumps(row) for row in rows]
        text = f"[{', '.join(lines)}]" if suffix == ".json" and draw.chance(0.5) else "\n".join(lines) + "\n"
    else:
        mark = "," if suffix == ".csv" else "\t"
        text = (
            "\n".join(mark.join(map(str, row)) for row in (rows[0].keys(), *(row.values() for row in rows)))
            + "\n"
        )
    hurt = damaged(draw, text.encode())
    with _folder() as folder:
        path = folder / f"train{suffix}"
        path.write_bytes(hurt)
        draw.note("listing", hurt)
        data = DataConfig(train=str(path))
        split = draw.one_of((None, "train"))
        _unless_refused(path, lambda: find_listings(folder, data))
        for record in _unless_refused(path, lambda: list(read_listing(path, split, data))) or ():
            assert isinstance(record.id, str)
            assert record.reason or (record.path is not None and record.text is not None)


KINDS: Sequence[tuple[str, Callable[[Draw], None], int]] = (
    ("ledger", ledger, 4),
    ("forged", forged, 1),
    ("checkpoint", saved, 3),
    ("listing", listing, 2),
)
"""Kinds of cases of readers, and how many of 10 each is."""
