"""`python -m tests.auditing.faults`: plant faults in the engine and audit the runs, as an auditor from outside would.

Each example has a direction of its own in a linear model, and a gradient far above the clipping norm: these are the
strongest canaries. The score is the loss under the starting model minus that under the final one. A fault is exposed
where the lower bound exceeds the ε that the ledger states; an honest run must not be. The command's exit code is 1 if
an honest run is exposed, or if no run with a fault is at the largest number of canaries (those of UNSEEN need not be).
`--write` keeps every run's bound in faults.json, and makes the table of docs/audit.md from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpkernels.auditing import CanaryDataset, LowerBound, draw_coins, lower_bound
from dpkernels.privacy import DPOptimizer, PrivacyEngine, noise_multiplier
from dpkernels.rounding import shown_lower_bound

RECORD = Path(__file__).with_name("faults.json")
PAGE = Path(__file__).parents[2] / "docs" / "audit.md"
_BEGIN, _END = "<!-- faults: made by python -m tests.auditing.faults --write -->", "<!-- /faults -->"
DELTA = 1e-5
ORDINARY = 100
STEPS = 20
CLIP = 1.0
SIZE = 200.0  # norm of every example's gradient, in units of C


def _noise(share: float) -> Callable[[DPOptimizer], None]:
    def plant(optimizer: DPOptimizer) -> None:
        scale = share * optimizer._release.noise_scale
        optimizer._release = dataclasses.replace(optimizer._release, noise_scale=scale)

    return plant


def _factors(change: Callable[[Tensor], Tensor]) -> Callable[[DPOptimizer], None]:
    class Faulty:
        def __init__(self, rule: Any) -> None:
            self._rule = rule

        def factors(self, norm_sq: Tensor) -> Tensor:
            return change(self._rule.factors(norm_sq))

        def votes(self, norm_sq: Tensor) -> None:
            """C is constant: no count moves it."""

    def plant(optimizer: DPOptimizer) -> None:
        strategy: Any = optimizer._strategy
        strategy._rule = Faulty(strategy._rule)

    return plant


def _first_unclipped(factors: Tensor) -> Tensor:
    factors = factors.clone()
    factors[:1] = 1.0
    return factors


FAULTS: dict[str, Callable[[DPOptimizer], None]] = {
    "none": lambda optimizer: None,
    "no noise": _noise(0.0),
    "half of the noise": _noise(0.5),
    "a quarter of the noise": _noise(0.25),
    "no clipping": _factors(torch.ones_like),
    "one example of each micro-batch unclipped": _factors(_first_unclipped),
}
UNSEEN = ("half of the noise",)
"""Faults that are too small for this attack with 1,000 canaries."""


def audited(
    fault: str,
    canaries: int,
    *,
    epsilon: float = 2.0,
    key: bytes | None = None,
    coins: np.ndarray | None = None,
    physical_batch_size: int = 64,
) -> tuple[LowerBound, float]:
    """Train with a fault planted, and audit.

    Args:
        fault: a key of FAULTS.
        canaries: m.
        epsilon: the target that the noise is calibrated to.
        key, coins: for a test that must have the same result each time.
        physical_batch_size: of a micro-batch.

    Returns:
        The lower bound, and the ε that the engine states.
    """
    coins = draw_coins(canaries) if coins is None else coins
    data = TensorDataset(SIZE * torch.eye(ORDINARY + canaries))
    directions = data.tensors[0][ORDINARY:]
    model = nn.Linear(ORDINARY + canaries, 1, bias=False)
    nn.init.zeros_(model.weight)
    batch_size = len(data) // 2
    sigma = noise_multiplier(epsilon, DELTA, batch_size / len(data), STEPS)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="noise_key|no self_check|delta=")
        engine = PrivacyEngine(noise_key=key)
        _, optimizer, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            data_loader=DataLoader(CanaryDataset(data, coins), batch_size=batch_size),
            noise_multiplier=sigma,
            max_grad_norm=CLIP,
            steps=STEPS,
            physical_batch_size=physical_batch_size,
        )
        FAULTS[fault](optimizer)
        start = _losses(model, directions)
        for logical_batch in loader:
            for (batch,) in logical_batch:
                optimizer.backward(_losses(model, batch))
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            scores = (start - _losses(model, directions)).detach().double()
        return lower_bound(scores, coins, delta=DELTA), engine.get_epsilon(DELTA)


def _losses(model: nn.Module, batch: Tensor) -> Tensor:
    losses: Tensor = -model(batch).squeeze(1)
    return losses


def measured(canaries: Sequence[int], epsilon: float, runs: int) -> dict[str, Any]:
    """The record of an audit of each fault with each number of canaries; progress goes to stderr.

    Returns:
        The claim and, under "audits", each fault and number of canaries with every run's lower bound, the largest one
        that so many canaries can show, and the ε that the engine states.
    """
    audits = []
    for fault in FAULTS:
        for count in canaries:
            results = [audited(fault, count, epsilon=epsilon) for _ in range(runs)]
            (bound, stated) = results[0]
            values = {"fault": fault, "canaries": count, "stated": stated, "largest": bound.largest}
            audits.append(values | {"bounds": [one.epsilon for one, _ in results]})
            print(
                f"{fault}, {count:,} canaries: {_exposed(audits[-1])} of {runs}", file=sys.stderr, flush=True
            )
    return {"epsilon": epsilon, "delta": DELTA, "confidence": bound.confidence, "audits": audits}


def table(record: Mapping[str, Any]) -> str:
    """A row a fault and number of canaries, in Markdown."""
    rows = ["| fault | canaries | lower bound, median | at most | exposed |", "|---|--:|--:|--:|--:|"]
    named = ""
    for audit in record["audits"]:
        fault = "" if audit["fault"] == named else audit["fault"]
        named = audit["fault"]
        rows.append(
            f"| {fault} | {audit['canaries']:,} | {shown_lower_bound(statistics.median(audit['bounds']))} | "
            f"{shown_lower_bound(audit['largest'])} | {_exposed(audit)} of {len(audit['bounds'])} |"
        )
    return "\n".join(rows)


def page(text: str, record: Mapping[str, Any]) -> str:
    """The text of docs/audit.md with the record's table."""
    before, _, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    assert end, f"no {_BEGIN} ... {_END} in {PAGE.name}"
    return f"{before}{_BEGIN}\n{table(record)}\n{end}{after}"


