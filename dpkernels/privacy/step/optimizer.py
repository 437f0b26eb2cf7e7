"""The private optimizer: per-sample losses in, one noised gradient a logical batch out."""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from dpkernels.nn import RowCheck, Tape
from dpkernels.privacy.guards.model import ModelGuard
from dpkernels.privacy.guards.preconditions import check_losses
from dpkernels.privacy.rng.model_draws import SecretSeeds
from dpkernels.privacy.rng.streams import SecretStream, grid_of
from dpkernels.privacy.step.fused import Release, narrow_states, restore_wide_states, take_step, uncovered
from dpkernels.privacy.step.strategies import Clipped, Strategy
from dpkernels.privacy.step.sums import BatchSums

logger = logging.getLogger("dpkernels")


@dataclass(frozen=True)
class StepStats:
    """What the last applied step saw. NOT PRIVATE: for the trainer's eyes, never for a report meant for
    others.

    Attributes:
        examples: examples in the logical batch.
        clip_rate: share of them that were clipped (0 for an empty batch); clipped by layers: in any layer.
        mean_norm: mean norm of their whole gradients before clipping, over those with a finite norm.
        non_finite: how many had a non-finite norm; they contributed exactly 0 (clipped by layers: in the layers
            where it was).
    """

    examples: int
    clip_rate: float
    mean_norm: float
    non_finite: int

    def __repr__(self) -> str:
        return (
            f"StepStats(NOT PRIVATE: examples={self.examples}, clip_rate={self.clip_rate:.3f}, "
            f"mean_norm={self.mean_norm:.4g}, non_finite={self.non_finite})"
        )


# What the accounting rests on, set once.
_FIXED = frozenset({"noise_multiplier", "max_grad_norm", "sensitivity", "expected_batch_size"})


