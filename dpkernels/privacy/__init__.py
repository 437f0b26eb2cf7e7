"""The privacy engine: clipping, noise, Poisson sampling, accounting and the ledger."""

from dpkernels.privacy.accounting.accountant import SAFE_DELTA_TIMES_N, epsilon, noise_multiplier
from dpkernels.privacy.accounting.audit import AuditedLedger, ClaimError, audit_ledger, claimed_epsilon
from dpkernels.privacy.accounting.budget import BudgetExhausted
from dpkernels.privacy.accounting.ledger import LedgerError, read_ledger
from dpkernels.privacy.accounting.plan import DELTAS, NoisePlan, detection_bounds, plan_noise
from dpkernels.privacy.engine import PrivacyEngine
from dpkernels.privacy.ranks.group import Ranks, RanksError, ranks_of
from dpkernels.privacy.ranks.joining import join_processes
from dpkernels.privacy.ranks.sharded import gathered_root, shard_frozen
from dpkernels.privacy.sampling.loader import DPDataLoader
from dpkernels.privacy.sampling.logical_batch import LogicalBatch, micro_batches
from dpkernels.privacy.sampling.plan import Sampling, plan_sampling
from dpkernels.privacy.self_check.findings import SelfCheckError, SelfCheckReport
from dpkernels.privacy.step.adaptive import AdaptiveClipping, NoisyCount, noisy_count
from dpkernels.privacy.step.optimizer import DPOptimizer
from dpkernels.privacy.step.recovery import back_propagate
from dpkernels.privacy.step.statistics import StepStats

__all__ = [
    "DELTAS",
    "SAFE_DELTA_TIMES_N",
    "AdaptiveClipping",
    "AuditedLedger",
    "BudgetExhausted",
    "ClaimError",
    "DPDataLoader",
    "DPOptimizer",
    "LedgerError",
    "LogicalBatch",
    "NoisePlan",
    "NoisyCount",
    "PrivacyEngine",
    "Ranks",
    "RanksError",
    "Sampling",
    "SelfCheckError",
    "SelfCheckReport",
    "StepStats",
    "audit_ledger",
    "back_propagate",
    "claimed_epsilon",
    "detection_bounds",
    "epsilon",
    "gathered_root",
    "join_processes",
    "micro_batches",
    "noise_multiplier",
    "noisy_count",
    "plan_noise",
    "plan_sampling",
    "ranks_of",
    "read_ledger",
    "shard_frozen",
]