def _exposed(audit: Mapping[str, Any]) -> int:
    return sum(bound > audit["stated"] for bound in audit["bounds"])


def wrong(record: Mapping[str, Any]) -> list[str]:
    """What is not as it must be: an honest run that is exposed, or a fault that the most canaries never expose."""
    most = max(audit["canaries"] for audit in record["audits"])
    return [
        f"{audit['fault']}, {audit['canaries']:,} canaries: {_exposed(audit)} of {len(audit['bounds'])} exposed"
        for audit in record["audits"]
        if (
            _exposed(audit)
            if audit["fault"] == "none"
            else audit["canaries"] == most and audit["fault"] not in UNSEEN and not _exposed(audit)
        )
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: one row a fault and number of canaries, as a table of Markdown."""
    parser = argparse.ArgumentParser(prog="python -m tests.auditing.faults", description=__doc__)
    parser.add_argument("--canaries", type=int, nargs="+", default=[100, 300, 1000], metavar="M")
    parser.add_argument("--epsilon", type=float, default=2.0, metavar="E", help="claim; default %(default)s")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="of each; default %(default)s")
    parser.add_argument("--write", action="store_true", help="keep the result, and write the page's table")
    options = parser.parse_args(arguments)
    record = measured(options.canaries, options.epsilon, options.runs)
    print(table(record))
    if options.write:
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), record), encoding="utf-8")
    for line in wrong(record):
        print(f"not as it must be: {line}", file=sys.stderr)
    return 1 if wrong(record) else 0


if __name__ == "__main__":
    sys.exit(main())
