"""The ledger: what was spent, on disk before it is spent.

JSON lines, appended and fsynced; each carries a SHA-256 over its own text and the line before, so that an
edit, a removed or an inserted line is noticed when the file is read. A "run" line states the mechanism; the
"step" lines after it each spend one step of it; an "epsilon" line records an ε that was reported. Nothing in
it depends on the data: no batch sizes, losses, norms, times of steps, and no keys. A "carried" line counts
steps that only a checkpoint knew of.

A line cut short by a crash can only be the last one. It is counted as a spent step (over-counting is safe),
and the next run seals it with a "torn" line. A seal that is cut short in its turn is known by its text, which follows
from the torn line, and is written anew.
"""

import fcntl
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpkernels.privacy.accounting.accountant import Mechanism

FORMAT = 1
_START = "0" * 64
_OPENING = b'{"entry": '
_SAME = ("unit", "dataset_size", "adjacency")  # what the runs of one ledger have in common


class LedgerError(ValueError):
    """A ledger that cannot be trusted or does not belong to this run."""


@dataclass
class Run:
    """One run's line and the number of steps it spent."""

    settings: dict[str, Any]
    steps: int = 0

    @property
    def id(self) -> str:
        """The run's random name."""
        return str(self.settings["run"])

    @property
    def mechanism(self) -> Mechanism:
        """What each of its steps is."""
        return Mechanism(**self.settings["mechanism"])


@dataclass
class LedgerContents:
    """What a ledger holds: its runs, its lines' hashes, and how its last line ends."""

    runs: list[Run] = field(default_factory=list)
    last_hash: str = _START
    hashes: set[str] = field(default_factory=set)
    torn: bytes = b""
    torn_end: int = 0  # where the torn line ends in the file; what follows it is part of its seal
    lacks_newline: bool = False

    @property
    def steps(self) -> int:
        """Steps spent by all runs, a torn line included."""
        return sum(run.steps for run in self.runs) + bool(self.torn)


def _hash(previous: str, body: str) -> str:
    return hashlib.sha256(f"{previous}\n{body}".encode()).hexdigest()


def _line(previous: str, entry: dict[str, Any]) -> tuple[bytes, str]:
    body = json.dumps(entry, ensure_ascii=False, sort_keys=True, allow_nan=False)
    digest = _hash(previous, body)
    return (
        json.dumps({"entry": entry, "sha256": digest}, ensure_ascii=False, sort_keys=True) + "\n"
    ).encode(), digest


def _parse(line: bytes, previous: str) -> tuple[dict[str, Any], str]:
    """(entry, hash) of one line; ValueError when it is not a whole line of a ledger."""
    record = json.loads(line.decode())
    entry, digest = record["entry"], record["sha256"]
    body = json.dumps(entry, ensure_ascii=False, sort_keys=True, allow_nan=False)
    if digest != _hash(previous, body):
        raise ValueError("the hash does not match the line and those before it")
    return entry, digest


def read_ledger(path: str | os.PathLike[str]) -> LedgerContents:
    """Read and verify a ledger.

    Raises:
        FileNotFoundError: no such file.
        LedgerError: a line was edited, removed or inserted, named by its number.
    """
    return _read(Path(path).read_bytes(), os.fspath(path))


def _read(data: bytes, name: str) -> LedgerContents:
    contents = LedgerContents()
    lines = data.split(b"\n")
    unfinished = lines.pop()  # empty where the file ends with a newline
    skip = False
    for number, line in enumerate(lines, start=1):
        if skip:  # the seal of a torn line was read with that line
            skip = False
            continue
        try:
            entry, contents.last_hash = _parse(line, contents.last_hash)
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and _half_sealed(line, unfinished, contents.last_hash):
                contents.torn, contents.torn_end = line, len(data) - len(unfinished) - 1
                return contents
            seal = _torn_seal(line, lines[number] if number < len(lines) else b"", contents.last_hash)
            if seal is None:
                raise LedgerError(
                    f"ledger {name}, line {number}: {error}. A line was edited, removed or inserted, so "
                    "what was spent cannot be known. Restore the file from a backup; a new ledger would "
                    "forget that budget."
                ) from error
            entry, contents.last_hash = seal
            skip = True
        contents.hashes.add(contents.last_hash)
        _apply(contents, entry, f"ledger {name}, line {number}")
    if unfinished and not _complete(contents, unfinished, name):
        if not _opens_like_one(unfinished):
            raise LedgerError(f"ledger {name}: its last line is not a ledger's; is it another kind of file?")
        contents.torn, contents.torn_end = unfinished, len(data)
    return contents


