"""Earlier runs of this process on the same parameters: their steps count in every later run of these parameters.

Two engines may train one model in turn, each without a ledger. The weights that are released in the end depend on the
steps of both, so an ε that counts the steps of the second alone would be too small.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from dpkernels.privacy.accounting.accountant import Mechanism

Runs = dict[str, tuple[Mechanism, int]]
"""Mechanism and number of steps of each run, by its random name."""


@dataclass(eq=False)
class SpentRuns:
    """What a run and those before it have spent. It holds no ledger, and is kept as long as the parameters exist.

    Attributes:
        unit: the protected unit.
        runs: the steps of the run and of all that its ε counts, kept up to date by its `Budget`.
    """

    unit: str
    runs: Runs


# parameter -> what the runs that train it have spent
_OF_PARAMETER: WeakIdKeyDictionary = WeakIdKeyDictionary()


def note_run(trained: Iterable[nn.Parameter], spent: SpentRuns) -> None:
    """Note that a run trains these parameters."""
    for parameter in trained:
        _OF_PARAMETER.setdefault(parameter, []).append(spent)


def earlier_runs(parameters: Iterable[nn.Parameter], unit: str) -> Runs:
    """The runs of this process that took steps on any of a model's parameters, trained or frozen now.

    Copies of parameters (`copy.deepcopy`, `load_state_dict` into another model) are not known to be copies.

    Raises:
        ValueError: such a run protected another unit.
    """
    found: Runs = {}
    for parameter in parameters:
        for spent in _OF_PARAMETER.get(parameter, ()):
            taken = {run: step for run, step in spent.runs.items() if step[1] > 0}
            if taken and spent.unit != unit:
                raise ValueError(
                    f"module was trained earlier in this process, with unit={spent.unit!r}, and this run has "
                    f"unit={unit!r}: their steps do not add up to one ε. Use the same unit; or load the weights into a "
                    "newly built model, and state the ε of both runs"
                )
            for run, step in taken.items():
                found[run] = max(found.get(run, step), step, key=lambda counted: counted[1])
    return found


def lacking(earlier: Mapping[str, tuple[Mechanism, int]], counted: Mapping[str, int]) -> int:
    """How many steps of earlier runs are not among those `counted`, steps by run."""
    return sum(max(0, steps - counted.get(run, 0)) for run, (_, steps) in earlier.items())
