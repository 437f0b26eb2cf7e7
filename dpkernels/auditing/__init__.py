"""Auditing: a lower bound on the ε of a run, from an attack on canaries, beside the upper bound of the accountant.

It imports `privacy`, whose engine trains with the canaries; of the packages only `asr_finetune` imports it.
"""

from dpkernels.auditing.coins import read_coins, write_coins
from dpkernels.auditing.one_run import (
    AuditError,
    Guesses,
    LowerBound,
    correct_guesses,
    default_guesses,
    largest_bound,
    lower_bound,
    p_value,
)
from dpkernels.privacy.sampling.canaries import CanaryDataset, draw_coins

__all__ = [
    "AuditError",
    "CanaryDataset",
    "Guesses",
    "LowerBound",
    "correct_guesses",
    "default_guesses",
    "draw_coins",
    "largest_bound",
    "lower_bound",
    "p_value",
    "read_coins",
    "write_coins",
]
