"""`asr-finetune verify`: ε recomputed from a run's ledger with dp-accounting alone, and held against what the run says.

An auditor's second opinion must not share faults with the first. This module therefore imports nothing of dpkernels
that reads ledgers or computes ε: it hashes the ledger's lines, counts its steps and composes them with dp-accounting
by itself, from the format that `docs/results.md` describes.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dp_accounting
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from rich.table import Table
from rich.text import Text

from asr_finetune.training.run_folder import RunFolder
from dpkernels.errors import UserError
from dpkernels.rounding import shown_epsilon

_ADD_OR_REMOVE = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
_TOLERANCE = (
    1e-6  # relative; what is claimed may be larger than what was spent by any amount, but not smaller
)
# The pages that state ε: "(1.234, 1 × 10⁻⁵)-differential privacy".
_STATED = re.compile(r"\(([\d.]+), [^()]*\)-differential privacy")
# The end of a whole line, but for some bytes: its hash, `"}`, and the newline if that became another byte.
_WHOLE = re.compile(rb'(?:"sha256": "[0-9a-f]{40}.{24}(?!",).{2,3}|[0-9a-f]{8}"\})\Z', re.DOTALL)
# How JSON fails where it was cut: in a string, in an escape, or where more is expected.
_CUT = ("Unterminated string", "Invalid \\uXXXX escape", "Expecting")
_START = "0" * 64


class VerifyError(UserError, ValueError):
    """There is nothing to verify; the message has the reason."""


@dataclass
class Chain:
    """A ledger as its lines say: whether the hashes hold, and the steps of each run.

    Attributes:
        broken: the number of the first line whose hash is wrong, and why; "" if every hash holds.
        head: hash of the last line.
        runs: run id -> [its settings, its steps].
        reported: the largest ε that an "epsilon" line reports at each (δ, accountant).
        latest: the run that the next step belongs to; "" before the first one.
        orphans: steps before any run, which the first one counts.
    """

    broken: str = ""
    head: str = _START
    runs: dict[str, list[Any]] = field(default_factory=dict)
    reported: dict[tuple[float, str], float] = field(default_factory=dict)
    latest: str = ""
    orphans: int = 0

    def count(self, entry: Mapping[str, Any]) -> None:
        """Count what one line says.

        Raises:
            ValueError, KeyError, TypeError: no line of this version says this.
        """
        kind = entry["kind"]
        if kind == "run":
            self.latest = str(entry["run"])
            self.runs.setdefault(self.latest, [entry, 0])[1] += self.orphans
            self.orphans = 0
        elif kind == "carried":
            if type(entry["steps"]) is not int or entry["steps"] < 0:
                raise ValueError(f"steps={entry['steps']!r}")
            self.runs.setdefault(str(entry["run"]), [entry, 0])[1] += entry["steps"]
        elif kind in ("step", "torn"):
            if self.latest:
                self.runs[self.latest][1] += 1
            else:
                self.orphans += 1
        elif kind == "epsilon":
            key = (entry["delta"], entry["accountant"])
            value = math.inf if entry["epsilon"] == "inf" else entry["epsilon"]
            self.reported[key] = max(value, self.reported.get(key, 0.0))

    @property
    def steps(self) -> int:
        """The steps of all runs."""
        return sum(steps for _, steps in self.runs.values())


@dataclass(frozen=True)
class Finding:
    """One line of the table: a figure, what was recomputed, what is claimed and where, and whether they agree."""

    what: str
    found: str
    claimed: str
    agrees: bool


def verify(run: Path | str) -> list[Finding]:
    """Hold a run's record, report and model card against its ledger.

    Args:
        run: the output folder of `asr-finetune train`; without run.json or stopped.json the ledger alone is checked.

    Raises:
        VerifyError: the run has no ledger, or was trained without privacy.
    """
    folder = RunFolder(Path(run))
    record = folder.record()
    if not folder.ledger.is_file():
        reason = (
            "it was trained without privacy"
            if record and not record["privacy"]["enabled"]
            else "it is missing"
        )
        raise VerifyError(f"run={str(run)!r}: no {folder.ledger.name} to verify: {reason}")
    chain = read_chain(folder.ledger.read_bytes())
    findings = [
        Finding("chain of hashes", chain.broken or f"holds, head {chain.head[:12]}…", "", not chain.broken),
        Finding("steps", f"{chain.steps:,} in {len(chain.runs)} starts", "", True),
    ]
    taken = [settings for settings, steps in chain.runs.values() if steps]
    if chain.broken or not taken:
        return findings
    if record is None:
        return [*findings, *_of_ledger(chain)]
    privacy = record["privacy"]
    spent = composed(chain, privacy["delta"], privacy["accountant"])
    findings += list(_facts(chain, taken, privacy))
    findings += list(_epsilons(chain, privacy, spent))
    for path in (
        folder.path / "report.html",
        *(folder.path / kind / "README.md" for kind in ("adapter", "model")),
    ):
        if path.is_file() and (path.suffix == ".html" or "asr-finetune" in path.read_text(encoding="utf-8")):
            findings += list(_page(path, folder, chain, spent))
    return findings


def table(findings: list[Finding]) -> Table:
    """The findings for the screen."""
    differ = sum(not finding.agrees for finding in findings)
    title = f"{differ} of {len(findings)} checks FAILED" if differ else f"all {len(findings)} checks agree"
    shown = Table("", "recomputed from the ledger", "claimed", "", title=title, title_justify="left")
    for finding in findings:
        verdict = Text("ok", "green") if finding.agrees else Text("DIFFERS", "bold red")
        shown.add_row(finding.what, Text(finding.found), Text(finding.claimed), verdict)
    return shown


def read_chain(data: bytes) -> Chain:
    """Hash a ledger's lines, one after the other, and count its steps.

    A line's hash is SHA-256 of the previous line's hash, a line feed, and the line's entry as JSON with sorted keys. A
    line that a crash cut short counts as one step; the next line seals it with the SHA-256 of its bytes.
    """
    chain = Chain()
    *lines, last = data.split(b"\n")
    torn, number = b"", 0
    for number, line in enumerate([*lines, last] if last else lines, start=1):
        # A crash can leave zeros behind the last line.
        entry, digest = _entry(line.rstrip(b"\0") if line is last else line, chain.head)
        if entry is None:
            if torn and line is last and _seal(torn, chain.head).startswith(line.rstrip(b"\0")):
                break  # a crash cut the seal, too
            if torn or digest is not None:
                chain.broken = f"line {number} is not the one that was written"
                return chain
            torn = line
            continue
        chain.head = str(digest)
        if bool(torn) != (entry.get("kind") == "torn" and entry == _seal_of(torn)):
            chain.broken = f"line {number - 1} cannot be read, and the next one does not seal it"
            return chain
        torn = b""
        try:
            chain.count(entry)
        except (ValueError, KeyError, TypeError) as error:
            chain.broken = f"line {number} is none that this version writes ({error})"
            return chain
    if torn:  # a crash cut the last line, and no run has continued since
        if chain.latest:
            chain.runs[chain.latest][1] += 1
        if not last or not _is_beginning(torn):
            chain.broken = f"line {number} cannot be read, but was written to its end"
    return chain


def _seal_of(torn: bytes) -> dict[str, str]:
    return {"kind": "torn", "bytes_sha256": hashlib.sha256(torn).hexdigest()}


def _seal(torn: bytes, head: str) -> bytes:
    """The line that seals a torn line."""
    entry = _seal_of(torn)
    digest = hashlib.sha256(f"{head}\n{json.dumps(entry, sort_keys=True)}".encode()).hexdigest()
    return json.dumps({"entry": entry, "sha256": digest}, sort_keys=True).encode()


def _entry(line: bytes, head: str) -> tuple[dict[str, Any] | None, str | None]:
    """(entry, hash) of a line: no entry if the hash is wrong, and neither if it is no complete line of a ledger."""
    try:
        values = json.loads(line.decode())
        entry, digest = values["entry"], str(values["sha256"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None, None
    try:
        body = json.dumps(entry, ensure_ascii=False, sort_keys=True, allow_nan=False)
        right = hashlib.sha256(f"{head}\n{body}".encode()).hexdigest()
    except ValueError:  # NaN, or half of a surrogate pair: nothing that was written
        return None, digest
    return (entry if isinstance(entry, dict) and digest == right else None), digest


def _is_beginning(line: bytes) -> bool:
    """Whether a crash cut this line: else bytes of a whole one changed, and it may have counted any number of steps."""
    written = line.strip(b"\0")
    if _WHOLE.search(written):
        return False
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(written)  # its last character may be cut, too
        json.loads(text)
    except json.JSONDecodeError as error:
        # At its end, up to a cut literal or escape; or at the begin of the string that has no end.
        at_end = error.msg.startswith(_CUT[0]) or error.pos >= len(text) - len("\\u1234")
        return at_end and error.msg.startswith(_CUT)
    except (ValueError, RecursionError):
        return False
    return False


def composed(chain: Chain, delta: float, accountant: str) -> float:
    """ε of a ledger's steps at δ by dp-accounting; ∞ if any of them had no noise."""
    total = (
        PLDAccountant(_ADD_OR_REMOVE)
        if accountant == "pld"
        else RdpAccountant(neighboring_relation=_ADD_OR_REMOVE)
    )
    with _without_notes():
        for settings, steps in chain.runs.values():
            mechanism = settings["mechanism"]
            if not steps:
                continue
            sigma = _sigma(settings) if mechanism["noise_multiplier"] else 0.0
            if sigma == 0:
                return math.inf
            total.compose(_event(mechanism, sigma), steps)
        return float(total.get_epsilon(delta))


