"""The privacy engine: clipping, noise, Poisson sampling, accounting and the ledger."""

from dpkernels.privacy.accounting.accountant import epsilon, noise_multiplier
from dpkernels.privacy.accounting.budget import BudgetExhausted
from dpkernels.privacy.accounting.ledger import LedgerError, read_ledger
from dpkernels.privacy.engine import PrivacyEngine
from dpkernels.privacy.sampling.loader import DPDataLoader, LogicalBatch, micro_batches
from dpkernels.privacy.sampling.plan import Sampling, plan_sampling
from dpkernels.privacy.self_check.findings import SelfCheckError, SelfCheckReport
from dpkernels.privacy.step.optimizer import DPOptimizer, StepStats
from dpkernels.privacy.step.recovery import back_propagate

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
