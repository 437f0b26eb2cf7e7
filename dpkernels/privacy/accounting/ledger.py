"""The ledger: the spent steps, each on disk before it is applied.

The ledger has JSON lines, appended and fsynced. Each carries a SHA-256 over its own text and the previous line, so
that reading finds every edited, removed or inserted line. A "run" line states the mechanism; each "step" line after it
spends one step; an "epsilon" line records an ε that was reported; a "carried" line counts steps that only a checkpoint
had recorded. Nothing depends on the data: the ledger has no batch sizes, losses, norms, times of steps or keys.

Only the last line can be torn, by a crash. It counts as a spent step (over-counting is safe), and the next run adds a
"torn" line as its seal. A seal that is torn, too, is recognised by its text, which the torn line determines, and is
written again.
"""

import codecs
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import threading
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpkernels.errors import UserError
from dpkernels.files import WriteError, sync_folder, unwritten, writing
from dpkernels.privacy.accounting.accountant import Mechanism

logger = logging.getLogger("dpkernels")

FORMAT = 1
_START = "0" * 64
_OPENING = b'{"entry": '
# The end of a whole line, but for some bytes: its hash, `"}`, and the newline if that became another byte.
_WHOLE = re.compile(rb'(?:"sha256": "[0-9a-f]{40}.{24}(?!",).{2,3}|[0-9a-f]{8}"\})\Z', re.DOTALL)
# How JSON fails where it was cut: in a string, in an escape, or where more is expected.
_CUT = ("Unterminated string", "Invalid \\uXXXX escape", "Expecting")
_SAME = ("unit", "dataset_size", "adjacency")  # settings that all runs of one ledger share


class LedgerError(UserError, ValueError):
    """The ledger cannot be trusted or does not belong to this run."""


class LedgerWriteError(LedgerError, WriteError):
    """A line of the ledger cannot be written: the step that it is for was not taken, and counts if part of it was."""


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
        """The mechanism of each of its steps."""
        return Mechanism(**self.settings["mechanism"])


@dataclass
class LedgerContents:
    """The contents of a ledger: its runs, the hashes of its lines, and the state of its last line."""

    runs: list[Run] = field(default_factory=list)
    last_hash: str = _START
    hashes: set[str] = field(default_factory=set)
    torn: bytes = b""
    torn_end: int = 0  # end of the torn line in the file; any bytes after it belong to its seal
    lacks_newline: bool = False
    end: int = 0  # end of the last line that lacks its newline; zeros may follow, which a crash left

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
    """(entry, hash) of one line. Raises ValueError if it is not a complete line of a ledger."""
    try:
        record = json.loads(line.decode())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    entry, digest = record["entry"], record["sha256"]
    if not isinstance(entry, dict):
        raise ValueError("its entry is not an object")
    body = json.dumps(entry, ensure_ascii=False, sort_keys=True, allow_nan=False)
    if digest != _hash(previous, body):
        raise ValueError("the hash does not match this line and the lines before it")
    return entry, digest


def read_ledger(path: str | os.PathLike[str]) -> LedgerContents:
    """Read and verify a ledger.

    Raises:
        FileNotFoundError: no such file.
        LedgerError: a line was edited, removed or inserted; the message has its number.
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
                    "the spent budget is unknown. Restore the file from a backup; a new ledger would "
                    "not count the steps in this one."
                ) from error
            entry, contents.last_hash = seal
            skip = True
        contents.hashes.add(contents.last_hash)
        _apply(contents, entry, f"ledger {name}, line {number}")
    if unfinished and not _complete(contents, unfinished, name, len(data)):
        if not _begins_like_a_line(unfinished):
            raise LedgerError(
                f"ledger {name}: the last line is not a ledger's; is this another kind of file?"
            )
        if not _is_torn(unfinished):
            raise LedgerError(
                f"ledger {name}, last line: it was damaged, not cut by a crash, so the spent budget is unknown. "
                "Restore the file from a backup; a new ledger would not count the steps in this one."
            )
        contents.torn, contents.torn_end = unfinished, len(data)
    return contents


def _begins_like_a_line(line: bytes) -> bool:
    """Whether a line begins like a ledger's line; after a crash the file system may have left zeros in it."""
    start = line.strip(b"\0")[: len(_OPENING)]
    return start == _OPENING[: len(start)]


def _is_torn(line: bytes) -> bool:
    """Whether a crash cut this line: it is the beginning of a line, not a whole one in which bytes changed.

    The difference matters for a "carried" line, which counts more than the one step of a torn line.
    """
    text = line.strip(b"\0")
    if not _begins_like_a_line(line) or _WHOLE.search(text):
        return False
    try:
        beginning = codecs.getincrementaldecoder("utf-8")().decode(text)  # its last character may be cut, too
        json.loads(beginning)
    except json.JSONDecodeError as error:
        # At its end, up to a cut literal or escape; or at the begin of the string that has no end.
        at_end = error.msg.startswith(_CUT[0]) or error.pos >= len(beginning) - len("\\u1234")
        return at_end and error.msg.startswith(_CUT)
    except (ValueError, RecursionError):
        return False
    return False


