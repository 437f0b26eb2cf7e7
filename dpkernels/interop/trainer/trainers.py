"""PrivateTrainer and PrivateSeq2SeqTrainer.

They keep everything of transformers' own but the step. `PrivacyEngine` samples, clips, noises and counts; a logical
batch of its loader takes the place of the batches of one optimizer step.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import seed_worker

from dpkernels.interop.trainer.arguments import (
    PrivacyArguments,
    check_accelerator,
    check_arguments,
    check_data,
    check_loss,
    check_model,
)
from dpkernels.interop.trainer.checkpoints import check_files, load_spent, save_state
from dpkernels.interop.trainer.loop import PrivateAccelerator, SubstepBatches
from dpkernels.interop.trainer.losses import TrainerError, check_losses, losses_per_example
from dpkernels.nn import detach
from dpkernels.privacy import BudgetExhausted, PrivacyEngine, back_propagate, plan_sampling
from dpkernels.rounding import shown_epsilon

logger = logging.getLogger("dpkernels")


class PrivateTrainerMixin(Trainer):
    """Makes a subclass of transformers' Trainer private: `class Mine(PrivateTrainerMixin, SomeTrainer)`.

    The expected logical batch has per_device_train_batch_size × gradient_accumulation_steps × processes examples, and
    a micro-batch at most per_device_train_batch_size. Each step draws its logical batch anew, by Poisson sampling, from
    the whole training set; an epoch has round(1/q) steps. The loss of a batch is the sum of the examples' losses over
    the expected number of examples, never over tokens of a batch.

    Args:
        privacy: the privacy of the run.
        lengths: sizes of all examples; a micro-batch then holds examples of similar sizes.
        speakers: the speaker of every example, for PrivacyArguments(unit="speaker").
        compute_loss_per_example: (model, inputs) -> losses [B], one for each example, without terms of other examples;
            default `losses_per_example`. The inputs are on the model's device.
        args, arguments: transformers' own.

    Attributes:
        engine: the run's `PrivacyEngine` once training has begun, else None.

    Raises:
        TrainerError: an argument that cannot be private, by name.
        Any error of `PrivacyEngine.make_private`, when training begins.
    """

    model: Any
    optimizer: Any  # the engine's, from the start of training on
    lr_scheduler: Any

    def __init__(
        self,
        *args: Any,
        privacy: PrivacyArguments,
        lengths: Sequence[int] | None = None,
        speakers: Sequence[Hashable] | None = None,
        compute_loss_per_example: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None,
        **arguments: Any,
    ) -> None:
        self.privacy = privacy
        self.engine: PrivacyEngine | None = None
        self._lengths, self._speakers = lengths, speakers
        self._given_loss = compute_loss_per_example
        self._spent: tuple[int, dict[str, float]] | None = None  # by the number of steps
        self._closed = False
        super().__init__(*args, **arguments)
        check_model(self.model)
        check_arguments(self.args)
        check_accelerator(self)
        overridden = type(self).compute_loss_per_example is not PrivateTrainerMixin.compute_loss_per_example
        self._known_loss = compute_loss_per_example is None and not overridden
        check_loss(self, given=not self._known_loss)

    def create_accelerator_and_postprocess(self) -> None:
        """As Trainer's, with an accelerator that wraps neither model nor optimizer."""
        super().create_accelerator_and_postprocess()
        self.accelerator.__class__ = PrivateAccelerator

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """The autocast of bf16=True, around every forward: accelerate would replace the model's forward for it."""
        return self.accelerator.autocast()

    def train(self, *args: Any, **arguments: Any) -> Any:
        """As Trainer's, once. Raises RuntimeError at a second call."""
        if self.engine is not None:
            raise RuntimeError(
                "PrivateTrainer.train was called before: a trainer serves one run, whose steps are planned and "
                "counted. Make another trainer; to go on, give its train resume_from_checkpoint. Training these "
                "weights further spends further ε, which the other trainer counts in this process, and a ledger that "
                "both share (PrivacyArguments.ledger) in any process"
            )
        try:
            return super().train(*args, **arguments)
        except BaseException:
            if self.engine is not None:
                self._closed = True
                self.engine.close()
            raise
        finally:
            if self.engine is not None:
                detach(self.model)

    def hyperparameter_search(self, *_: Any, **__: Any) -> NoReturn:
        """Refused."""
        raise TrainerError(
            "hyperparameter_search is refused: every trial spends privacy budget, and the choice among trials is not "
            "accounted. Choose hyperparameters on public data, or with one ledger for all runs"
        )

    def get_train_dataloader(self) -> Any:
        """The training set in Poisson-sampled logical batches, for the Trainer's own loop only."""
        args, collator = self.args, self.data_collator
        dataset: Any = self.train_dataset
        check_data(dataset, collator, self._expected_batch_size())
        if hasattr(dataset, "column_names"):
            dataset = self._remove_unused_columns(dataset, description="Training")
        else:
            collator = self._get_collator_with_removed_columns(collator, description="Training")
        data_loader: DataLoader = DataLoader(
            dataset,
            batch_size=self._expected_batch_size(),
            collate_fn=collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=partial(
                seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index
            ),
        )
        sampling = plan_sampling(data_loader, speakers=self._speakers, **self.privacy.of_sampling())
        return SubstepBatches(data_loader, sampling.epoch_steps, args.gradient_accumulation_steps)

    def _expected_batch_size(self) -> int:
        return int(self.get_total_train_batch_size(self.args))

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: SubstepBatches, resume_from_checkpoint: str | None
    ) -> Any:
        self.create_optimizer()
        engine = PrivacyEngine(**self.privacy.of_engine())
        run = self.privacy.of_run()
        make = engine.make_private
        if run["noise_multiplier"] is None:
            del run["noise_multiplier"]
            make = engine.make_private_with_epsilon  # type: ignore[assignment]
        _, self.optimizer, train_dataloader.loader = make(
            module=self.model,
            optimizer=self.optimizer,
            data_loader=train_dataloader.data_loader,
            steps=max_steps,
            physical_batch_size=self.args.per_device_train_batch_size,
            lengths=self._lengths,
            speakers=self._speakers,
            **run,
        )
        self.engine = engine
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._check_losses(train_dataloader)
        return prepared

    def _check_losses(self, batches: SubstepBatches) -> None:
        """Check the losses of the data collator's batches, and their batch independence, before anything is spent."""
        losses_of = partial(self._losses_of, autocast=False)

        def batch_of(count: int, first: int) -> Any:
            batch = batches.collated(count, first)
            return batch if batch is None else self._prepare_inputs(batch)

        check_losses(self.model, losses_of, batch_of, own=self._known_loss)
        if self.privacy.self_check:
            # In float32: in a half type the gradient of a small parameter can be rounding alone.
            report = self._engine().self_check(losses_of)
            logger.info("self-check passed: %s", report)
            if self.accelerator.mixed_precision != "no":
                self._engine().check_batch_independence(self._losses_of, batch_of(3, 0))

    def _run_epoch(self, **arguments: Any) -> None:  # type: ignore[override]
        """As Trainer's, until the budget is spent. A resumed epoch skips no batches: each is a draw of its own."""
        if arguments["epoch"] == arguments["epochs_trained"]:
            done = arguments["steps_trained_in_current_epoch"]
            arguments["epoch"] += done / arguments["steps_in_epoch"]
            arguments["num_update_steps_per_epoch"] -= done // self.args.gradient_accumulation_steps
        try:
            super()._run_epoch(**{**arguments, "resume_from_checkpoint": None})
        except BudgetExhausted as error:
            logger.warning("training stops: %s", error)
            self.optimizer.zero_grad()
            self.control.should_training_stop = True

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        """The batches of one optimizer step, without Trainer's count of their tokens; training stops without any."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if not batches:
            self.control.should_training_stop = True
        return batches, None

    def compute_loss_per_example(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """The losses [B] of a batch; a subclass may override it. See `losses_per_example`."""
        if self._given_loss is not None:
            return self._given_loss(model, inputs)
        return losses_per_example(model, inputs, label_smoothing=self.args.label_smoothing_factor)

    def _losses_of(self, model: nn.Module, batch: Any, *, autocast: bool = True) -> Tensor:
        inputs = self._prepare_inputs(batch)
        if not autocast:
            return self.compute_loss_per_example(model, inputs)
        with self.compute_loss_context_manager():
            return self.compute_loss_per_example(model, inputs)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forwards and backwards of a logical batch; nothing for None. Returns the loss, which is NOT PRIVATE.

        Args:
            model: the private model.
            inputs: a `LogicalBatch`, or None.
            num_items_in_batch: Trainer's; not used, since losses are divided by no count of a batch.
        """
        loss = torch.zeros((), device=self.args.device)
        if inputs is None:
            return loss
        model.train()
        for losses in back_propagate(self.optimizer, inputs, lambda batch: self._losses_of(model, batch)):
            loss += losses.sum()
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        # Trainer takes the mean over processes, and each has its part of the logical batch.
        return loss * self.args.world_size / self._expected_batch_size()

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """Nothing: every example has been clipped."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """Nothing: a norm without noise is not private, and Trainer would log it."""

    def floating_point_ops(self, inputs: Any) -> int:
        """0: operations tell how many examples were drawn, and trainer_state.json holds them."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, with ε and δ; the loss of training batches is called ..._NOT_PRIVATE, or left out."""
        for name in ("loss", "train_loss"):
            if name in logs:
                loss = logs.pop(name)
                if self.privacy.log_training_loss:
                    logs[f"{name}_NOT_PRIVATE"] = loss
        logs.update(self._spent_budget())
        super().log(logs, start_time)

    def _spent_budget(self) -> dict[str, float]:
        """ε so far, rounded up, and δ; {} before the first step, and where a failed run has closed its ledger."""
        if self.engine is None or self.engine.steps == 0:
            return {}
        if self._spent is None or self._spent[0] != self.engine.steps:
            if self._closed:
                return {}
            epsilon = self.engine.get_epsilon(self.privacy.target_delta)
            shown = epsilon if math.isinf(epsilon) else float(shown_epsilon(epsilon))
            self._spent = self.engine.steps, {"epsilon": shown, "delta": self.privacy.target_delta}
            if self.privacy.clipping == "adaptive":
                self._spent[1]["clip_norm"] = self.engine.clip_norm
        return self._spent[1]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As Trainer's; the last entry of its log_history has the ε of this checkpoint."""
        step, logged = self.state.global_step, self.state.log_history
        if not logged or logged[-1]["step"] != step or "epsilon" not in logged[-1]:
            logged.append({**self._spent_budget(), "epoch": self.state.epoch or 0.0, "step": step})
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """Nothing: the generators' states would tell the dropout masks of this run."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing: the generators have fresh secret seeds."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As Trainer's, and the engine's count."""
        spent, optimizer = self._engine().state_dict(), self.optimizer.state_dict()  # on every process
        if self.args.should_save:
            states = {OPTIMIZER_NAME: optimizer, SCHEDULER_NAME: self.lr_scheduler.state_dict()}
            save_state(output_dir, self.model, spent, states)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As Trainer's, and the engine's count. Refuses a checkpoint without one of them, or with another count."""
        if checkpoint is not None:
            check_files(checkpoint)
            super()._load_optimizer_and_scheduler(checkpoint)
            load_spent(checkpoint, self.model, self._engine(), self.state.global_step)

    def _engine(self) -> PrivacyEngine:
        if self.engine is None:
            raise RuntimeError("the private run has not begun: call trainer.train() first")
        return self.engine


class PrivateTrainer(PrivateTrainerMixin, Trainer):
    """transformers' `Trainer` with differential privacy: see `PrivateTrainerMixin`, which has its arguments."""


class PrivateSeq2SeqTrainer(PrivateTrainerMixin, Seq2SeqTrainer):
    """transformers' `Seq2SeqTrainer` with differential privacy: see `PrivateTrainerMixin`."""
