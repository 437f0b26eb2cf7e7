"""PrivacyEngine: makes a model, its optimizer and its data loader private, and says what that cost."""

import logging
import os
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dpkernels.deprecation import warn_renamed
from dpkernels.nn import attach, detach
from dpkernels.privacy.accounting import accountant as accounting
from dpkernels.privacy.accounting.accountant import Mechanism, check_accountant
from dpkernels.privacy.accounting.budget import Budget
from dpkernels.privacy.guards.preconditions import check_single_process
from dpkernels.privacy.keywords import (
    STRATEGIES,
    AccountantName,
    check_clipping,
    check_opacus_keywords,
    strategy_called,
)
from dpkernels.privacy.rng.model_draws import SecretSeeds
from dpkernels.privacy.rng.streams import SecretStream
from dpkernels.privacy.sampling.loader import DPDataLoader
from dpkernels.privacy.sampling.plan import Sampling, plan_sampling, sampler_of
from dpkernels.privacy.self_check.batch_independence import check_batch_independence
from dpkernels.privacy.self_check.findings import SelfCheckReport
from dpkernels.privacy.self_check.whole import whole_check
from dpkernels.privacy.setup import Setup, resolve_setup, run_settings
from dpkernels.privacy.step.optimizer import DPOptimizer
from dpkernels.privacy.step.strategies import strategy_of

logger = logging.getLogger("dpkernels")


