"""An auditor's own computation agrees with an honest run, and with no other."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from asr_finetune import cli
from asr_finetune.report import verify as verify_module
from asr_finetune.report.report import write_report
from asr_finetune.report.verify import Chain, Finding, VerifyError, composed, read_chain, verify
from dpkernels.privacy import LedgerError, epsilon, read_ledger
from dpkernels.privacy.accounting.ledger import Ledger
from tests.asr_finetune.report.report_run import (
    DELTA,
    RATE,
    SIGMA,
    SIZE,
    STEPS,
    record,
    write_ledger,
    write_run,
)
from tests.asr_finetune.report.test_report import visible


def differing(findings: list[Finding]) -> list[str]:
    return [finding.what for finding in findings if not finding.agrees]


def exit_code(run: Path) -> int:
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["verify", str(run)]).exit_code


@pytest.fixture(autouse=True)
def _composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One composition for every ledger of the same steps: it takes the most of the time."""

    def cached(chain: Chain, delta: float, accountant: str) -> float:
        steps = tuple((json.dumps(settings["mechanism"]), steps) for settings, steps in chain.runs.values())
        if (key := (steps, delta, accountant)) not in KNOWN:
            KNOWN[key] = composed(chain, delta, accountant)
        return KNOWN[key]

    monkeypatch.setattr(verify_module, "composed", cached)


KNOWN: dict[Any, float] = {}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = write_run(tmp_path / "run")
    write_report(run, run / "report.html")
    return run


def test_an_honest_run_agrees(run: Path) -> None:
    findings = verify(run)
    assert differing(findings) == []
    recomputed = next(finding for finding in findings if finding.what.endswith("(PLD)"))
    assert float(recomputed.found) == pytest.approx(epsilon(SIGMA, RATE, STEPS, DELTA), abs=1e-5)
    assert {"ε in report.html", "head in report.html", "steps in the record"} <= {
        each.what for each in findings
    }
    assert exit_code(run) == 0


@pytest.mark.slow
def test_a_finished_and_a_stopped_run_agree(runs: Path) -> None:
    write_report(runs / "finished", runs / "finished" / "report.html")
    for name in ("finished", "stopped"):
        findings = verify(runs / name)
        assert differing(findings) == [], name
        assert any(finding.what.startswith("ε at δ = 0.001") for finding in findings)


@pytest.mark.parametrize(
    ("claim", "found"),
    [
        ({"steps": STEPS - 1}, "steps in the record"),
        ({"noise_multiplier": 2.0}, "noise multiplier σ"),
        ({"sample_rate": 0.04}, "sampling rate"),
        ({"dataset_size": 2 * SIZE}, "units, N"),
        ({"unit": "speaker"}, "unit"),
        ({"adjacency": "replace one example"}, "neighbours"),
        ({"max_batch_size": 200}, "most units in a step"),
        ({"epsilon": 0.5}, "ε at δ = 1e-05 (PLD)"),
        ({"epsilon": None}, "ε at δ = 1e-05 (PLD)"),
        ({"epsilon_rdp": 0.5}, "ε at δ = 1e-05 (RDP)"),
        ({"target_epsilon": 1.0}, "within the target ε"),
    ],
)
def test_a_record_that_says_otherwise_differs(tmp_path: Path, claim: dict[str, Any], found: str) -> None:
    run = write_run(tmp_path / "run", record(**claim))
    assert found in differing(verify(run))


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        (r"\([\d.]+, ", "(0.100, ", "ε in report.html"),
        (r"<td>\([\d.]+, .*?-differential", "<td>differential", "ε in report.html"),
        (r"[0-9a-f]{64}", "0" * 64, "head in report.html"),
    ],
)
def test_a_report_that_says_otherwise_differs(run: Path, old: str, new: str, found: str) -> None:
    page = run / "report.html"
    text = page.read_text()
    page.write_text(re.sub(old, new, text))
    assert page.read_text() != text
    assert differing(verify(run)) == [found]
    assert exit_code(run) == 1