def _complete(contents: LedgerContents, line: bytes, name: str, end: int) -> bool:
    """Apply a last line, up to `end` in the file, that lacks only its newline. Returns False for any other line."""
    whole = line.rstrip(b"\0")
    try:
        entry, contents.last_hash = _parse(whole, contents.last_hash)
    except (ValueError, KeyError, TypeError):
        return False
    contents.hashes.add(contents.last_hash)
    contents.lacks_newline, contents.end = True, end - len(line) + len(whole)
    _apply(contents, entry, f"ledger {name}, last line")
    return True


def _seal_of(torn: bytes) -> dict[str, Any]:
    """The "torn" entry that seals a torn line."""
    return {"kind": "torn", "bytes_sha256": hashlib.sha256(torn).hexdigest()}


def _half_sealed(line: bytes, following: bytes, previous: str) -> bool:
    """Whether a line and the seal after it are both torn. An edit leaves a whole line, or no beginning of a seal."""
    if not following and line.endswith(
        b'"}'
    ):  # the end of a line and nothing of a seal: bytes within it are missing
        return False
    seal, _ = _line(previous, _seal_of(line))
    return _is_torn(line) and seal.startswith(following.rstrip(b"\0"))


def _torn_seal(line: bytes, following: bytes, previous: str) -> tuple[dict[str, Any], str] | None:
    """The "torn" entry that seals an unreadable line, or None."""
    try:
        entry, digest = _parse(following, previous)
    except (ValueError, KeyError, TypeError):
        return None
    return (entry, digest) if entry == _seal_of(line) else None


def _steps_of(entry: dict[str, Any], where: str) -> int:
    """The steps of a "carried" entry; 0 of a "run" entry.

    Raises:
        LedgerError: the entry lacks a setting, or has one that no run can have.
    """
    try:
        missing = [key for key in ("run", *_SAME) if key not in entry]
        if missing:
            raise ValueError(f"it lacks {', '.join(missing)}")
        Mechanism(**entry["mechanism"])
        steps = entry["steps"] if entry["kind"] == "carried" else 0
        if type(steps) is not int or steps < 0:
            raise ValueError(f"steps={steps!r} is not a number of steps")
    except (ValueError, KeyError, TypeError) as error:
        raise LedgerError(
            f"{where}: this is not an entry of this version ({error}); read the ledger with the version that wrote it"
        ) from error
    return steps


def _apply(contents: LedgerContents, entry: dict[str, Any], where: str) -> None:
    kind = entry.get("kind")
    if kind == "run":
        if entry.get("format") != FORMAT:
            raise LedgerError(f"{where}: format {entry.get('format')!r}; this version reads format {FORMAT}")
        contents.runs.append(Run(entry, _steps_of(entry, where)))
        if entry.get("torn_before"):
            contents.runs[-1].steps += 1  # a torn first line has no earlier run, so this run counts it
    elif kind in ("step", "torn"):
        if contents.runs:
            contents.runs[-1].steps += 1
        elif kind == "step":
            raise LedgerError(f"{where}: a step before any run line")
    elif kind == "carried":
        steps = _steps_of(entry, where)
        known = next((run for run in contents.runs if run.id == str(entry["run"])), None)
        if known is None:  # inserted before the run that carried it: the next step lines belong to that run
            known = Run(entry)
            contents.runs.insert(len(contents.runs) - 1, known)
        known.steps += steps
    elif kind != "epsilon":
        raise LedgerError(f"{where}: unknown kind {kind!r}; a newer version may have written it")


# the open ledgers of this process, by device and number of the file
_OPEN: "weakref.WeakValueDictionary[tuple[int, int], Ledger]" = weakref.WeakValueDictionary()