def _sigma(settings: Mapping[str, Any]) -> float:
    """The noise multiplier of a whole step. Where C adapts, a step releases the sums and a count: one vector, whose
    sensitivity in units of the noise is the root of the sum of both squares. That of the counts is computed here: a
    vote lies between −γ and 1 − γ, and a unit has one for each norm, and for each of its gradients."""
    count = settings.get("noisy_count")
    if count is None:
        return (
            0.0
            if settings.get("clipping") == "adaptive"
            else float(settings["mechanism"]["noise_multiplier"])
        )
    votes = 1 if settings["clipping_unit"] == "speaker" else settings["max_examples_per_unit"]
    most = max(count["quantile"], 1 - count["quantile"]) * math.sqrt(count["counts"]) * votes
    return 1 / math.hypot(1 / count["sums_noise_multiplier"], most / count["noise"])


def _event(mechanism: Mapping[str, Any], sigma: float) -> dp_accounting.DpEvent:
    rate, capacity = mechanism["sample_rate"], mechanism["max_batch_size"]
    if capacity is None:
        return dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
    # dp-accounting counts the unit that is added or removed: N + 1 covers adding one, and removing one.
    return dp_accounting.TruncatedSubsampledGaussianDpEvent(
        dataset_size=mechanism["dataset_size"] + 1,
        sampling_probability=rate,
        truncated_batch_size=capacity,
        noise_multiplier=sigma,
    )