def _opens_like_one(line: bytes) -> bool:
    """Whether a line begins as a ledger's do; a file system may leave zeros where a crash cut it."""
    start = line.strip(b"\0")[: len(_OPENING)]
    return start == _OPENING[: len(start)]


def _complete(contents: LedgerContents, line: bytes, name: str) -> bool:
    """Take a last line that lacks nothing but its newline. False for any other."""
    try:
        entry, contents.last_hash = _parse(line, contents.last_hash)
    except (ValueError, KeyError, TypeError):
        return False
    contents.hashes.add(contents.last_hash)
    contents.lacks_newline = True
    _apply(contents, entry, f"ledger {name}, last line")
    return True


def _seal_of(torn: bytes) -> dict[str, Any]:
    """The entry that vouches for a torn line."""
    return {"kind": "torn", "bytes_sha256": hashlib.sha256(torn).hexdigest()}


def _half_sealed(line: bytes, following: bytes, previous: str) -> bool:
    """Whether a line was torn, and so was the seal after it: what an edit leaves is JSON, or not a seal's beginning."""
    try:
        json.loads(line.decode())
    except ValueError:
        seal, _ = _line(previous, _seal_of(line))
        # One that has its end, and its newline, was written whole: it is damaged, not torn.
        whole = b'"sha256"' in line and line.endswith(b'"}')
        return _opens_like_one(line) and not whole and seal.startswith(following.rstrip(b"\0"))
    return False


def _torn_seal(line: bytes, following: bytes, previous: str) -> tuple[dict[str, Any], str] | None:
    """The "torn" entry that vouches for an unreadable line, or None."""
    try:
        entry, digest = _parse(following, previous)
    except (ValueError, KeyError, TypeError):
        return None
    return (entry, digest) if entry == _seal_of(line) else None


def _apply(contents: LedgerContents, entry: dict[str, Any], where: str) -> None:
    kind = entry.get("kind")
    if kind == "run":
        if entry.get("format") != FORMAT:
            raise LedgerError(f"{where}: format {entry.get('format')!r}; this version reads format {FORMAT}")
        contents.runs.append(Run(entry))
        if entry.get("torn_before"):
            contents.runs[-1].steps += 1  # a torn first line has no run of its own to be charged to
    elif kind in ("step", "torn"):
        if contents.runs:
            contents.runs[-1].steps += 1
        elif kind == "step":
            raise LedgerError(f"{where}: a step before any run line")
    elif kind == "carried":
        known = next((run for run in contents.runs if run.id == entry["run"]), None)
        if known is None:  # before the run that carried it, to which the step lines below belong
            known = Run(entry)
            contents.runs.insert(len(contents.runs) - 1, known)
        known.steps += int(entry["steps"])
    elif kind != "epsilon":
        raise LedgerError(f"{where}: unknown kind {kind!r}; a newer version may have written it")


