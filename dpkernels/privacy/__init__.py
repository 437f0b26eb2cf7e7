"""The privacy engine: clipping, noise, Poisson sampling, accounting and the ledger."""

from dpkernels.privacy.accounting import epsilon, noise_multiplier
from dpkernels.privacy.budget import BudgetExhausted
from dpkernels.privacy.engine import PrivacyEngine
from dpkernels.privacy.findings import SelfCheckError, SelfCheckReport
from dpkernels.privacy.ledger import LedgerError, read_ledger
from dpkernels.privacy.loader import DPDataLoader, LogicalBatch, micro_batches
from dpkernels.privacy.optimizer import DPOptimizer, StepStats
from dpkernels.privacy.plan import Sampling, plan_sampling
from dpkernels.privacy.recovery import back_propagate

__all__ = [
    "BudgetExhausted",
    "DPDataLoader",
    "DPOptimizer",
    "LedgerError",
    "LogicalBatch",
    "PrivacyEngine",
    "Sampling",
    "SelfCheckError",
    "SelfCheckReport",
    "StepStats",
    "back_propagate",
    "epsilon",
    "micro_batches",
    "noise_multiplier",
    "plan_sampling",
    "read_ledger",
]
