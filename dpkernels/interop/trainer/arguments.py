"""The arguments of a private Trainer, and those of transformers that cannot be private, each with the reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import Trainer, TrainingArguments

from dpkernels.interop.trainer.losses import TrainerError
from dpkernels.privacy import AdaptiveClipping
from dpkernels.privacy.keywords import check_clipping, clips_speakers


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivacyArguments:
    """The privacy of a run, beside `TrainingArguments`: plain values, which transformers' HfArgumentParser reads.

    Args:
        target_delta: δ in (0, 1), well below 1/N.
        max_grad_norm: C, the clipping norm of an example's whole gradient.
        target_epsilon: ε of the whole run; σ is the smallest that keeps it.
        noise_multiplier: σ, in place of the one that follows from target_epsilon. With both, target_epsilon is a limit
            that no step exceeds.
        strategy, memory_share, unit, max_examples_per_speaker, max_batch_size, max_padded_frames, clipping_unit: as in
            `PrivacyEngine.make_private`. clipping_unit="speaker" needs the self-check.
        clipping: "flat", "automatic" or "adaptive", as there. Adaptive clipping starts from max_grad_norm, and the log
            has its norm C, which ε covers, as `clip_norm`.
        target_unclipped_quantile, clipbound_learning_rate, unclipped_num_std: of adaptive clipping, as in
            `dpkernels.privacy.AdaptiveClipping`; None: its defaults.
        accountant, ledger: as in `PrivacyEngine`. Give a ledger to any run whose result is released: a checkpoint
            does not count the steps after it.
        noise_key: 64 hexadecimal digits that fix noise and sampling. For tests only; warns.
        self_check: check before the first step that every example's gradient is independent of its batch.
        log_training_loss: log the loss of the training batches, which is NOT PRIVATE, under names that say so.

    Raises:
        TrainerError: neither target_epsilon nor noise_multiplier, or a clipping that make_private refuses.
    """

    target_delta: float
    max_grad_norm: float
    target_epsilon: float | None = None
    noise_multiplier: float | None = None
    strategy: str = "bookkeeping"
    memory_share: float | None = None
    unit: str = "example"
    max_examples_per_speaker: int | None = None
    max_batch_size: int | None = None
    max_padded_frames: int | None = None
    clipping: str = "flat"
    clipping_unit: str | None = None
    target_unclipped_quantile: float | None = None
    clipbound_learning_rate: float | None = None
    unclipped_num_std: float | None = None
    accountant: str = "pld"
    ledger: str | None = None
    noise_key: str | None = None
    self_check: bool = True
    log_training_loss: bool = True

    def __post_init__(self) -> None:
        if self.target_epsilon is None and self.noise_multiplier is None:
            raise TrainerError(
                "PrivacyArguments: target_epsilon and noise_multiplier are both missing: give target_epsilon (σ "
                "follows from it), or noise_multiplier"
            )
        given = [f"{name}={value}" for name, value in self._adaptive_options().items()]
        if given and self.clipping != "adaptive":
            raise TrainerError(
                f"PrivacyArguments: {', '.join(given)} with clipping={self.clipping!r}: an option of adaptive clipping "
                "only. Give clipping='adaptive', or leave it out"
            )
        try:
            check_clipping(self._clipping(), self.max_grad_norm, self.strategy)
            whole_speakers = clips_speakers(self.clipping_unit, self.unit)
        except (ValueError, TypeError) as error:
            raise TrainerError(f"PrivacyArguments: {error}") from error
        if whole_speakers and not self.self_check:
            raise TrainerError(
                "PrivacyArguments: clipping_unit='speaker' with self_check=False: ε then rests on the order of the "
                "losses, which the self-check looks at. Leave self_check out, or clipping_unit"
            )

    def _adaptive_options(self) -> dict[str, float]:
        names = [field.name for field in dataclasses.fields(AdaptiveClipping)]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _clipping(self) -> str | AdaptiveClipping:
        options = self._adaptive_options()
        return AdaptiveClipping(**options) if options else self.clipping

    def of_engine(self) -> dict[str, Any]:
        """The arguments of `PrivacyEngine`."""
        key = None if self.noise_key is None else bytes.fromhex(self.noise_key)
        return {"accountant": self.accountant, "ledger": self.ledger, "noise_key": key}

    def of_run(self) -> dict[str, Any]:
        """Those arguments of `PrivacyEngine.make_private` that have the same names here."""
        names = ("target_epsilon", "target_delta", "max_grad_norm", "noise_multiplier", "strategy")
        more = ("memory_share", "max_padded_frames", "clipping_unit")
        values = {name: getattr(self, name) for name in (*names, *more)}
        return values | {"clipping": self._clipping()} | self.of_sampling()

    def of_sampling(self) -> dict[str, Any]:
        """The arguments of `plan_sampling` that have the same names here."""
        return {name: getattr(self, name) for name in ("unit", "max_examples_per_speaker", "max_batch_size")}


class Refusal(NamedTuple):
    """An argument of transformers that cannot be private.

    name: of the argument. given: whether a value is refused. message: the reason and the fix.
    """

    name: str
    given: Callable[[Any], bool]
    message: str


def _default_of(name: str) -> Any:
    return TrainingArguments.__dataclass_fields__[name].default


_OPTIMIZERS = ("lomo", "adalomo", "schedule_free", "layerwise")

REFUSALS = (
    Refusal(
        "max_grad_norm",
        lambda value: value not in (0, None, _default_of("max_grad_norm")),
        "it would clip the mean gradient of a batch, which bounds no example. Leave it out, and give "
        "PrivacyArguments(max_grad_norm=...), the clipping norm of each example's gradient",
    ),
    Refusal(
        "fp16",
        bool,
        "float16 needs a loss scale that changes with the gradients, and scaled losses cannot be clipped: use bf16",
    ),
    Refusal(
        "train_sampling_strategy",
        lambda value: value != "random",
        "every batch must be a Poisson sample. Leave it out; for less padding give lengths=[...], the sizes of all "
        "examples, to the trainer: micro-batches then hold examples of similar sizes",
    ),
    Refusal(
        "dataloader_drop_last",
        bool,
        "it has no meaning for Poisson-sampled batches, whose sizes differ: leave it out",
    ),
    *(
        Refusal(
            name,
            bool,
            "a row would hold several examples (TRL), whose gradients would be clipped as one example's: leave it out",
        )
        for name in ("packing", "padding_free")
    ),
    Refusal(
        "auto_find_batch_size",
        bool,
        "the batch size is a public constant of the accounting. Leave it out: a micro-batch that runs out of memory is "
        "halved and repeated, with the same examples",
    ),
    Refusal(
        "neftune_noise_alpha",
        lambda value: value is not None,
        "its noise is scaled by the padded length of the batch, which depends on the other examples: leave it out",
    ),
    Refusal(
        "include_num_input_tokens_seen",
        lambda value: value not in (False, "no"),
        "the number of tokens tells which examples were drawn, and trainer_state.json would hold it: leave it out",
    ),
    Refusal(
        "gradient_checkpointing_kwargs",
        lambda value: bool(value) and bool(value.get("use_reentrant")),
        "a reentrant checkpoint hides its layers from the forward, so their gradients cannot be checked row by row: "
        "give {'use_reentrant': False}",
    ),
    Refusal("torch_compile", bool, "compiled private models are not supported by this Trainer: leave it out"),
    Refusal(
        "use_liger_kernel",
        bool,
        "its fused losses are means over the batch, and its layers have no rule for a norm: leave it out",
    ),
    Refusal(
        "deepspeed",
        bool,
        "it holds gradients and optimizer states itself, past clipping and noise. Leave it out: start several "
        "processes with torchrun, and keep a frozen base in parts by dpkernels.privacy.shard_frozen (docs/sharding.md)",
    ),
    Refusal(
        "fsdp",
        bool,
        "Trainer's FSDP averages gradients before they are clipped. Leave it out: start several processes with "
        "torchrun, and keep a frozen base in parts by dpkernels.privacy.shard_frozen (docs/sharding.md)",
    ),
    Refusal(
        "parallelism_config",
        lambda value: value is not None,
        "an example's gradient must be whole on one process: leave it out, and start several processes with torchrun",
    ),
    Refusal(
        "n_gpu",
        lambda value: value > 1,
        "DataParallel averages gradients over GPUs before they are clipped: start one process for each GPU with "
        "torchrun, or choose one GPU by CUDA_VISIBLE_DEVICES",
    ),
    Refusal(
        "optim",
        lambda value: any(kind in str(getattr(value, "value", value)) for kind in _OPTIMIZERS),
        "it updates parameters within the backward, before they are clipped and noised, or by a schedule that needs "
        "calls of its own: use adamw_torch (the default), adafactor, sgd or another that acts in step()",
    ),
)
"""Fields and properties of `TrainingArguments` that are refused."""

_PACKING = ("DataCollatorWithFlattening",)


def check_arguments(args: TrainingArguments) -> None:
    """Raise TrainerError for the first of `REFUSALS` that `args` gives. Arguments that it does not have are skipped."""
    for refusal in REFUSALS:
        value = getattr(args, refusal.name, None)
        if hasattr(args, refusal.name) and refusal.given(value):
            shown = str(getattr(value, "value", value))
            raise TrainerError(f"TrainingArguments({refusal.name}={shown}) is refused: {refusal.message}")


def check_accelerator(trainer: Any) -> None:
    """Raise TrainerError for what accelerate's own configuration, beside `TrainingArguments`, turns on."""
    found = {
        "fp16": trainer.accelerator.mixed_precision == "fp16",
        "deepspeed": trainer.is_deepspeed_enabled,
        "fsdp": trainer.is_fsdp_enabled,
    }
    for refusal in REFUSALS:
        if found.get(refusal.name):
            raise TrainerError(
                f"{refusal.name} (of accelerate's configuration) is refused: {refusal.message}"
            )