class PrivacyEngine:
    """Makes training differentially private: `make_private`, then train with what it returns.

    One engine serves one run. Adjacency is add-or-remove-one unit (example or speaker).

    Args:
        accountant: "pld" (default, tight) or "rdp".
        ledger: path of the ledger file: what is spent is on disk before a step is applied, and a run that
            resumes with the same path counts everything in it. None keeps the count in memory (and in
            `state_dict`) only.
        noise_key: 32 bytes that fix noise and sampling. For tests only; warns.
        secure_mode: Opacus's keyword; True is what always holds here, so False is refused.

    Raises:
        ValueError: an unknown accountant, secure_mode=False.
    """

    def __init__(
        self,
        *,
        accountant: str = "pld",
        ledger: str | os.PathLike[str] | None = None,
        noise_key: bytes | None = None,
        secure_mode: bool = True,
    ) -> None:
        check_accountant(accountant)
        if not secure_mode:
            raise ValueError(
                "secure_mode=False is refused: noise always comes from a cryptographic generator here, at no cost that "
                "a weaker one would spare; leave the argument out"
            )
        self.accountant: str = AccountantName(accountant)
        self._ledger_path = ledger
        self._noise_stream = SecretStream(noise_key)
        # Its own key: sampling and noise never share a stream. A test's fixed key fixes both, told apart by
        # purpose.
        self._sampling_stream = self._noise_stream if noise_key is not None else SecretStream()
        self._budget: Budget | None = None
        self._module: nn.Module | None = None
        self._optimizer: DPOptimizer | None = None
        self._loader: DPDataLoader | None = None
        self._warns_unchecked = True  # at the first step, unless a self_check has passed

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("PrivacyEngine holds keys and is never pickled or copied; save its state_dict()")

    @property
    def steps(self) -> int:
        """Steps spent so far, those of earlier runs in the ledger included."""
        return self._require_budget().steps

    @property
    def noise_multiplier(self) -> float:
        """σ of this run."""
        return self._require_budget().mechanism.noise_multiplier

    @property
    def sample_rate(self) -> float:
        """q of this run."""
        return self._require_budget().mechanism.sample_rate

    @property
    def sampling(self) -> Sampling:
        """The sampling's public constants."""
        return self._require_budget().sampling

    @property
    def history(self) -> list[tuple[Mechanism, int]]:
        """Every run's mechanism and how many steps it spent."""
        return self._require_budget().history

    @property
    def target_epsilon(self) -> float | None:
        """ε that step() does not pass, or None."""
        return self._require_budget().target_epsilon

    @property
    def target_delta(self) -> float | None:
        """The target's δ, or None."""
        return self._require_budget().target_delta

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: DataLoader,
        noise_multiplier: float,
        max_grad_norm: float | Sequence[float] | Mapping[str, float],
        strategy: str = "bookkeeping",
        physical_batch_size: int | None = None,
        poisson_sampling: bool = True,
        max_batch_size: int | None = None,
        unit: str = "example",
        speakers: Sequence[Hashable] | None = None,
        max_examples_per_speaker: int | None = None,
        lengths: Sequence[int] | None = None,
        physical_frames: int | None = None,
        steps: int | None = None,
        target_epsilon: float | None = None,
        target_delta: float | None = None,
        clipping: str = "flat",
        noise_generator: None = None,
        loss_reduction: str = "mean",
        criterion: None = None,
        batch_first: bool = True,
        grad_sample_mode: str | None = None,
        wrap_model: bool = False,
        rand_on_empty: bool = False,
    ) -> tuple[nn.Module, DPOptimizer, DPDataLoader]:
        """Make model, optimizer and data loader private. Returns always these three.

        The model is changed in place (`dpkernels.swap`) and returned; the optimizer is wrapped; the loader
        yields Poisson-sampled logical batches, each an iterable of micro-batches. The global generators of
        torch, numpy and Python are seeded anew from the operating system: dropout under a known seed is not
        private (see `SecretSeeds`), and seeded again
        before each pass and logical batch.

        Args:
            module: the model; its layers with trained parameters need a norm rule, or the parameters
                freezing.
            optimizer: any torch optimizer over the trained parameters that steps without a closure.
            data_loader: map-style dataset; its batch_size is the expected batch size, q = batch_size/N. Its
                collate_fn, num_workers, pin_memory, prefetch_factor and worker_init_fn are kept; its generator is
                not, since its workers' random augmentation would have a seed that is known.
            noise_multiplier: σ: noise of standard deviation σ × sensitivity on the sum. 0 is not private: ε =
                ∞, warns.
            max_grad_norm: C, flat clipping of the gradient over all trained parameters. With
                strategy="per_layer" C is the root of the sum of the layers' squared norms, C/√P for each of the P
                trained parameters; or give those norms, by name or in the order of named_parameters().
            strategy: "bookkeeping": one backward, keeping x and g of trained layers until the norms are
                known. "mixed": the same, but where a layer's per-sample gradients take at most half the
                memory of its x and g (LoRA with r well below T, long inputs to narrow layers) these are materialised
                in the backward and kept instead: less memory, and x and g are read once, not twice.
                "two_pass": one backward for the norms, a second for the sums; no x and g is kept, which is what
                goes with activation checkpointing (use_reentrant=False). Refuses a second backward unlike the
                first. "per_layer": each layer is clipped on its own within one backward, and nothing is kept; its
                gradients are not those of flat clipping. Both keep x and g of tied and reused parameters.
            physical_batch_size: largest micro-batch; default the DataLoader's batch_size.
            poisson_sampling: must stay True.
            max_batch_size: capacity in examples: truncated Poisson sampling, with its own accounting ("pld"
                only).
            unit: what ε protects: "example", or "speaker": speakers are sampled and at most
                max_examples_per_speaker = k examples of each join a step; sensitivity and noise are k times
                larger, q = batch_size/(k × speakers).
            speakers: the speaker of every example (unit="speaker").
            max_examples_per_speaker: k (unit="speaker").
            lengths: sizes of all examples; micro-batches are then made of examples of like sizes.
            physical_frames: with lengths: the largest micro-batch counted in them, padding included (examples × the
                longest's length). Short examples then go together in larger numbers, physical_batch_size at most.
            steps: total steps of the run: the loader then ends after them (those in the ledger included).
            target_epsilon, target_delta: step() raises BudgetExhausted rather than pass this ε.
            clipping: "flat" only (strategy="per_layer" may say "per_layer"). loss_reduction: "mean" only: the sum is
                divided by the expected batch size.
            noise_generator, criterion: must stay None. batch_first: must stay True.
            grad_sample_mode: None or "ghost". wrap_model, rand_on_empty: must stay False.
                (Opacus's keywords: each refusal says why.)

        Raises:
            ValueError: an argument out of range or refused, BatchNorm in training, trained parameters without
                a rule, an optimizer that does not hold exactly the model's parameters.
            TypeError: an argument of the wrong kind.
            RuntimeError: more than one process; a second make_private on one engine.
            LedgerError: the ledger is damaged, locked, or another data set's.
        """
        if self._optimizer is not None:
            raise RuntimeError(
                "make_private: this engine made a run private already; use a new PrivacyEngine (with the "
                "same ledger, if both runs spend one budget)"
            )
        check_single_process()
        strategy = strategy_called(strategy)
        check_clipping(clipping, max_grad_norm, strategy)
        check_opacus_keywords(
            poisson_sampling=poisson_sampling,
            noise_generator=noise_generator,
            loss_reduction=loss_reduction,
            criterion=criterion,
            batch_first=batch_first,
            grad_sample_mode=grad_sample_mode,
            wrap_model=wrap_model,
            rand_on_empty=rand_on_empty,
        )
        setup = resolve_setup(
            module,
            optimizer,
            data_loader,
            accountant=self.accountant,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            strategy=strategy,
            physical_batch_size=physical_batch_size,
            max_batch_size=max_batch_size,
            unit=unit,
            speakers=speakers,
            max_examples_per_speaker=max_examples_per_speaker,
            lengths=lengths,
            physical_frames=physical_frames,
            steps=steps,
            target_epsilon=target_epsilon,
            target_delta=target_delta,
        )
        return self._build(setup, module, optimizer, data_loader)

    def _build(
        self, setup: Setup, module: nn.Module, optimizer: torch.optim.Optimizer, data_loader: DataLoader
    ) -> tuple[nn.Module, DPOptimizer, DPDataLoader]:
        """Attach the model, open the ledger and make the three; after a failure model and ledger are free again."""
        # Outside of the try: where it raises it attached nothing, and what another engine holds stays its.
        tape = attach(module, mixed=setup.strategy == "mixed")
        budget: Budget | None = None
        try:
            budget = Budget(
                setup.sampling,
                setup.mechanism,
                self.accountant,
                target_epsilon=setup.target_epsilon,
                target_delta=setup.target_delta,
                planned_steps=setup.steps,
                ledger=self._ledger_path,
                settings=run_settings(setup, module),
            )
            private = DPOptimizer(
                optimizer,
                model=module,
                strategy=strategy_of(setup.strategy, tape, setup.norm, setup.layers),
                noise_multiplier=setup.mechanism.noise_multiplier,
                max_grad_norm=setup.norm,
                sensitivity=setup.sensitivity,
                expected_batch_size=setup.sampling.expected_batch_size,
                batch_bound=setup.bound,
                stream=self._noise_stream,
                spend=self._spend,
                seeds=None if self._noise_stream.fixed else SecretSeeds(),
            )
            loader = DPDataLoader(
                data_loader,
                sampler_of(setup.sampling, setup.speakers, self._sampling_stream),
                physical_batch_size=setup.physical_batch_size,
                epoch_steps=setup.sampling.epoch_steps,
                total_steps=setup.steps,
                lengths=setup.lengths,
                physical_frames=setup.physical_frames,
                before_pass=private.begin_pass,
                on_batch=private.begin_logical_batch,
                steps_taken=lambda: self.steps,
                attempt=lambda: private.attempt,
            )
            logger.info("strategy %s: %s", setup.strategy, STRATEGIES[setup.strategy])
            self._report_steps_before(budget.steps, setup.steps)
        except BaseException:
            detach(module)
            if budget is not None:
                budget.close()
            raise
        self._budget, self._module, self._optimizer, self._loader = budget, module, private, loader
        return module, private, loader

    def _report_steps_before(self, spent: int, planned: int | None) -> None:
        """Say what the ledger holds already: a loader that is at its end would train nothing, and say nothing."""
        if planned is not None and spent >= planned:
            warnings.warn(
                f"ledger={str(self._ledger_path)!r} holds {spent} steps already, and steps={planned}: the loader is "
                "empty and nothing will be trained. To go on, give more steps; for another run, another ledger.",
                stacklevel=4,
            )
        elif spent:
            logger.info("the ledger holds %d steps already; they count", spent)

    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        data_loader: DataLoader,
        target_epsilon: float,
        target_delta: float,
        max_grad_norm: float | Sequence[float] | Mapping[str, float],
        epochs: int | None = None,
        steps: int | None = None,
        **arguments: Any,
    ) -> tuple[nn.Module, DPOptimizer, DPDataLoader]:
        """`make_private` with the smallest σ (rounded up) that keeps the whole run within target_epsilon.

        Args:
            target_epsilon: ε > 0 at the end of the run; step() raises BudgetExhausted rather than pass it.
            target_delta: δ in (0, 1); warns where δ >= 1/N.
            epochs: passes over the loader, of round(1/q) steps each; or
            steps: the run's steps, at whose end the loader ends too. Exactly one of the two.
            module, optimizer, data_loader, max_grad_norm, arguments: as in `make_private`.

        Raises:
            ValueError: both or neither of epochs and steps; and what `make_private` raises.
            TypeError: noise_multiplier given as well.
        """
        if "noise_multiplier" in arguments:
            raise TypeError(
                "noise_multiplier is what make_private_with_epsilon finds; use make_private to set it"
            )
        if (epochs is None) == (steps is None):
            raise ValueError(f"give exactly one of epochs and steps, got epochs={epochs}, steps={steps}")
        planned = ("unit", "speakers", "max_examples_per_speaker", "max_batch_size")
        sampling = plan_sampling(data_loader, **{key: arguments[key] for key in planned if key in arguments})
        total = steps if steps is not None else (epochs or 0) * sampling.epoch_steps
        if total < 1:
            raise ValueError(f"the run has no steps: epochs={epochs}, steps={steps}; give at least 1")
        sigma = accounting.noise_multiplier(
            target_epsilon,
            target_delta,
            sampling.sample_rate,
            total,
            accountant=self.accountant,
            max_batch_size=sampling.max_batch_size,
            dataset_size=sampling.units,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="delta=")  # said once above
            return self.make_private(
                module=module,
                optimizer=optimizer,
                data_loader=data_loader,
                noise_multiplier=sigma,
                max_grad_norm=max_grad_norm,
                steps=steps,
                target_epsilon=target_epsilon,
                target_delta=target_delta,
                **arguments,
            )

    def get_epsilon(self, delta: float | None = None, *, accountant: str | None = None) -> float:
        """ε spent so far at δ: of every step in the ledger and of this run; ∞ after a step without noise.

        Args:
            delta: δ in (0, 1), default target_delta; warns where δ >= 1/N.
            accountant: "pld" or "rdp", default the engine's.

        Raises:
            ValueError: no δ; "rdp" with truncated Poisson sampling.
            LedgerError: an ε that was not reported before cannot be written to the ledger: it is closed, say.
            RuntimeError: a buffer of the model is not as make_private found it: what it holds no ε covers.
        """
        budget = self._require_budget()
        self._check_model()
        delta = budget.target_delta if delta is None else delta
        if delta is None:
            raise ValueError("get_epsilon needs delta (no target_delta was given to make_private)")
        return budget.epsilon(delta, accountant)

    def self_check(
        self,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        batch: Any = None,
        *,
        singles: Sequence[Any] | None = None,
        samples: int = 3,
        tolerance: float | None = None,
    ) -> SelfCheckReport:
        """Check that every example's gradient is its own: alone, beside others and beside longer ones, with the rows
        in another order, and (`check_batch_independence`) with other examples beside it.

        Examples of the data set, of unlike sizes where there are such, are collated by the loader's collate_fn together
        and each alone: only so does it show whether an example's gradient depends on the padding that others bring.

        Args:
            loss_fn: loss_fn(model, batch) -> [B], as the training loop computes the losses that it gives to
                `optimizer.backward`.
            batch: another batch to ask the same of, of which an example alone is a slice, padding included. Without it
                loss_fn takes what the loader yields; with it, a batch of the same form.
            singles: one-example batches of the batch's first examples, each collated alone; then nothing else is
                collated.
            samples: how many examples to compare.
            tolerance: as of `dpkernels.privacy.self_check.check.self_check`.

        Spends nothing and releases nothing; its numbers are NOT PRIVATE. Warns, and says in the report's `unchecked`,
        what could not be asked.

        Raises:
            SelfCheckError: a gradient is not its own; the message names the layers.
            ValueError, TypeError: losses of another shape than [B]; a batch without examples.
        """
        self._require_budget()
        assert self._module is not None
        assert self._optimizer is not None
        assert self._loader is not None
        report = whole_check(
            self._module,
            self._optimizer.tape,
            self._loader,
            self._optimizer.note_checked,
            loss_fn,
            batch,
            singles=singles,
            samples=samples,
            tolerance=tolerance,
        )
        self._warns_unchecked = False
        return report

    def check_batch_independence(
        self, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any, *, samples: int = 3
    ) -> None:
        """Check that an example adds the same beside other examples, in the arithmetic that `loss_fn` computes in.

        `self_check` asks it too; alone it serves where that is done in float32 and training is not. Arguments as of
        `dpkernels.privacy.self_check.batch_independence.check_batch_independence`. Spends nothing and releases
        nothing. Raises SelfCheckError.
        """
        self._require_budget()
        assert self._module is not None
        assert self._optimizer is not None
        check_batch_independence(self._module, self._optimizer.tape, loss_fn, batch, samples=samples)

    def check_mates(
        self, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any, *, samples: int = 3
    ) -> None:
        """The name that `check_batch_independence` had."""
        warn_renamed("PrivacyEngine.check_mates", "check_batch_independence")
        self.check_batch_independence(loss_fn, batch, samples=samples)

    def state_dict(self) -> dict[str, Any]:
        """What was spent, for a checkpoint: plain values, no keys. Raises RuntimeError as get_epsilon does."""
        spent = self._require_budget().state_dict()
        self._check_model()
        return spent

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Add what a checkpoint says was spent, after make_private. Steps counted already stay counted.

        Raises:
            RuntimeError: before make_private.
            LedgerError: the ledger does not hold the line the checkpoint was written after (lines were cut
                off its end, or it is another ledger).
            ValueError: the checkpoint is of another data set or unit.
        """
        self._require_budget().load_state_dict(state)

    def close(self) -> None:
        """Close the ledger and give up its lock. An engine that had one can neither step nor note an ε afterwards:
        step() and get_epsilon() raise LedgerError."""
        if self._budget is not None:
            self._budget.close()

    def _spend(self) -> None:
        check_single_process()
        if self._warns_unchecked and self.noise_multiplier > 0:
            self._warns_unchecked = False  # once
            warnings.warn(
                "no self_check has passed in this run, so nothing has shown that an example's gradient is its "
                "own, which the privacy claim rests on: call engine.self_check(loss_fn, batch) before training",
                stacklevel=4,
            )
        self._require_budget().spend()

    def _check_model(self) -> None:
        if self._optimizer is not None:
            self._optimizer.check_model()

    def _require_budget(self) -> Budget:
        if self._budget is None:
            raise RuntimeError("call make_private (or make_private_with_epsilon) first")
        return self._budget