class Ledger:
    """An open ledger, locked to this process.

    Args:
        path: the file; made where it does not exist, continued where it does.
        settings: the run line's contents; must hold "run", "mechanism", "unit" and "dataset_size".

    Raises:
        LedgerError: the file is damaged, in use by another process, or was written for another data set or
            unit.
    """

    def __init__(self, path: str | os.PathLike[str], settings: dict[str, Any]) -> None:
        self.path = Path(path)
        self._broken = False
        if not self.path.parent.is_dir():
            raise LedgerError(f"ledger={str(path)!r}: its folder does not exist; create it, or name another")
        # Open and locked as long as the run lasts.
        self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115
        try:
            self._lock()
            self._file.seek(0)
            contents = _read(self._file.read(), str(self.path))
            for run in contents.runs:
                self._check_same(run.settings, settings)
            self.previous_runs = contents.runs
            self._hashes = contents.hashes
            self._last_hash = contents.last_hash
            orphan = bool(contents.torn) and not contents.runs
            if contents.lacks_newline:
                os.write(self._file.fileno(), b"\n")
            if contents.torn:
                self._seal(contents)
            self.run = Run(
                {"kind": "run", "format": FORMAT, **settings, "torn_before": orphan}, steps=int(orphan)
            )
            self._append(self.run.settings)
            _sync_folder(self.path)
        except BaseException:
            self._file.close()
            raise

    @property
    def last_hash(self) -> str:
        """Hash of the last line: a checkpoint keeps it, so that lines cut from the end are noticed too."""
        return self._last_hash

    def holds(self, digest: str) -> bool:
        """Whether a line with this hash is in the ledger."""
        return digest in self._hashes or digest == _START

    def spend_step(self) -> None:
        """Write one step, on disk when this returns. Call it before the step changes anything.

        Raises:
            LedgerError: the ledger is closed, was replaced, or an earlier write failed.
        """
        self._append({"kind": "step", "run": self.run.id, "step": self.run.steps + 1})
        self.run.steps += 1

    def note_epsilon(self, epsilon: float, delta: float, accountant: str, steps: int) -> None:
        """Write an ε that was reported (∞ as the string "inf": JSON has no infinity)."""
        value = epsilon if epsilon != float("inf") else "inf"
        self._append(
            {"kind": "epsilon", "epsilon": value, "delta": delta, "accountant": accountant, "steps": steps}
        )

    def carry(self, run: str, mechanism: Mechanism, steps: int) -> None:
        """Write steps of another run that this ledger does not hold: a checkpoint knew of them."""
        shared = {key: self.run.settings[key] for key in _SAME}
        entry = {"kind": "carried", "run": run, "mechanism": mechanism.to_dict(), "steps": steps}
        self._append(entry | shared)

    def close(self) -> None:
        """Close the file and give up the lock."""
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LedgerError(
                f"ledger={str(self.path)!r} is in use by another run (or by an engine of this process that "
                "was not closed): two runs would each see half of what is spent. Wait for it, or call "
                "engine.close()."
            ) from error

    def _check_same(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        for key in _SAME:
            if old[key] != new[key]:
                raise LedgerError(
                    f"ledger={str(self.path)!r} was written for {key}={old[key]!r}, this run has "
                    f"{new[key]!r}: their spendings do not add up to one ε. Use another ledger for another "
                    "data set or unit."
                )

    def _seal(self, contents: LedgerContents) -> None:
        os.ftruncate(
            self._file.fileno(), contents.torn_end
        )  # a seal that was cut short: nothing was spent by it
        self._append(_seal_of(contents.torn), before=b"\n")
        if contents.runs:
            contents.runs[-1].steps += 1

    def _check_in_place(self) -> None:
        """Raise where the path no longer names the open file: what is written would be lost with it."""
        mine = os.fstat(self._file.fileno())
        try:
            named = os.stat(self.path)
        except FileNotFoundError:
            named = None
        if named is None or (named.st_dev, named.st_ino) != (mine.st_dev, mine.st_ino):
            raise LedgerError(
                f"ledger {self.path} was deleted, moved or replaced while in use: steps written now would be "
                "forgotten. Put the file of this run back, and resume from the last checkpoint."
            )

    def _append(self, entry: dict[str, Any], before: bytes = b"") -> None:
        if self._file.closed:
            raise LedgerError(
                f"ledger {self.path} is closed, so that no step and no ε can be written to it; read epsilon before "
                "engine.close(), or read_ledger(path)"
            )
        line, digest = _line(self._last_hash, entry)
        data = before + line
        if self._broken:
            raise LedgerError(
                f"ledger {self.path}: an earlier write failed; start again from the last checkpoint"
            )
        self._check_in_place()
        self._broken = True  # until the whole line is known to be on disk
        written = os.write(self._file.fileno(), data)
        if written != len(data):
            raise OSError(f"ledger {self.path}: wrote {written} of {len(data)} bytes; is the disk full?")
        os.fsync(self._file.fileno())
        self._broken = False
        self._last_hash = digest
        self._hashes.add(digest)


def _sync_folder(path: Path) -> None:
    """Make the file's own name durable."""
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
