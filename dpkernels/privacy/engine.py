"""PrivacyEngine: makes a model, its optimizer and its data loader private, and reports the ε that was spent."""

import logging
import os
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dpkernels.deprecation import renamed_argument, warn_renamed
from dpkernels.nn import attach, detach
from dpkernels.privacy.accounting import accountant as accounting
from dpkernels.privacy.accounting.accountant import Mechanism, check_accountant
from dpkernels.privacy.accounting.budget import Budget
from dpkernels.privacy.accounting.earlier_runs import Runs, earlier_runs, note_run
from dpkernels.privacy.guards.preconditions import trained_parameters
from dpkernels.privacy.keywords import (
    STRATEGIES,
    AccountantName,
    check_clipping,
    check_memory_share,
    check_opacus_keywords,
    strategy_called,
)
from dpkernels.privacy.ranks.agreement import check_same_run, take_first_values
from dpkernels.privacy.ranks.gathers import gathers_of
from dpkernels.privacy.ranks.group import LOAD, SET_UP, WAIT, Ranks, ranks_of
from dpkernels.privacy.ranks.sharded import check_sharded, sharded_modules
from dpkernels.privacy.rng.model_draws import SecretSeeds
from dpkernels.privacy.rng.streams import SecretStream, secret_key
from dpkernels.privacy.sampling.digests import digests_of
from dpkernels.privacy.sampling.loader import DPDataLoader
from dpkernels.privacy.sampling.own_batch import on_devices_of
from dpkernels.privacy.sampling.plan import Sampling, plan_sampling, sampler_of
from dpkernels.privacy.sampling.units import Units
from dpkernels.privacy.self_check.batch_independence import check_batch_independence
from dpkernels.privacy.self_check.findings import SelfCheckError, SelfCheckReport
from dpkernels.privacy.self_check.row_order import order_problem
from dpkernels.privacy.self_check.whole import whole_check
from dpkernels.privacy.setup import (
    RunArguments,
    Setup,
    adaptive_norms,
    named_tensors,
    resolve_setup,
    run_identity,
    run_settings,
)
from dpkernels.privacy.step.adaptive import AdaptiveClipping
from dpkernels.privacy.step.optimizer import DPOptimizer
from dpkernels.privacy.step.strategies import choice_of, strategy_of

logger = logging.getLogger("dpkernels")