def check_model(model: Any) -> None:
    """Raise TrainerError for a model that is wrapped in another module."""
    inner = getattr(model, "_orig_mod", None)
    if inner is not None:
        raise TrainerError(
            f"model=torch.compile({type(inner).__name__}) is refused: the wrapper hides the parameters' names, by "
            "which checkpoints are written, and the class, from which the losses follow. Give the model itself "
            "(model._orig_mod); model.compile(), in place, before the Trainer is made, keeps both"
        )


def check_data(dataset: Any, collator: Any, expected: int) -> None:
    """Raise TrainerError for a training set or a data collator that cannot be private.

    Args:
        dataset: the Trainer's train_dataset.
        collator: its data_collator.
        expected: the expected logical batch, in examples.
    """
    kind = type(dataset).__name__
    if dataset is None:
        raise TrainerError("train_dataset is missing: training needs one")
    if isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__len__"):
        raise TrainerError(
            f"train_dataset={kind} cannot be Poisson-sampled: every example must be reachable by its index in every "
            "step. Give a map-style data set (datasets.load_dataset without streaming)"
        )
    if expected > len(dataset):
        raise TrainerError(
            f"per_device_train_batch_size × gradient_accumulation_steps × processes = {expected} exceeds the "
            f"{len(dataset)} examples of train_dataset; it is the expected batch size, so lower one of them"
        )
    name = type(collator).__name__
    if name in _PACKING or getattr(collator, "padding_free", False):
        raise TrainerError(
            f"data_collator={name} is refused: it packs several examples into one row, whose gradient would be clipped "
            "as one example's. Use a collator that pads (DataCollatorWithPadding, DataCollatorForLanguageModeling)"
        )
    if getattr(collator, "seed", None) is not None:
        raise TrainerError(
            f"data_collator={name}(seed={collator.seed}) is refused: under a known seed one more example changes the "
            "masks of all that follow it. Leave seed out: torch's generator has a secret one"
        )


def check_loss(trainer: Any, *, given: bool) -> None:
    """Raise TrainerError for a loss over the batch that would be passed over.

    Args:
        trainer: the private trainer.
        given: whether it has a loss for each example of its own.
    """
    if trainer.compute_loss_func is not None:
        raise TrainerError(
            "compute_loss_func is refused: it reduces the losses of a batch to one number. Give "
            "compute_loss_per_example=, a function (model, inputs) -> losses [B] with one loss for each example"
        )
    compute_loss = type(trainer).compute_loss
    if compute_loss is not Trainer.compute_loss and not given:
        raise TrainerError(
            f"{compute_loss.__qualname__} is refused: it returns one number for a batch, and a private step needs one "
            "loss for each example. Give compute_loss_per_example= (dpkernels.interop.trainer.losses_per_example "
            "computes it from the model's logits); compute_loss then serves the evaluation alone"
        )