def test_it_does_not_rest_on_our_accountant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault planted: an accountant that halves ε fools the report, and not the auditor."""
    from dpkernels.privacy.accounting import accountant

    original = accountant._composed_epsilon
    monkeypatch.setattr(accountant, "_composed_epsilon", lambda *arguments: original(*arguments) / 2)
    halved = epsilon(SIGMA, RATE, STEPS, DELTA)
    run = write_run(tmp_path / "run", record(epsilon=halved, epsilon_pld=halved))
    write_report(run, run / "report.html")
    assert differing(verify(run)) == ["ε at δ = 1e-05 (PLD)", "ε at δ = 1e-05 (RDP)", "ε in report.html"]
    source = Path(verify_module.__file__).read_text()
    assert "dpkernels.privacy" not in source.replace("`", "").partition('"""')[2].partition('"""')[2]


def edit(number: int, change: Callable[[dict[str, Any]], None]) -> Callable[[list[bytes]], list[bytes]]:
    def edited(lines: list[bytes]) -> list[bytes]:
        values = json.loads(lines[number])
        change(values["entry"])
        return [*lines[:number], json.dumps(values, sort_keys=True).encode() + b"\n", *lines[number + 1 :]]

    return edited


TAMPERED: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "a line removed": lambda lines: lines[:3] + lines[4:],
    "a line repeated": lambda lines: lines[:3] + lines[2:],
    "lines exchanged": lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]],
    "the mechanism edited": edit(0, lambda entry: entry["mechanism"].update(noise_multiplier=3.0)),
    "a step edited": edit(2, lambda entry: entry.update(step=9)),
    "a line in the middle cut": lambda lines: [*lines[:2], lines[2][:20] + b"\n", *lines[3:]],
    "the last line damaged": lambda lines: [*lines[:-1], b"x" + lines[-1][1:]],
}


@pytest.mark.thinned(4)
@pytest.mark.parametrize("tampered", TAMPERED)
def test_a_tampered_ledger_differs(run: Path, tampered: str) -> None:
    ledger = run / "ledger.jsonl"
    ledger.write_bytes(b"".join(TAMPERED[tampered](ledger.read_bytes().splitlines(keepends=True))))
    assert differing(verify(run)) == ["chain of hashes"]
    assert exit_code(run) == 1
    with pytest.raises(LedgerError):
        read_ledger(ledger)


def test_steps_cut_from_the_end_differ(run: Path) -> None:
    """The chain holds without its last lines: the record and the report remember them."""
    ledger = run / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-2]))
    assert {"steps in the record", "head in report.html"} <= set(differing(verify(run)))


@pytest.mark.parametrize("start", [0, 2])
def test_a_ledger_cut_anywhere_counts_the_same_steps_as_ours(tmp_path: Path, start: int) -> None:
    """Two readers of one format: a crash at any byte, then the seal of the next run, torn or not."""
    path = tmp_path / "ledger.jsonl"
    write_ledger(path, 3, SIGMA)
    whole = path.read_bytes()
    first = len(b"".join(whole.splitlines(keepends=True)[:start])) + 1
    for keep in range(first, len(whole), 7):
        path.write_bytes(whole[:keep])
        chain, ours = read_chain(path.read_bytes()), read_ledger(path)
        assert not chain.broken
        assert chain.steps == (ours.steps if ours.runs else 0), (
            keep
        )  # steps without a mechanism wait for the next run
        settings = {**json.loads(whole.splitlines()[0])["entry"], "run": "next"}
        Ledger(
            path, {key: settings[key] for key in settings if key not in ("kind", "format", "torn_before")}
        ).close()
        sealed = path.read_bytes()
        chain, ours = read_chain(sealed), read_ledger(path)
        assert (chain.broken, chain.steps, chain.head) == ("", ours.steps, ours.last_hash), keep
        if b'"torn"' in sealed:
            path.write_bytes(sealed[: sealed.index(b'"torn"') + 3])
            chain, ours = read_chain(path.read_bytes()), read_ledger(path)
            assert (chain.broken, chain.steps) == ("", ours.steps if ours.runs else 0), keep


def test_carried_steps_count(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    write_ledger(path, 3, SIGMA)
    from dpkernels.privacy.accounting.accountant import Mechanism

    settings = json.loads(path.read_text().splitlines()[0])["entry"]
    ledger = Ledger(path, {**{key: settings[key] for key in settings if key != "kind"}, "run": "b"})
    ledger.carry("lost", Mechanism(RATE, 2.0, SIZE), 5)
    ledger.close()
    chain = read_chain(path.read_bytes())
    assert chain.steps == read_ledger(path).steps == 8
    assert composed(chain, DELTA, "pld") > composed(read_chain(path.read_bytes()), 10 * DELTA, "pld")


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_epsilon_is_that_of_dp_accounting(tmp_path: Path, accountant: str) -> None:
    path = tmp_path / "ledger.jsonl"
    write_ledger(path, 3, SIGMA)
    chain = read_chain(path.read_bytes())
    expected = epsilon(SIGMA, RATE, 3, DELTA, accountant=accountant)
    assert composed(chain, DELTA, accountant) == pytest.approx(expected, rel=1e-9)
    settings, steps = next(iter(chain.runs.values()))
    settings["mechanism"]["noise_multiplier"] = 0
    assert composed(chain, DELTA, accountant) == math.inf
    if accountant == "pld":
        settings["mechanism"] |= {"noise_multiplier": SIGMA, "max_batch_size": 110}
        expected = epsilon(SIGMA, RATE, steps, DELTA, max_batch_size=110, dataset_size=SIZE)
        assert composed(chain, DELTA, "pld") == pytest.approx(expected, rel=1e-9)


def test_sums_and_counts_of_adaptive_clipping_are_added_up(tmp_path: Path) -> None:
    """From the ledger's two noises, not from the σ that it states."""
    count = {"quantile": 0.5, "learning_rate": 0.2, "expected": 100.0, "noise": 2.0, "sensitivity": 0.5}
    run = write_run(tmp_path / "run", record(clipping="adaptive", clip_norm=0.25))
    for sums, agrees in ((1 / math.sqrt(1 / SIGMA**2 - 1 / 16), True), (SIGMA, False)):
        (run / "ledger.jsonl").unlink()
        write_ledger(run / "ledger.jsonl", STEPS, SIGMA, noisy_count={**count, "sums_noise_multiplier": sums})
        found = differing(verify(run))
        assert ("σ of the sums and of the count that moves C" not in found) == agrees
        if agrees:
            text = visible(write_report(run, tmp_path / "report.html").read_text())
            assert "1 in the first step, 0.25 after the last" in text
            assert (
                "and a standard deviation of 2 on the count, to which one recording adds at most 0.5" in text
            )
    chain = read_chain((run / "ledger.jsonl").read_bytes())
    together = 1 / math.sqrt(1 / SIGMA**2 + 1 / 16)
    assert composed(chain, DELTA, "rdp") == pytest.approx(
        epsilon(together, RATE, STEPS, DELTA, accountant="rdp")
    )
    (settings, _), *_ = chain.runs.values()
    for changes in ({"quantile": 0.95}, {"counts": 4}):  # the sensitivity is not what the ledger says it is
        settings["noisy_count"] = {**count, "counts": 1, "sums_noise_multiplier": SIGMA, **changes}
        most = 0.95 if "quantile" in changes else 1.0
        together = 1 / math.hypot(1 / SIGMA, most / 2.0)
        expected = epsilon(together, RATE, STEPS, DELTA, accountant="rdp")
        assert composed(chain, DELTA, "rdp") == pytest.approx(expected)
    del settings["noisy_count"]
    assert composed(chain, DELTA, "rdp") == math.inf


def test_without_a_ledger_there_is_nothing_to_verify(tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match="it is missing"):
        verify(tmp_path)
    run = write_run(tmp_path / "plain", record(enabled=False))
    with pytest.raises(VerifyError, match="without privacy"):
        verify(run)