@contextmanager
def _without_notes() -> Iterator[None]:
    """Within it, dp-accounting does not log the Rényi orders that it leaves out: fewer orders only make ε larger."""

    def keep(record: logging.LogRecord) -> bool:
        return "Excluding this order" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _of_ledger(chain: Chain) -> Iterator[Finding]:
    """An unfinished run: the ledger's own ε lines are all that is claimed."""
    settings = [settings for settings, _ in chain.runs.values() if settings["kind"] == "run"][-1]
    delta, accountant = settings["target_delta"], settings["accountant"]
    spent = composed(chain, delta, accountant)
    reported = chain.reported.get((delta, accountant))
    claimed = (
        "nothing yet: the run is not finished" if reported is None else f"{shown_epsilon(reported)} (ledger)"
    )
    agrees = reported is None or reported <= spent * (1 + _TOLERANCE)
    yield Finding(f"ε at δ = {delta:g} ({accountant.upper()})", shown_epsilon(spent), claimed, agrees)


def _facts(chain: Chain, taken: list[Mapping[str, Any]], privacy: Mapping[str, Any]) -> Iterator[Finding]:
    """What ε is computed from: every run of the ledger must say what the record says."""
    yield Finding(
        "steps in the record", f"{chain.steps:,}", f"{privacy['steps']:,}", chain.steps == privacy["steps"]
    )
    for what, key in (
        ("noise multiplier σ", "noise_multiplier"),
        ("sampling rate", "sample_rate"),
        ("most units in a step", "max_batch_size"),
    ):
        yield _same(what, [settings["mechanism"][key] for settings in taken], privacy[key])
    adaptive = [
        settings for settings in taken if "noisy_count" in settings or settings.get("clipping") == "adaptive"
    ]
    counted = adaptive if privacy["noise_multiplier"] else []
    if counted:
        together, claimed = min(map(_sigma, counted)), privacy["noise_multiplier"]
        agrees = math.isclose(together, claimed, rel_tol=_TOLERANCE)
        yield Finding("σ of the sums and of the count that moves C", f"{together:.9g}", f"{claimed}", agrees)
    for what, key in (("units, N", "dataset_size"), ("unit", "unit"), ("neighbours", "adjacency")):
        yield _same(what, [settings[key] for settings in taken], privacy[key])


