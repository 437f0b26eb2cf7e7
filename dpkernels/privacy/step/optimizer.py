"""The private optimizer: per-sample losses in, one noised gradient a logical batch out."""

import logging
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from dpkernels import ops
from dpkernels.nn import Choices, RowCheck, Tape
from dpkernels.privacy.guards.model import ModelGuard
from dpkernels.privacy.guards.preconditions import check_losses
from dpkernels.privacy.ranks.agreement import bits_of
from dpkernels.privacy.ranks.exchange import Exchange
from dpkernels.privacy.ranks.group import LOAD, STATE, STEP, Ranks
from dpkernels.privacy.ranks.pieces import Piece, cut, owners
from dpkernels.privacy.rng.model_draws import SecretSeeds
from dpkernels.privacy.rng.streams import SecretStream, grid_of
from dpkernels.privacy.step.adaptive import AdaptiveNorms
from dpkernels.privacy.step.flat import FlatLoop
from dpkernels.privacy.step.fused import Release, narrow_states, restore_wide_states, take_step, uncovered
from dpkernels.privacy.step.states import StateShards, spans
from dpkernels.privacy.step.statistics import StepStats, statistics
from dpkernels.privacy.step.strategies import Clipped, Strategy
from dpkernels.privacy.step.sums import BatchSums
from dpkernels.privacy.step.wrapped import WrappedOptimizer

logger = logging.getLogger("dpkernels")


# Attributes that the accounting depends on: they can be set once.
_FIXED = frozenset({"noise_multiplier", "max_grad_norm", "sensitivity", "expected_batch_size"})


SPENT = "privacy"
"""Entry of the optimizer's state_dict with the steps spent, as `PrivacyEngine.state_dict` gives them."""


class StepBudget(Protocol):
    """What counts the steps: the run's budget."""

    @property
    def steps(self) -> int:
        """Steps counted so far."""
        ...

    def spend(self) -> None:
        """Count a step durably, or raise on all ranks."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The spent steps as plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Count the steps of such a state, on all ranks; those that are counted already stay counted once."""
        ...