class DPOptimizer(torch.optim.Optimizer):
    """A torch optimizer that steps on clipped, summed and noised gradients.

    The step it takes is (Σ_i min(1, C/‖g_i‖)·g_i + σ·S·N(0, 1)) / expected_batch_size, with S the sensitivity
    of the sum (clipped by layers: C_l and ‖g_il‖ in each layer l): float64, the noised sum rounded to a public
    grid, then once to float32, or, where the wrapped optimizer's own step is called, to the parameter's dtype;
    everything after it is post-processing. `param_groups`, `state` and `defaults` are the wrapped optimizer's, so that
    learning-rate schedulers and `state_dict` work.

    torch's AdamW, Adam and SGD are not called: noise, division and their update are one sweep over memory
    (`dpkernels.ops.noise_adamw`, `noise_sgd`), with float32 state also for bfloat16 parameters. Any other optimizer,
    and what `dpkernels.privacy.step.fused.uncovered` names (amsgrad, hooks on its step, ...), gets the noised
    gradients in `.grad` and its own step is called; that is logged once, with the reason.

    Made by `PrivacyEngine.make_private`.

    Attributes:
        keep_gradients: after a step, `.grad` of every trained parameter holds the noised gradient that was applied.
            False by default: it costs memory and time, and nothing here reads it. Where the wrapped optimizer's own
            step is called, they are there in any case.
        stochastic_rounding: bfloat16 parameters are rounded at random, so that small updates are not lost; False by
            default. step() raises where the sweep cannot be used.

    Args:
        optimizer: the wrapped optimizer.
        model: the private model.
        strategy: how a micro-batch is clipped and summed, over the model's tape.
        noise_multiplier: σ.
        max_grad_norm: C, or √ΣC_l² where layers are clipped each on its own.
        sensitivity: S, a little more than C (or k·C): see `dpkernels.privacy.step.clipping`.
        expected_batch_size: the public constant the noised sum is divided by.
        batch_bound: largest logical batch that the sensitivity is stated for.
        stream: where the noise comes from.
        spend: counts a step, durably, or raises; called before a step changes anything.
        seeds: the global generators' secret seeds; None in tests, where they are fixed.
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
        spend: Callable[[], None],
        seeds: SecretSeeds | None = None,
    ) -> None:
        # Optimizer.__init__ is not called: groups and state live in the wrapped optimizer, once.
        self.original_optimizer = optimizer
        self.noise_multiplier = noise_multiplier
        self.max_grad_norm = max_grad_norm
        self.sensitivity = sensitivity
        self.expected_batch_size = expected_batch_size
        self._strategy = strategy
        self._stream = stream
        self._spend = spend
        self._guard = ModelGuard(model, strategy.tape, optimizer, seeds if noise_multiplier > 0 else None)
        self._rows = RowCheck(strategy.tape)
        self._batch = BatchSums(batch_bound, claimed=noise_multiplier > 0)
        # A parameter's place is its stream's index.
        self._trained = list(self._guard.trained.values())
        self.keep_gradients = False
        self.stochastic_rounding = False
        scale = noise_multiplier * sensitivity
        self._release = Release(scale, grid_of(scale), expected_batch_size)
        self._logged: set[str] = set()
        self._last_seen: list[Clipped] | None = None

    @property
    def tape(self) -> Tape:
        """The model's tape."""
        return self._strategy.tape

    @property
    def _step_supports_amp_scaling(self) -> NoReturn:
        """What torch's GradScaler asks of an optimizer before it steps it."""
        raise RuntimeError(
            "GradScaler.step(optimizer): losses of a private run are not scaled. Clipping looks at gradients as they "
            "are, and float16's range is too small for them unscaled: take bfloat16 under torch.autocast, with "
            "parameters in float32, give optimizer.backward the losses as they are, and call optimizer.step() itself"
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's."""
        return self.original_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.original_optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The wrapped optimizer's."""
        return self.original_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.original_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's."""
        return self.original_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.original_optimizer.defaults = defaults

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIXED and name in self.__dict__:
            raise AttributeError(
                f"optimizer.{name} is fixed by make_private: the ledger and ε count every step with "
                f"{name}={getattr(self, name)}. To change it, start another run with another engine on the same "
                "ledger."
            )
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name == "original_optimizer":  # not set yet
            raise AttributeError(name)
        return getattr(self.original_optimizer, name)

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
        """The wrapped optimizer's state; sums of an unfinished logical batch and keys are not in it."""
        return self.original_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the wrapped optimizer's state, from this class's or torch's own state_dict."""
        self.original_optimizer.load_state_dict(state_dict)
        restore_wide_states(self.original_optimizer, state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> NoReturn:
        """Refused: the trained parameters are fixed when the model is made private."""
        raise RuntimeError(
            "add_param_group after make_private is refused: clipping, noise and the ledger cover the "
            "parameters that were trained then. Add them before make_private."
        )

    @property
    def last_step(self) -> StepStats | None:
        """Statistics of the last applied step, or None before it. NOT PRIVATE."""
        return None if self._last_seen is None else _statistics(self._last_seen)

    @property
    def attempt(self) -> int:
        """Another number after each `recover` and `zero_grad`: examples may then be given again."""
        return self._batch.attempt

    def begin_pass(self) -> None:
        """Called by the private loader when a pass over it begins.

        Raises:
            RuntimeError: a logical batch that was handed out got no step().
        """
        self._batch.check_closed()
        self._guard.before_pass()

    def begin_logical_batch(self, examples: int) -> None:
        """Called by the private loader before it hands out a logical batch of `examples` examples.

        Raises:
            RuntimeError: the logical batch before it got no step().
        """
        self._batch.open(examples)
        self._guard.before_logical_batch()

    def note_checked(self, losses: Tensor) -> None:
        """Called by a self-check with its loss_fn's losses; `backward` warns of a scale that they have not."""
        self._guard.note_checked(losses)

    def backward(self, losses: Tensor) -> None:
        """Back-propagate losses.sum(), clip each example's gradient and add it to the sums.

        Args:
            losses: [B], floating, one loss an example, each depending on its own example only.

        Raises:
            TypeError, ValueError: losses of another shape or kind.
            RuntimeError: more examples than the logical batch holds; a trained parameter used past its
                layer's rule; a second backward unlike the first (strategy="two_pass").
            RowError: a layer's output gradient has rows that are not one example's each. It is asked in the 1st, 2nd,
                4th, 8th, ... backward and for every parameter that was not seen before, by one more backward
                (`dpkernels.nn.recording.row_check`).

        A backward that fails (torch.OutOfMemoryError, say) leaves the sums as they were before it, or, where it had
        begun to add to them, invalidates the logical batch, of which nothing is then released. `recover` says which.
        "per_layer" adds from the beginning, "two_pass" in its second backward, the others once it is over.
        """
        check_losses(losses)
        batch_size = losses.shape[0]
        self._batch.check_room(batch_size)
        self._guard.before_backward(losses)
        if batch_size == 0:
            self.tape.discard()
            return
        try:
            due = self._rows.due(losses)
            with self._rows.checking(losses) if due else nullcontext():
                clipped = self._strategy.backward(losses, self._batch.add, self._guard.after_backward)
        except BaseException:
            self.tape.discard()
            for parameter in self._trained:
                parameter.grad = None
            raise
        self._batch.count(batch_size, clipped)

    def recover(self) -> bool:
        """Make ready to try again after the forward or backward of a micro-batch raised.

        Forgets that forward. Nothing is released or counted, and the sampling is not drawn again: the examples of
        the logical batch stay those that were drawn, and step() refuses unless each was back-propagated.

        Returns:
            True: the sums were invalidated and have been dropped; back-propagate *all* micro-batches of the logical
            batch again, in parts of any size. False: they are as they were before the failure; only the
            micro-batch that failed is to be done again.
        """
        self.tape.discard()
        invalidated = self._batch.invalidated
        self._batch.try_again()
        return invalidated

    @torch.no_grad()
    def step(self, closure: None = None) -> Any:  # type: ignore[override]
        """End the logical batch: count it, add the noise, divide, and step as the wrapped optimizer does.

        Without a backward before it, it is the step of an empty batch: noise alone, and counted all the same.
        An exception after the count leaves a batch that is gone, and parameters of which a part may have been stepped
        on, each with its noise.

        Raises:
            BudgetExhausted: this step would exceed target_epsilon; nothing was spent.
            RuntimeError: the trained parameters or the buffers are no longer those of make_private, part of the
                logical batch was not back-propagated, or stochastic_rounding is set where the sweep does not cover
                the optimizer; nothing was spent.
            TypeError: a closure was given.
        """
        if closure is not None:
            raise TypeError(
                "step(closure) is refused: a closure evaluates the loss within the step, outside of "
                "clipping and noise. Call optimizer.backward(losses), then step()."
            )
        self._batch.check_whole()
        self._guard.before_step()
        self._batch.check_complete()
        fused = self._can_sweep()
        self._spend()
        self._guard.at_step()
        try:
            draw = self._stream.next_draw()
            self._last_seen = self._batch.seen
            if not fused:
                return self._unfused_step(draw)
            self._sweep(draw)
            return None
        finally:
            # Never a second release of the same batch: not even when the wrapped step failed.
            self._batch.close()
            self._rows.note_step()

    def check_model(self) -> None:
        """Raise RuntimeError where a buffer of the model is not as make_private found it.

        Steps look at values now and then only; `engine.get_epsilon` and `engine.state_dict` look here.
        """
        self._guard.before_release()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and drop what an unfinished logical batch had summed up.

        set_to_none: torch's keyword; either value sets them to None, since backward refuses a .grad that no private
        step put there, zeros too.
        """
        self._batch.forget()
        self._guard.publish({})
        self.original_optimizer.zero_grad(set_to_none=True)

    def _can_sweep(self) -> bool:
        reason = uncovered(self.original_optimizer, self._trained)
        if reason and self.stochastic_rounding:
            raise RuntimeError(
                f"stochastic_rounding=True needs the fused sweep, which cannot be used here: {reason}. Set it to "
                "False, or use torch's AdamW, Adam or SGD without what is named."
            )
        if reason and reason not in self._logged:
            self._logged.add(reason)
            logger.warning("noise and the optimizer's step are separate passes, which is slower: %s", reason)
        return not reason

    def _sweep(self, draw: int) -> None:
        """Noise, division, the optimizer's update and clearing the sums, in one pass over memory."""
        kept = take_step(
            self.original_optimizer,
            self._trained,
            {parameter: self._batch.of(parameter) for parameter in self._trained},
            self._release,
            self._stream,
            draw,
            keep_gradients=self.keep_gradients,
            stochastic_rounding=self.stochastic_rounding,
        )
        self._batch.dirty = False  # the sweep has cleared them
        self._guard.publish(kept)

    def _unfused_step(self, draw: int) -> Any:
        """The noised gradients first, then the wrapped optimizer's own step."""
        self._batch.dirty = True  # the sums are overwritten
        gradients = {
            parameter: self._noised_gradient(index, parameter, draw)
            for index, parameter in enumerate(self._trained)
        }
        narrow_states(self.original_optimizer, self._trained)
        self._guard.publish(gradients)
        return self.original_optimizer.step()

    def _noised_gradient(self, index: int, parameter: nn.Parameter, draw: int) -> Tensor:
        """round((sum + σ·S·N(0, 1))/grid)·grid / expected batch size, in float64, rounded once to the parameter's
        dtype (by the sweep: to float32): the sweep's arithmetic, operation by operation.

        The sum is overwritten: closing the batch clears it.
        """
        total, release = self._batch.of(parameter), self._release
        unit = release.grid or 1.0
        if self.noise_multiplier > 0:
            noise = self._stream.normal(parameter.shape, draw=draw, index=index, device=parameter.device)
            total.div_(unit).add_(noise.mul_(release.noise_scale / unit)).round_()
        return total.mul_(unit / release.divisor).to(parameter.dtype, copy=True)


def _statistics(seen: list[Clipped]) -> StepStats:
    if not seen:
        return StepStats(0, 0.0, 0.0, 0)
    norm_sq = torch.cat([part.norm_sq.cpu() for part in seen])
    factors = torch.cat([part.factors.cpu() for part in seen])
    finite = torch.isfinite(norm_sq)
    mean = norm_sq[finite].sqrt().mean().item() if bool(finite.any()) else 0.0
    clipped = ((factors < 1) & finite).sum().item()
    return StepStats(len(norm_sq), clipped / len(norm_sq), mean, int((~finite).sum().item()))
