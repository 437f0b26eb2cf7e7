"""transformers' Trainer, made private: `PrivateTrainer`, `PrivateSeq2SeqTrainer`, and their `PrivacyArguments`.

It needs transformers and accelerate. docs/trainer.md explains it.
"""

from dpkernels.interop.trainer.arguments import PrivacyArguments
from dpkernels.interop.trainer.losses import TrainerError, losses_per_example
from dpkernels.interop.trainer.trainers import PrivateSeq2SeqTrainer, PrivateTrainer, PrivateTrainerMixin

__all__ = [
    "PrivacyArguments",
    "PrivateSeq2SeqTrainer",
    "PrivateTrainer",
    "PrivateTrainerMixin",
    "TrainerError",
    "losses_per_example",
]