class PrivacyEngine:
    """Makes training differentially private: `make_private`, then train with what it returns.

    One engine serves one run. Adjacency is add-or-remove-one unit (example or speaker).

    Args:
        accountant: "pld" (default, tight) or "rdp".
        ledger: path of the ledger file. Each step is on disk before it is applied, and a run that resumes with the
            same path counts all steps in the file. None keeps the count in memory (and in `state_dict`) only.
        noise_key: 32 bytes that fix noise and sampling. For tests only; warns.
        secure_mode: Opacus's keyword. False is refused: noise here is always cryptographic.

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
        check_opacus_keywords(secure_mode=secure_mode)
        self.accountant: str = AccountantName(accountant)
        self._ledger_path = ledger
        self._noise_stream = SecretStream(noise_key)
        # Sampling has a key of its own and never shares a stream with the noise. A test's fixed key serves both; the
        # nonce's purpose byte separates them. Draws are counted apart, since the loader draws ahead of the steps.
        self._sampling_stream = (
            SecretStream() if noise_key is None else SecretStream.with_secret(noise_key, fixed=True)
        )
        self._ranks = Ranks()
        self._budget: Budget | None = None
        self._module: nn.Module | None = None
        self._optimizer: DPOptimizer | None = None
        self._loader: DPDataLoader | None = None
        self._warns_unchecked = True  # at the first step, unless a self_check has passed
        self._strategy = ""  # the name, once the run is set up
        self._needs_order = False  # whether a self-check must find that rows keep the examples' order

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("PrivacyEngine holds keys and is never pickled or copied; save its state_dict()")

    @property
    def steps(self) -> int:
        """Steps spent so far, those of earlier runs included: in the ledger, or in this process on the same module."""
        return self._require_budget().steps

    @property
    def earlier_steps(self) -> int:
        """Those of `steps` that earlier runs of this process took on the same module, without a ledger.

        They count in ε, and not in the `steps` of make_private.
        """
        return self._require_budget().unplanned_steps

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
    def clip_norm(self) -> float:
        """C of the next step, or √ΣC_l²: max_grad_norm, unless clipping is adaptive. Public, and covered by ε."""
        self._require_budget()
        assert self._optimizer is not None
        return self._optimizer.clip_norm

    @property
    def target_epsilon(self) -> float | None:
        """The ε that step() never exceeds, or None."""
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
        memory_share: float | None = None,
        physical_batch_size: int | None = None,
        poisson_sampling: bool = True,
        max_batch_size: int | None = None,
        unit: str = "example",
        speakers: Sequence[Hashable] | None = None,
        max_examples_per_speaker: int | None = None,
        lengths: Sequence[int] | None = None,
        max_padded_frames: int | None = None,
        physical_frames: int | None = None,
        steps: int | None = None,
        target_epsilon: float | None = None,
        target_delta: float | None = None,
        clipping: str | AdaptiveClipping = "flat",
        clipping_unit: str | None = None,
        noise_generator: None = None,
        loss_reduction: str = "mean",
        criterion: None = None,
        batch_first: bool = True,
        grad_sample_mode: str | None = None,
        wrap_model: bool = False,
        rand_on_empty: bool = False,
        process_group: "torch.distributed.ProcessGroup | None" = None,
    ) -> tuple[nn.Module, DPOptimizer, DPDataLoader]:
        """Make model, optimizer and data loader private, and return the three.

        The model is changed in place (`dpkernels.swap`) and returned; the optimizer is wrapped; the loader
        yields Poisson-sampled logical batches, each an iterable of micro-batches. The global generators of
        torch, numpy and Python are seeded from the operating system, and again before each pass and logical
        batch: dropout under a known seed is not private (see `SecretSeeds`).

        Under `torchrun`, after `init_process_group`, all processes train one model: each gets its part of every logical
        batch, and all constants (batch_size among them) are those of the whole. Call it on every rank with the same
        model, data and arguments; the trained parameters start from rank 0's values. The sampling key is rank 0's and
        is sent to the others, so the network between them must be trusted, as it is with gradients and parameters.

        Args:
            module: the model. Each trained parameter needs a norm rule; freeze the others.
            optimizer: any torch optimizer over the trained parameters that steps without a closure.
            data_loader: map-style dataset; its batch_size is the expected batch size, q = batch_size/N. Its
                collate_fn, num_workers, pin_memory, prefetch_factor and worker_init_fn are kept. Its generator is
                replaced, since a known seed would make the workers' random augmentation predictable.
            noise_multiplier: σ; the noise on the sum has standard deviation σ × sensitivity. 0 is not private (ε =
                ∞) and warns.
            max_grad_norm: C, the clipping norm of the whole gradient. With strategy="per_layer" C is
                the root of the sum of the layers' squared norms, and each of the P trained parameters has norm C/√P;
                or give these norms, by name or in the order of named_parameters().
            strategy: "bookkeeping": one backward that keeps x and g of trained layers until the norms are
                known. "mixed": the same, but a layer whose per-sample gradients take at most half the memory of its
                x and g (LoRA with r well below T, long inputs to narrow layers) materialises and keeps those
                instead: less memory, and x and g are read once, not twice.
                "auto": the same, but for each example and layer whichever of the two takes less time, by a cost model
                of the backend (`dpkernels.ops.costs`): the choice depends on the layer's shape and the example's own
                length, never on its batch. `print(optimizer.last_choices)` shows it.
                "two_pass": one backward for the norms and a second for the sums. It keeps no x and g, which suits
                activation checkpointing (use_reentrant=False), and refuses a second backward that differs from the
                first. "per_layer": clips each layer on its own within one backward and keeps nothing; its
                gradients are not those of flat clipping. Both keep x and g of tied and reused parameters.
            memory_share: with strategy="auto", how much more than its output gradient a layer's materialised gradients
                may take; default 1. What is kept until the norms are known then takes at most twice as much as with
                "bookkeeping" (as long as no two layers have the same output gradient); the peak of a step, early in
                the backward, seldom grows. 0: never more.
            physical_batch_size: largest micro-batch; default the DataLoader's batch_size.
            poisson_sampling: must stay True.
            max_batch_size: capacity in examples: truncated Poisson sampling, with its own accounting ("pld"
                only).
            unit: the unit that ε protects: "example" or "speaker". With "speaker", speakers are sampled and at most
                max_examples_per_speaker = k examples of each join a step; q = batch_size/(k × speakers).
            speakers: the speaker of every example (unit="speaker").
            max_examples_per_speaker: k (unit="speaker").
            lengths: sizes of all examples; a micro-batch then holds examples of similar sizes.
            max_padded_frames: with lengths: the largest micro-batch in the same unit, padding included (number of
                examples × length of the longest). A micro-batch of short examples then holds more of them, at most
                physical_batch_size.
            physical_frames: the deprecated name of max_padded_frames.
            steps: total steps of the run, those in the ledger included; the loader ends after them.
            target_epsilon, target_delta: step() raises BudgetExhausted instead of exceeding this ε. Steps that earlier
                runs of this process took on the same module count in it, with a warning, but not in `steps`.
            clipping: "flat": each gradient is scaled by min(1, C/‖g‖). "automatic": by C/(‖g‖ + γ), γ = 0.01, so that C
                needs no tuning: it only multiplies the learning rate (of SGD; AdamW does not see it). "adaptive": as
                "flat", with a C that begins at max_grad_norm and follows the median of the norms, by a noisy count in
                each step; `AdaptiveClipping(...)` in place of the name sets the quantile, the rate and the count's
                noise. σ accounts for sums and count together, so the noise on the sums is a little larger (by half a
                per cent at most, by default). With strategy="per_layer" each layer's norm follows a count of its own.
                In each an example adds at most C. ("per_layer" is accepted with strategy="per_layer".)
            clipping_unit: what is clipped to C with unit="speaker". "example" (the default): each example, and
                sensitivity and noise are k times those of one. "speaker": the sum of a speaker's gradients, with the
                sensitivity of one. Then a micro-batch holds whole speakers, and **the losses must be in the order of
                its examples**: ε rests on it. step() refuses until self_check has looked for a data set, collate_fn or
                loss_fn that changes the order; docs/privacy.md has the limits of that check.
            loss_reduction: "mean" only: the sum is divided by the expected batch size.
            noise_generator, criterion: must stay None. batch_first: must stay True.
            grad_sample_mode: None or "ghost". wrap_model, rand_on_empty: must stay False.
                (Opacus's keywords: each error message has the reason.)
            process_group: the processes that train together, default all that torch.distributed runs. How long they
                wait for one another is the timeout of init_process_group.

        Raises:
            ValueError: an argument out of range or refused, BatchNorm in training, trained parameters without
                a rule, an optimizer that does not hold exactly the model's parameters; the module was trained earlier
                in this process with another `unit`.
            TypeError: an argument of the wrong kind.
            RuntimeError: a second make_private on one engine; torchrun without init_process_group.
            RanksError: the processes' models, data sets, arguments or versions differ, or one of them failed.
            LedgerError: the ledger is damaged, locked, belongs to another data set, or lacks steps that earlier runs of
                this process took on the same module.
        """
        if self._optimizer is not None:
            raise RuntimeError(
                "make_private: this engine already serves a run; use a new PrivacyEngine (with the same ledger, if "
                "both runs spend one budget)"
            )
        ranks = ranks_of(process_group)
        with ranks.meeting(SET_UP):
            strategy = strategy_called(strategy)
            max_padded_frames = renamed_argument(
                "physical_frames", physical_frames, "max_padded_frames", max_padded_frames
            )
            check_clipping(clipping, max_grad_norm, strategy)
            check_memory_share(memory_share, strategy)
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
            run = RunArguments(
                module=module,
                optimizer=optimizer,
                data_loader=data_loader,
                noise_multiplier=noise_multiplier,
                max_grad_norm=max_grad_norm,
                clipping=clipping,
                clipping_unit=clipping_unit,
                strategy=strategy,
                memory_share=memory_share,
                physical_batch_size=physical_batch_size,
                max_batch_size=max_batch_size,
                unit=unit,
                speakers=speakers,
                max_examples_per_speaker=max_examples_per_speaker,
                lengths=lengths,
                max_padded_frames=max_padded_frames,
                steps=steps,
                target_epsilon=target_epsilon,
                target_delta=target_delta,
            )
            check_sharded(module, ranks)
            setup = resolve_setup(run, self.accountant, ranks.size)
            earlier = earlier_runs(module.parameters(), setup.sampling.unit)
        return self._build(setup, ranks, earlier)

    def _join(self, setup: Setup, ranks: Ranks) -> None:
        """Make sure that all ranks begin the same run, from the same values, and draw the same batches."""
        if ranks.size > 1:
            module, fixed = setup.arguments.module, self._noise_stream.fixed
            with ranks.meeting(SET_UP):
                constants = run_identity(setup, self.accountant, fixed)
                constants["examples"] = digests_of(setup.arguments.data_loader.dataset)
            check_same_run(ranks, constants, named_tensors(module))
            take_first_values(ranks, trained_parameters(module).values())
            if sharded := sharded_modules(module):
                gathers_of(ranks).add(sharded)
            if not fixed:
                self._sampling_stream = SecretStream.with_secret(ranks.first(secret_key))
        self._ranks = ranks

    def _build(
        self, setup: Setup, ranks: Ranks, earlier: Runs
    ) -> tuple[nn.Module, DPOptimizer, DPDataLoader]:
        """Attach the model, open the ledger, and return model, optimizer and loader.

        A failure detaches the model and closes the ledger.
        """
        run = setup.arguments
        module = run.module
        self._join(setup, ranks)
        # Outside of the try: if attach raises, nothing was attached, and another engine's tape must stay.
        tape = attach(module, choice=choice_of(run.strategy, run.memory_share))
        adaptive = adaptive_norms(setup)
        budget: Budget | None = None
        try:
            budget = Budget(
                setup.sampling,
                setup.mechanism,
                self.accountant,
                target_epsilon=run.target_epsilon,
                target_delta=run.target_delta,
                planned_steps=run.steps,
                ledger=self._ledger_path,
                settings=run_settings(setup, ranks.size),
                ranks=ranks,
                earlier=earlier,
            )
            private = DPOptimizer(
                run.optimizer,
                model=module,
                strategy=strategy_of(run.strategy, tape, adaptive or setup.layers or setup.rule),
                noise_multiplier=setup.mechanism.noise_multiplier,
                max_grad_norm=setup.norm,
                sensitivity=setup.sensitivity,
                expected_batch_size=setup.sampling.expected_batch_size,
                batch_bound=setup.bound,
                stream=self._noise_stream,
                before_step=self._warn_if_unchecked,
                budget=budget,
                ranks=ranks,
                seeds=None if self._noise_stream.fixed else SecretSeeds(),
                whole_units=setup.whole_units,
                adaptive=adaptive,
            )
            loader = DPDataLoader(
                run.data_loader,
                sampler_of(setup.sampling, run.speakers, self._sampling_stream, run.data_loader.dataset),
                physical_batch_size=setup.physical_batch_size,
                epoch_steps=setup.sampling.epoch_steps,
                total_steps=run.steps,
                lengths=run.lengths,
                max_padded_frames=run.max_padded_frames,
                before_pass=private.begin_pass,
                on_batch=private.begin_logical_batch,
                steps_taken=lambda: self._require_budget().planned_steps_taken,
                attempt=lambda: private.attempt,
                rank=ranks.rank,
                ranks=ranks.size,
                units=Units(run.speakers) if setup.whole_units and run.speakers is not None else None,
                announce=private.announce,
                flat_steps=private.flat_loop,
            )
            logger.info("strategy %s: %s", run.strategy, STRATEGIES[run.strategy])
            self._report_steps_before(budget, run.steps)
        except BaseException:
            detach(module)
            if budget is not None:
                budget.close()
            raise
        self._strategy = run.strategy
        self._needs_order = setup.whole_units and setup.sampling.per_unit > 1
        note_run(trained_parameters(module).values(), budget.spent)
        self._budget, self._module, self._optimizer, self._loader = budget, module, private, loader
        return module, private, loader

    def _report_steps_before(self, budget: Budget, planned: int | None) -> None:
        """Log the steps that the ledger already holds; warn if the step budget is already spent, and of steps that were
        taken without a ledger."""
        spent = budget.planned_steps_taken
        if not self._ranks.is_first:
            return
        if budget.unplanned_steps:
            warnings.warn(
                f"module was trained by {budget.unplanned_steps} private steps of earlier runs in this process: they "
                "count in this run's ε (and towards target_epsilon), since its weights depend on them. For a run that "
                "begins anew, build the model anew; if the earlier data were other people's, load the weights into a "
                "newly built model, and state the ε of both runs",
                stacklevel=4,
            )
        if planned is not None and spent >= planned:
            warnings.warn(
                f"ledger={str(self._ledger_path)!r} already holds {spent} steps, and steps={planned}: the loader is "
                "empty and nothing will be trained. To go on, give more steps; for another run, use another ledger.",
                stacklevel=4,
            )
        elif spent:
            logger.info("the ledger already holds %d steps; they count towards ε", spent)

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
            target_epsilon: ε > 0 at the end of the run; step() raises BudgetExhausted instead of exceeding it.
            target_delta: δ in (0, 1); warns if δ > 0.1/N.
            epochs: passes over the loader, of round(1/q) steps each.
            steps: the run's steps; the loader ends after them. Give exactly one of epochs and steps.
            module, optimizer, data_loader, max_grad_norm, arguments: as in `make_private`.

        Raises:
            ValueError: both or neither of epochs and steps; the errors of `make_private`.
            TypeError: noise_multiplier given as well.
        """
        if "noise_multiplier" in arguments:
            raise TypeError(
                "make_private_with_epsilon computes noise_multiplier and does not accept it; use make_private to set it"
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
            warnings.filterwarnings("ignore", message="delta=")  # warned of above
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
        """The ε spent so far at δ, over all steps in the ledger and in this run; ∞ after a step without noise.

        Args:
            delta: δ in (0, 1), default target_delta; warns if δ > 0.1/N.
            accountant: "pld" or "rdp", default the engine's.

        Raises:
            ValueError: no δ; "rdp" with truncated Poisson sampling.
            LedgerError: a new ε cannot be written to the ledger, for example because the ledger is closed.
            RuntimeError: a buffer of the model changed after make_private; no ε covers its content.
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
        """Check that every example's gradient is independent of its batch: alone, beside others and beside longer
        examples, with the rows in another order, and (`check_batch_independence`) beside other examples.

        The loader's collate_fn collates examples of the data set, of different sizes if there are any, together and
        each alone. Only this comparison shows whether an example's gradient depends on padding to longer examples.

        Args:
            loss_fn: loss_fn(model, batch) -> [B], the losses that the training loop gives to `optimizer.backward`.
            batch: a further batch to check. An example alone is then a slice of it, padding included. Without it
                loss_fn takes the batches that the loader yields; with it, batches of the same form.
            singles: one-example batches of the batch's first examples, each collated alone; then nothing else is
                collated.
            samples: how many examples to compare.
            tolerance: as in `dpkernels.privacy.self_check.check.self_check`.

        It costs some 22 forwards and 18 backwards, of `samples` examples or of one, as long as the data set's shortest
        and longest (of 32 that it reads, or of all if make_private was given `lengths`); a `batch` costs as much again,
        at its own size. On a large model, `samples=2` takes a sixth off.

        Spends nothing and releases nothing; its numbers are NOT PRIVATE. Warns of every check that was not possible;
        the report lists them in `unchecked`.

        Raises:
            SelfCheckError: a gradient depends on the rest of its batch; the message names the layers. Or speakers are
                clipped as speakers, and the losses of up to 32 drawn examples do not keep their order.
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
        report = replace(report, strategy=self._strategy)
        if self._needs_order:
            self._check_order(loss_fn, batch, report)
            self._needs_order = False
        self._warns_unchecked = False
        return report

    def _check_order(
        self, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any, report: SelfCheckReport
    ) -> None:
        """Speakers are consecutive losses: raise unless these keep the order of the examples, as far as can be seen."""
        assert self._loader is not None
        assert self._optimizer is not None
        assert self._module is not None
        problem = order_problem(
            self._module,
            self._optimizer.tape,
            loss_fn,
            self._loader.dataset,
            self._loader.collate_fn,
            self._loader.physical_batch_size,
            lambda made: made if batch is None else on_devices_of(made, batch),
        )
        if problem is not None:
            raise SelfCheckError(
                "clipping_unit='speaker' clips consecutive losses of a micro-batch together, so they must be in the "
                f"order of the examples: {problem}. Keep the order, or use clipping_unit='example', whose noise is "
                "max_examples_per_speaker times larger",
                report,
            )

    def check_batch_independence(
        self, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any, *, samples: int = 3
    ) -> None:
        """Check that an example's contribution does not change with the other examples, in the dtype of `loss_fn`.

        `self_check` includes this check. Call it on its own when `self_check` runs in float32 and training does not.
        Arguments as in `dpkernels.privacy.self_check.batch_independence.check_batch_independence`. Spends nothing and
        releases nothing. Raises SelfCheckError.
        """
        self._require_budget()
        assert self._module is not None
        assert self._optimizer is not None
        check_batch_independence(self._module, self._optimizer.tape, loss_fn, batch, samples=samples)

    def check_mates(
        self, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any, *, samples: int = 3
    ) -> None:
        """Deprecated name of `check_batch_independence`."""
        warn_renamed("PrivacyEngine.check_mates", "check_batch_independence")
        self.check_batch_independence(loss_fn, batch, samples=samples)

    def state_dict(self) -> dict[str, Any]:
        """The spent budget and the present clipping norm as plain values, without keys, for a checkpoint.

        Raises RuntimeError as get_epsilon does.
        """
        spent = self._require_budget().state_dict()
        self._check_model()
        assert self._optimizer is not None
        return spent | {"clip_norm": self._optimizer.clip_state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Add the steps that a checkpoint has spent. Call it after make_private. Steps already counted stay counted.

        Adaptive clipping continues from the checkpoint's C. With several processes it is a collective operation: call
        it on every rank, with the same checkpoint.

        Raises:
            RuntimeError: before make_private; within a logical batch, if clipping is adaptive.
            RanksError: another rank loads another checkpoint, or none.
            LedgerError: the ledger lacks the line after which the checkpoint was written (its last lines were
                removed, or it is another ledger).
            ValueError: the checkpoint is of another data set or unit, or of another clipping.
        """
        budget = self._require_budget()
        assert self._optimizer is not None
        clip_norm = state.get("clip_norm")
        with self._ranks.meeting(LOAD, lambda: {"steps of": state["runs"], "clip_norm": clip_norm}):
            take_over_norms = self._optimizer.continuation(clip_norm)
        budget.load_state_dict(state)
        take_over_norms()

    def wait_for_ranks(self) -> None:
        """Wait until all processes of the run have come here; with one process do nothing.

        Of a model that `fully_shard` has sharded this process meanwhile contributes its part of the weights to forwards
        and backwards of the others, as it does within `optimizer.step()`. Call it on every rank before a collective
        operation of your own (a sum of losses, `destroy_process_group`) that ranks reach after different numbers of
        forwards: after an evaluation on one rank, or on parts of unequal length.
        """
        with self._ranks.meeting(WAIT):
            pass

    def close(self) -> None:
        """Close the ledger and release its lock. With a ledger, step() and get_epsilon() then raise LedgerError."""
        if self._budget is not None:
            self._budget.close()

    def _warn_if_unchecked(self) -> None:
        if self._needs_order and self.noise_multiplier > 0:
            raise RuntimeError(
                "step(): speakers are clipped as speakers (clipping_unit='speaker'), so ε rests on the order of the "
                "rows and losses of a micro-batch: call engine.self_check(loss_fn) first, or use "
                "clipping_unit='example', whose noise is max_examples_per_speaker times larger"
            )
        if self._warns_unchecked and self.noise_multiplier > 0:
            self._warns_unchecked = False  # once
            warnings.warn(
                "no self_check has passed in this run. The privacy claim rests on each example's gradient being "
                "independent of its batch: call engine.self_check(loss_fn) before training; the engine takes the "
                "examples from the loader's data set",
                stacklevel=4,
            )

    def _check_model(self) -> None:
        if self._optimizer is not None:
            self._optimizer.check_model()

    def _require_budget(self) -> Budget:
        if self._budget is None:
            raise RuntimeError("call make_private (or make_private_with_epsilon) first")
        return self._budget