class Ledger:
    """An open ledger, locked to this process.

    A ledger that an earlier run of this process still holds (a notebook's cell that ran before) is taken over: each of
    its steps is in the file, and no further one can be taken.

    Args:
        path: the file; created if it does not exist, else continued.
        settings: the run line's contents; must have "run", "mechanism", "unit" and "dataset_size".

    Raises:
        LedgerError: the file is damaged, in use by another process, or was written for another data set or
            unit.
        WriteError: it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], settings: dict[str, Any]) -> None:
        self.path = Path(path)
        self._broken = False
        self._taken_over = False
        self._pid = os.getpid()
        self._writing = threading.RLock()
        if not self.path.parent.is_dir():
            raise LedgerError(
                f"ledger={str(path)!r}: its folder does not exist; create it, or give another path"
            )
        # The file stays open and locked as long as the run lasts.
        with writing(f"ledger={str(path)!r}"):
            self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115
        try:
            self._take_over(settings)
            self._lock()
            contents = self._contents(settings)
            self.previous_runs = contents.runs
            self._hashes = contents.hashes
            self._last_hash = contents.last_hash
            orphan = bool(contents.torn) and not contents.runs
            if contents.lacks_newline:
                os.ftruncate(self._file.fileno(), contents.end)
                self._write(b"\n")
            if contents.torn:
                self._seal(contents)
            self.run = Run(
                {"kind": "run", "format": FORMAT, **settings, "torn_before": orphan}, steps=int(orphan)
            )
            self._append(self.run.settings)
            sync_folder(self.path.parent)
            _OPEN[self._identity()] = self
        except BaseException:
            self._file.close()
            raise

    @property
    def last_hash(self) -> str:
        """Hash of the last line. Checkpoints store it, so that removed last lines are found, too."""
        return self._last_hash

    def holds(self, digest: str) -> bool:
        """Whether a line with this hash is in the ledger."""
        return digest in self._hashes or digest == _START

    def spend_step(self) -> None:
        """Write one step; it is on disk on return. Call it before the step changes anything.

        Raises:
            LedgerError: the ledger is closed, was replaced, or an earlier write failed.
            LedgerWriteError: this write failed.
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
        """Write steps of another run that are in a checkpoint but not in this ledger."""
        shared = {key: self.run.settings[key] for key in _SAME}
        entry = {"kind": "carried", "run": run, "mechanism": mechanism.to_dict(), "steps": steps}
        self._append(entry | shared)

    def close(self) -> None:
        """Close the file and release the lock."""
        with self._writing:
            self._file.close()

    def _identity(self) -> tuple[int, int]:
        opened = os.fstat(self._file.fileno())
        return opened.st_dev, opened.st_ino

    def _contents(self, settings: dict[str, Any]) -> LedgerContents:
        self._file.seek(0)
        contents = _read(self._file.read(), str(self.path))
        for run in contents.runs:
            self._check_same(run.settings, settings)
        return contents

    def _take_over(self, settings: dict[str, Any]) -> None:
        """Close the ledger that holds the lock, if it is this process's own and this run may continue it."""
        holder = _OPEN.get(self._identity())
        if holder is None or holder._pid != os.getpid() or holder._file.closed:
            return
        self._contents(settings)
        logger.warning(
            "ledger %s is taken over from an earlier run of this process; its steps count", self.path
        )
        holder._taken_over = True
        holder.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LedgerError(
                f"ledger={str(self.path)!r} is in use by a run of another process: each of the two would count only "
                "its own steps. Wait for the other run, or end its process."
            ) from error

    def _check_same(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        for key in _SAME:
            if old[key] != new[key]:
                raise LedgerError(
                    f"ledger={str(self.path)!r} was written for {key}={old[key]!r}, this run has "
                    f"{new[key]!r}: their steps do not add up to one ε. Use another ledger for another "
                    "data set or unit."
                )

    def _seal(self, contents: LedgerContents) -> None:
        os.ftruncate(self._file.fileno(), contents.torn_end)  # removes a torn seal, which spent nothing
        self._append(_seal_of(contents.torn), before=b"\n")
        if contents.runs:
            contents.runs[-1].steps += 1

    def _check_in_place(self) -> None:
        """Raise LedgerError if the path no longer names the open file: written lines would be lost."""
        opened = os.fstat(self._file.fileno())
        try:
            named = os.stat(self.path)
        except FileNotFoundError:
            named = None
        if named is None or (named.st_dev, named.st_ino) != (opened.st_dev, opened.st_ino):
            raise LedgerError(
                f"ledger {self.path} was deleted, moved or replaced while in use: steps written now would be "
                "lost. Put the file of this run back, and resume from the last checkpoint."
            )

    def _append(self, entry: dict[str, Any], before: bytes = b"") -> None:
        with self._writing:  # no other thread takes the ledger over in the middle of a line
            self._append_alone(entry, before)

    def _append_alone(self, entry: dict[str, Any], before: bytes) -> None:
        if self._taken_over:
            raise LedgerError(
                f"ledger {self.path} was taken over by a later make_private of this process: all steps so far are in "
                "it, and no step and no ε of this run can be written. Go on with the later run, or give this one a "
                "ledger of its own from its beginning"
            )
        if self._file.closed:
            raise LedgerError(
                f"ledger {self.path} is closed: no step and no ε can be written to it; call get_epsilon before "
                "engine.close(), or read_ledger(path)"
            )
        line, digest = _line(self._last_hash, entry)
        data = before + line
        if self._broken:
            raise LedgerError(
                f"ledger {self.path}: an earlier write failed; start again from the last checkpoint"
            )
        self._check_in_place()
        self._broken = True  # until the complete line is on disk
        self._write(data)
        self._broken = False
        self._last_hash = digest
        self._hashes.add(digest)

    def _write(self, data: bytes) -> None:
        """Write `data` durably. What is written of it in vain stays: read again, a torn line counts as a step."""
        try:
            written = os.write(self._file.fileno(), data)
            if written != len(data):
                raise OSError(errno.ENOSPC, f"{written} of {len(data)} bytes were written; is the disk full?")
            os.fsync(self._file.fileno())
        except OSError as error:
            raise LedgerWriteError(
                f"ledger {unwritten(self.path, error)}. Every step that was taken is counted there; start again from "
                "the last checkpoint"
            ) from error