class DPOptimizer(WrappedOptimizer):
    """A torch optimizer that steps on clipped, summed and noised gradients.

    The gradient of a step is (Σ_i min(1, C/‖g_i‖)·g_i + σ·S·N(0, 1)) / expected_batch_size, with S the sensitivity
    of the sum (per-layer clipping: C_l and ‖g_il‖ in each layer l; adaptive clipping: C and S of the step at hand, and
    σ_g in place of σ, see `dpkernels.privacy.step.adaptive`). It is computed in float64. The noised sum is
    rounded to a public grid, and then once to float32, or to the parameter's dtype if the wrapped optimizer's own step
    is called; everything after it is post-processing. `param_groups`, `state` and `defaults` are the wrapped
    optimizer's, so learning-rate schedulers and `state_dict` work.

    torch's AdamW, Adam and SGD are not called: a fused noise-and-optimizer step (`dpkernels.ops.noise_adamw`,
    `noise_sgd`) adds the noise, divides and updates in one pass over memory, with float32 state also for bfloat16
    parameters. Any other optimizer, and every case that `dpkernels.privacy.step.fused.uncovered` names (amsgrad, hooks
    on its step, ...), gets the noised gradients in `.grad`, and its own step is called. The log has the reason, once.

    `PrivacyEngine.make_private` returns it.

    Attributes:
        keep_gradients: after a step, `.grad` of every trained parameter holds the noised gradient that was applied.
            False by default: it costs memory and time, and nothing here reads it. If the wrapped optimizer's own
            step is called, `.grad` holds them in any case.
        stochastic_rounding: round bfloat16 parameters at random, so that small updates are not lost; False by
            default. step() raises if the fused step cannot be used.
        flat_loop: the state of a loop over `loader.flat()`; the loader drives it.

    Args:
        optimizer: the wrapped optimizer.
        model: the private model.
        strategy: clips and sums a micro-batch, over the model's tape.
        noise_multiplier: σ.
        max_grad_norm: C, or √ΣC_l² under per-layer clipping; under adaptive clipping the first step's (`clip_norm` is
            the present one).
        sensitivity: S, a little more than C (or k·C): see `dpkernels.privacy.step.clipping`.
        expected_batch_size: the public constant the noised sum is divided by.
        batch_bound: largest logical batch that the sensitivity is stated for.
        stream: the source of the noise.
        before_step: raises if the step must not be taken; called on each rank before any of them counts it.
        budget: counts a step before it changes anything.
        ranks: the processes of the run.
        seeds: the global generators' secret seeds; None in tests with fixed seeds.
        whole_units: whether speakers are clipped as speakers (clipping_unit="speaker").
        adaptive: the norms that the strategy clips to, if they adapt.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        model: nn.Module,
        strategy: Strategy,
        noise_multiplier: float,
        max_grad_norm: float,
        sensitivity: float,
        expected_batch_size: int,
        batch_bound: int,
        stream: SecretStream,
        before_step: Callable[[], None],
        budget: StepBudget,
        ranks: Ranks,
        seeds: SecretSeeds | None = None,
        whole_units: bool = False,
        adaptive: AdaptiveNorms | None = None,
    ) -> None:
        super().__init__(optimizer)
        self.noise_multiplier = noise_multiplier
        self.max_grad_norm = max_grad_norm
        self.sensitivity = sensitivity
        self.expected_batch_size = expected_batch_size
        self._strategy = strategy
        self._stream = stream
        self._before_step = before_step
        self._budget = budget
        self._guard = ModelGuard(model, strategy.tape, optimizer, seeds if noise_multiplier > 0 else None)
        self._rows = RowCheck(strategy.tape)
        self._batch = BatchSums(batch_bound, claimed=noise_multiplier > 0, whole_units=whole_units)
        self.flat_loop = FlatLoop(self._batch, self._learning_rates, lambda: self.step())
        self._ranks = ranks
        self._trained = list(self._guard.trained.values())
        # A piece's number is its stream's index. Each has one owner, which adds its noise and steps it.
        owned = owners(cut(self._trained), ranks.size)
        self._spans = spans(owned[ranks.rank])
        self._exchange = Exchange(ranks, owned)
        self._shards = StateShards(ranks, self._exchange, self._trained, self._spans)
        self._drawn = 0  # a digest of the open logical batch
        self._taken = 0  # steps in this process, since the last load_state_dict
        self._diverged = False
        self._fused = False
        self.keep_gradients = False
        self.stochastic_rounding = False
        self._adaptive = adaptive
        scale = self._noise_scale()
        self._release = Release(scale, grid_of(scale), expected_batch_size)
        self._logged: set[str] = set()
        self._last_seen: list[Clipped] | None = None

    @property
    def tape(self) -> Tape:
        """The model's tape."""
        return self._strategy.tape

    @property
    def clip_norm(self) -> float:
        """C of the step at hand, or √ΣC_l²: `max_grad_norm`, until adaptive clipping has moved it.

        Public: it was computed from noisy counts that ε covers, and may be shown and logged.
        """
        return self.max_grad_norm if self._adaptive is None else self._adaptive.total

    @property
    def clip_state(self) -> float | dict[str, float]:
        """`clip_norm`, or the norms by parameter of adaptive per-layer clipping: plain values, for a checkpoint."""
        return self.max_grad_norm if self._adaptive is None else self._adaptive.state()

    def continuation(self, state: object) -> Callable[[], None]:
        """What continues from a checkpoint's `clip_state`. Other clippings have constant norms, and ignore it.

        The norms are taken over only by the call of what is returned: those of a checkpoint that is refused must not
        stay, since nothing has counted the steps that made them.

        Raises:
            ValueError: nothing that this run can have come to.
            RuntimeError: within a logical batch, some of whose gradients are clipped to the present norms.
        """
        adaptive = self._adaptive
        if adaptive is None:
            return lambda: None
        if self._batch.drawn is not None or self._batch.dirty:
            raise RuntimeError(
                "load_state_dict within a logical batch is refused: its gradients are clipped to another C than that "
                "of the checkpoint, which would scale their noise. Load before the loop, or after step()"
            )
        norms = adaptive.of_state(state)
        return lambda: setattr(adaptive, "norms", norms)

    def _noise_scale(self) -> float:
        """Standard deviation of the noise on the sums of the step at hand."""
        if self._adaptive is not None:
            return self._adaptive.noise_scale
        return self.noise_multiplier * self.sensitivity

    @property
    def _step_supports_amp_scaling(self) -> NoReturn:
        """torch's GradScaler reads this attribute before it steps an optimizer; the error refuses it."""
        raise RuntimeError(
            "GradScaler.step(optimizer): losses of a private run must not be scaled. Clipping needs unscaled "
            "gradients, and float16's range is too small for these: use bfloat16 under torch.autocast, with "
            "parameters in float32, give optimizer.backward the unscaled losses, and call optimizer.step() itself"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIXED and name in self.__dict__:
            raise AttributeError(
                f"optimizer.{name} is fixed by make_private: the ledger and ε count every step with "
                f"{name}={getattr(self, name)}. To change it, start another run with another engine on the same "
                "ledger."
            )
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return (
            f"DPOptimizer({self.original_optimizer!r}, noise_multiplier={self.noise_multiplier}, "
            f"max_grad_norm={self.max_grad_norm}, expected_batch_size={self.expected_batch_size})"
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "DPOptimizer holds a noise key and is never pickled or copied; save its state_dict() instead"
        )

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state, without the sums of an unfinished logical batch and without keys; and, as the
        entry "privacy", the steps spent, which torch's own optimizers pass over.

        With several processes each holds a part of the state and this is a collective operation: call it on every
        rank. Every rank gets the whole state, of one process's form, which any number of processes can load.
        """
        whole = self._whole_state() if self._ranks.size > 1 else {}
        with _state_of(self.original_optimizer, whole):
            return {**self.original_optimizer.state_dict(), SPENT: self._budget.state_dict()}

    def _whole_state(self) -> Mapping[Any, dict[str, Any]]:
        """The state of which every rank holds a part; {} if every rank holds all of it."""
        self._check_not_diverged()
        with self._ranks.meeting(STATE, self._facts):
            pass
        return self._shards.whole()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the wrapped optimizer's state, from this class's or torch's own state_dict, and count the steps that it
        has spent, as `PrivacyEngine.load_state_dict` does. Steps already counted stay counted once.

        With several processes it is a collective operation: call it on every rank, with the same state.

        Raises:
            LedgerError, ValueError: the steps were spent with another ledger, or on another data set; nothing is
                loaded.
        """
        spent = state_dict.get(SPENT)
        with self._ranks.meeting(LOAD, lambda: {"steps of": None if spent is None else spent["runs"]}):
            pass
        if spent is not None:
            self._budget.load_state_dict(spent)
        with self._ranks.meeting(LOAD, lambda: {"optimizer's state": _bits_of_state(state_dict)}):
            self._shards.by_parameter.clear()
            self.original_optimizer.load_state_dict(state_dict)
            restore_wide_states(self.original_optimizer, state_dict)
        self._taken = 0

    def add_param_group(self, param_group: dict[str, Any]) -> NoReturn:
        """Refused: the trained parameters are fixed when the model is made private."""
        raise RuntimeError(
            "add_param_group after make_private is refused: clipping, noise and the ledger cover only the "
            "parameters that were trained at that time. Add them before make_private."
        )

    @property
    def last_step(self) -> StepStats | None:
        """Statistics of the last applied step, or None before it. NOT PRIVATE."""
        return None if self._last_seen is None else statistics(self._last_seen)

    @property
    def last_choices(self) -> Choices:
        """What the tape kept and materialised in the last micro-batch, layer by layer, as a table. NOT PRIVATE."""
        return Choices(tuple(self.tape.chosen))

    @property
    def attempt(self) -> int:
        """A counter that changes with each `recover` and `zero_grad`: examples may then be processed again."""
        return self._batch.attempt

    def begin_pass(self) -> None:
        """Called by the private loader when a pass over it begins.

        Raises:
            RuntimeError: step() was not called for a logical batch that was handed out.
        """
        self._batch.check_closed()
        self.flat_loop.end()
        self._guard.before_pass()

    def begin_logical_batch(self, examples: int, *, drawn: int | None = None, digest: int = 0) -> None:
        """Called by the private loader before it hands out a logical batch.

        Args:
            examples: the number of its examples that this process gets.
            drawn: the number of all its examples, with several processes.
            digest: a digest of all its examples, by which the processes find out whether they hold parts of one draw.

        Raises:
            RuntimeError: step() was not called for the previous logical batch.
        """
        self._check_not_diverged()
        self._batch.open(examples, examples if drawn is None else drawn)
        self._drawn = digest
        self._guard.before_logical_batch()

    def announce(self, examples: int, unit: int) -> None:
        """Called by the private loader before it hands out a micro-batch: its examples, and those of each speaker.

        Raises:
            RuntimeError: speakers are clipped as speakers, and the micro-batch before was not back-propagated.
        """
        self._batch.announce(examples, unit)

    def note_checked(self, losses: Tensor) -> None:
        """Called by a self-check with its loss_fn's losses; `backward` warns of a scaling that these do not have."""
        self._guard.note_checked(losses)

    def backward(self, losses: Tensor) -> None:
        """Back-propagate losses.sum(), clip each example's gradient and add it to the sums.

        Args:
            losses: [B], floating-point, one loss for each example, which depends on that example only.

        Raises:
            TypeError, ValueError: losses of another shape or kind.
            RuntimeError: more examples than the logical batch holds; a trained parameter used past its
                layer's rule; a second backward that differs from the first (strategy="two_pass").
            RowError: a layer's output gradient has rows that do not belong to one example each. The check takes one
                more backward; it runs in the 1st, 2nd, 4th, 8th, ... backward and for every parameter that it has not
                seen before (`dpkernels.nn.recording.row_check`).

        A backward that fails (for example with torch.OutOfMemoryError) leaves the sums unchanged if it had not begun
        to add to them. Otherwise it invalidates the logical batch, and nothing is released from it. `recover` returns
        which of the two happened. "per_layer" adds from the start of the backward, "two_pass" in its second backward,
        and the other strategies after the backward.
        """
        check_losses(losses)
        batch_size = losses.shape[0]
        self._batch.check_room(batch_size)
        self.flat_loop.check_room(batch_size)
        self._guard.before_backward(losses)
        if batch_size == 0:
            self.tape.discard()
            return
        unit = self._batch.unit_of(batch_size)
        try:
            due = self._rows.due(losses)
            with self._rows.checking(losses) if due else nullcontext():
                clipped = self._strategy.backward(losses, self._batch.add, self._guard.after_backward, unit)
        except BaseException:
            self.tape.discard()
            self._guard.after_failure()
            for parameter in self._trained:
                parameter.grad = None
            raise
        self._batch.count(batch_size, clipped)

    def recover(self) -> bool:
        """Prepare to repeat a micro-batch whose forward or backward raised.

        Discards that forward. Nothing is released or counted, and nothing is sampled again: the logical batch keeps
        the examples that were drawn, and step() raises unless each was back-propagated.

        Returns:
            True: the sums were invalidated and have been dropped; back-propagate *all* micro-batches of the logical
            batch again, in parts of any size. False: the sums are unchanged; back-propagate only the micro-batch that
            failed again.
        """
        self.tape.discard()
        self._guard.after_failure()
        invalidated = self._batch.invalidated
        self._batch.try_again()
        return invalidated

    @torch.no_grad()
    def step(self, closure: None = None) -> Any:  # type: ignore[override]
        """End the logical batch: count it, add the noise, divide, and update as the wrapped optimizer does.

        Without a backward before it, this is the step of an empty batch: noise alone, and it counts like any other.
        After an exception that follows the count, the batch is lost, and some parameters may have been updated, each
        with its noise.

        In a loop over `loader.flat()` a step before the last micro-batch of the logical batch does nothing.

        Raises:
            BudgetExhausted: this step would exceed target_epsilon; nothing was spent.
            RuntimeError: the trained parameters or the buffers changed after make_private, part of the logical batch
                was not back-propagated, a flat loop's body changed the learning rate, or stochastic_rounding is set
                and the fused step does not cover the optimizer; nothing was spent.
            TypeError: a closure was given.
        """
        if closure is not None:
            raise TypeError(
                "step(closure) is refused: a closure evaluates the loss within the step, without clipping and noise. "
                "Call optimizer.backward(losses), then step()."
            )
        if not self.flat_loop.active:
            return self._end_batch()
        if not self.flat_loop.acts():
            return None
        try:
            result = self._end_batch()
        finally:
            self.flat_loop.note_closed()
        self.flat_loop.note_step()
        return result

    def _end_batch(self) -> Any:
        """`step` at the end of the logical batch."""
        self._ranks.check_unchanged()
        self._check_not_diverged()  # alone: the others may wait for what this rank did not send
        with self._ranks.meeting(STEP, self._facts):
            self._before_step()
            self._batch.check_whole()
            self._guard.before_step()
            self._batch.check_complete()
            self._fused = self._can_fuse()
        self._budget.spend()
        self._guard.at_step()
        self._diverged = self._ranks.size > 1  # until the step is complete
        try:
            with self._ranks.exchanging():
                draw = self._stream.next_draw()
                self._last_seen = self._batch.seen
                following = [] if self._adaptive is None else self._following_norms(self._adaptive, draw)
                self._exchange.sums_to_owners(self._sums())
                result = None
                if self._fused:
                    self._fused_step(draw)
                else:
                    result = self._unfused_step(draw)
            if self._adaptive is not None:
                self._adaptive.norms = following
            self._diverged = False
            return result
        finally:
            # The same batch is never released twice, also if the wrapped step failed.
            self._batch.close()
            self._rows.note_step()
            self._taken += 1

    def _following_norms(self, adaptive: AdaptiveNorms, draw: int) -> list[float]:
        """Scale the noise by the norms that this step's sums were clipped to, and return those of the next step.

        Rank 0 draws the noise of the counts, once for all: a rank's own noisy counts would be a release more.
        """
        scale = self._noise_scale()
        self._release = replace(self._release, noise_scale=scale, grid=grid_of(scale))
        votes = torch.tensor(self._ranks.gathered(self._batch.votes(len(adaptive.norms)))).sum(0).tolist()
        return self._ranks.first(lambda: adaptive.following(votes, self._stream, draw))

    def _facts(self) -> dict[str, Any]:
        """What must be the same on all ranks. Reading the parameters takes time: before the 1st, 2nd, 4th, ... step of
        this process, or since it loaded a checkpoint."""
        facts: dict[str, Any] = {
            "steps counted": self._budget.steps,
            "drawn batch": self._drawn,
            "clipping norms": self.clip_state,
            "fused step": self._fused,
            "learning rates": self._learning_rates(),
            "optimizer.keep_gradients": self.keep_gradients,  # one exchange more
        }
        if not (self._taken + 1) & self._taken:
            facts["trained parameters"] = [bits_of(parameter) for parameter in self._trained]
        return facts

    def _learning_rates(self) -> list[float]:
        return [float(group["lr"]) for group in self.param_groups]

    def _check_not_diverged(self) -> None:
        if self._diverged:
            raise RuntimeError(
                "a step failed after it was counted, and the parameters may differ between ranks: start the run again; "
                "it resumes from its last checkpoint"
            )

    def check_model(self) -> None:
        """Raise RuntimeError if a buffer of the model changed after make_private.

        step() compares values only now and then; `engine.get_epsilon` and `engine.state_dict` call this check.
        """
        self._guard.before_release()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and drop the sums of an unfinished logical batch.

        set_to_none: torch's keyword. Either value sets .grad to None, since backward refuses every .grad that no
        private step has set, zeros included.

        In a loop over `loader.flat()` it does nothing between the micro-batches of a logical batch.
        """
        if self.flat_loop.keeps_sums():
            return
        self._batch.forget()
        self._guard.publish({})
        self.original_optimizer.zero_grad(set_to_none=True)

    def _can_fuse(self) -> bool:
        reason = uncovered(self.original_optimizer, self._trained)
        if reason and self.stochastic_rounding:
            raise RuntimeError(
                f"stochastic_rounding=True needs the fused noise-and-optimizer step, which cannot be used here: "
                f"{reason}. Set it to False, or use torch's AdamW, Adam or SGD without this option."
            )
        if reason and reason not in self._logged:
            self._logged.add(reason)
            logger.warning("noise and the optimizer's step are separate passes, which is slower: %s", reason)
        return not reason

    def _sums(self) -> list[Tensor]:
        """The sum of every trained parameter. NOT PRIVATE."""
        return [self._batch.of(parameter) for parameter in self._trained]

    def _fused_step(self, draw: int) -> None:
        """Add noise, divide, update and clear the sums, in one pass over memory."""
        optimizer = self.original_optimizer
        states: MutableMapping[Any, dict[str, Any]] = optimizer.state
        if self._ranks.size > 1:
            self._shards.take_from(optimizer)
            states = self._shards.by_parameter
        gradients = (
            [torch.empty_like(p, requires_grad=False) for p in self._trained] if self.keep_gradients else []
        )
        take_step(
            optimizer,
            states,
            self._trained,
            self._sums(),
            self._spans,
            self._release,
            self._stream,
            draw,
            gradients=gradients,
            stochastic_rounding=self.stochastic_rounding,
        )
        self._batch.dirty = False  # take_step has cleared the sums
        self._exchange.to_all(self._trained)
        self._exchange.to_all(gradients)
        self._guard.publish(dict(zip(self._trained, gradients, strict=False)))

    def _unfused_step(self, draw: int) -> Any:
        """The noised gradients first, then the wrapped optimizer's own step."""
        if self._ranks.size > 1:
            self._shards.give_back(self.original_optimizer)
        self._batch.dirty = True  # the sums are overwritten
        gradients = self._noised_gradients(draw)
        narrow_states(self.original_optimizer, self._trained)
        self._guard.publish(gradients)
        return self.original_optimizer.step()

    def _noised_gradients(self, draw: int) -> dict[nn.Parameter, Tensor]:
        """round((sum + σ·S·N(0, 1))/grid)·grid / expected batch size, in float64, rounded once to the parameter's
        dtype (by the fused step: to float32): the fused step's arithmetic, operation by operation.

        The sums are overwritten: closing the batch clears them.
        """
        release, sums = self._release, self._sums()
        pieces: dict[torch.device, list[Piece]] = {}
        for span in self._spans:
            pieces.setdefault(sums[span.place].device, []).extend(span.pieces)
        for of_device in pieces.values():
            ops.noise_sums(
                [piece.of(sums[piece.place]) for piece in of_device],
                **self._stream.noise_secrets([piece.index for piece in of_device], draw=draw),
                noise_scale=release.noise_scale,
                grid=release.grid,
                divisor=release.divisor,
            )
        gradients = [total.to(p.dtype, copy=True) for total, p in zip(sums, self._trained, strict=True)]
        self._exchange.to_all(gradients)
        return dict(zip(self._trained, gradients, strict=True))


def _bits_of_state(state_dict: Mapping[str, Any]) -> dict[Any, Any]:
    """An optimizer's state with the bits of its tensors in their place."""
    return {
        number: {
            name: bits_of(value) if isinstance(value, Tensor) else value for name, value in state.items()
        }
        for number, state in state_dict["state"].items()
    }


@contextmanager
def _state_of(optimizer: torch.optim.Optimizer, whole: Mapping[Any, dict[str, Any]]) -> Iterator[None]:
    """Give the optimizer this state, and take it away at the end."""
    optimizer.state.update(whole)
    try:
        yield
    finally:
        for parameter in whole:
            del optimizer.state[parameter]