def _same(what: str, found: list[Any], claimed: Any) -> Finding:
    shown = ", ".join(dict.fromkeys(map(str, found)))
    return Finding(what, shown, str(claimed), all(value == claimed for value in found))


def _epsilons(chain: Chain, privacy: Mapping[str, Any], spent: float) -> Iterator[Finding]:
    """ε of the record, by both accountants, and the target."""
    delta, accountant = privacy["delta"], privacy["accountant"]
    for name in dict.fromkeys((accountant, "pld", "rdp")):
        claimed = privacy["epsilon"] if name == accountant else privacy.get(f"epsilon_{name}")
        if claimed is None and name != accountant:
            continue
        found = spent if name == accountant else composed(chain, delta, name)
        yield _covers(f"ε at δ = {delta:g} ({name.upper()})", found, math.inf if claimed is None else claimed)
    target = privacy["target_epsilon"]
    if target is not None:
        yield Finding(
            "within the target ε", shown_epsilon(spent), f"{target:g}", spent <= target * (1 + _TOLERANCE)
        )


def _covers(what: str, found: float, claimed: float) -> Finding:
    """A claimed ε must not be below the one that was spent, nor far above it."""
    close = found == claimed or math.isclose(found, claimed, rel_tol=_TOLERANCE)
    return Finding(what, shown_epsilon(found, 6), shown_epsilon(claimed, 6), close)


def _page(path: Path, folder: RunFolder, chain: Chain, spent: float) -> Iterator[Finding]:
    """What a page for readers states: ε, rounded up, and the ledger's last hash if it shows one."""
    text, name = path.read_text(encoding="utf-8"), path.relative_to(folder.path).as_posix()
    stated = _STATED.findall(text)
    found = shown_epsilon(spent)
    yield Finding(f"ε in {name}", found, ", ".join(stated) or "none", bool(stated) and set(stated) == {found})
    if path.suffix == ".html":
        yield Finding(
            f"head in {name}",
            f"{chain.head[:12]}…",
            "the same" if chain.head in text else "another",
            chain.head in text,
        )
