"""What must stay as make_private found it, while a model is trained: looked at before every backward and step."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dpkernels.nn import Tape, batch_norms_in_training, mixes_samples, modules_of, named_modules
from dpkernels.privacy.guards.buffers import BufferWatch, buffer_marks, changed_buffers
from dpkernels.privacy.guards.graph import check_graph, scales_at_last
from dpkernels.privacy.guards.parameters import ParameterWatch
from dpkernels.privacy.guards.preconditions import (
    batch_norm_message,
    check_no_gradient,
    quoted,
    some_of,
    trained_parameters,
)
from dpkernels.privacy.rng.model_draws import SecretSeeds


def _seeded(generators: Iterable[str]) -> str:
    return (
        f"{', '.join(sorted(generators))} generator was seeded after make_private: dropout and other draws of the "
        "model would be known, and one example more then changes what others add by far more than the clipping norm"
    )


@dataclass(frozen=True)
class Snapshot:
    """What must not change while a model is trained privately, of one walk over its modules.

    Attributes:
        batch_norms: whether a batch norm mixes the samples of a batch.
        buffers: (identity, version) of every buffer that state_dict() would release, in the modules' order.
        trained: identities of the parameters with requires_grad, in the modules' order.
        frozen: identities of the others.
    """

    batch_norms: bool
    buffers: list[tuple[int, int]]
    trained: list[int]
    frozen: list[int]


def snapshot(modules: Iterable[nn.Module]) -> Snapshot:
    """The snapshot of a model's modules: checks compare it, and look for names only where it differs."""
    batch_norms = False
    buffers: list[tuple[int, int]] = []
    trained: list[int] = []
    frozen: list[int] = []
    for module in modules:  # thousands, in every step: in loops, and with no call where there is nothing
        if module._buffers:
            passing = module._non_persistent_buffers_set
            buffers += [
                (id(buffer), buffer._version)
                for name, buffer in module._buffers.items()
                if buffer is not None and name not in passing
            ]
            batch_norms = batch_norms or mixes_samples(module)
        elif isinstance(module, _BatchNorm):  # one without statistics has no buffers
            batch_norms = batch_norms or mixes_samples(module)
        if module._parameters:
            for parameter in module._parameters.values():
                if parameter is not None:
                    (trained if parameter.requires_grad else frozen).append(id(parameter))
    return Snapshot(batch_norms, buffers, trained, frozen)


class ModelGuard:
    """Refuses, by name, a model or an optimizer that is not as it was when this guard was made.

    Args:
        model: the private model.
        tape: its tape, which tells when a forward begins and ends.
        optimizer: the wrapped optimizer.
        seeds: the global generators' secret seeds, where they are to stay secret.

    Attributes:
        trained: the trained parameters by name.
    """

    def __init__(
        self, model: nn.Module, tape: Tape, optimizer: torch.optim.Optimizer, seeds: SecretSeeds | None
    ) -> None:
        self.trained = trained_parameters(model)
        # Themselves, not their identities, which a later tensor could have.
        self._frozen = _frozen(model)
        self._model = model
        self._optimizer = optimizer
        self._held = {id(parameter) for parameter in self._parameters()}
        self._buffers = buffer_marks(model)
        self._buffer_watch = BufferWatch(model)
        self._parameter_watch = ParameterWatch(model)
        tape.before_forward, tape.after_forward = self._parameter_watch.begin, self._after_forward
        modules = list(modules_of(model))
        self._then = snapshot(modules)
        # Those that a snapshot's buffers and batch norms are read from.
        self._stateful = [m for m in modules if m._buffers or isinstance(m, _BatchNorm)]
        self._published: Mapping[nn.Parameter, Tensor] = {}
        self._seeds = seeds
        self._seeded: set[str] = set()  # generators that were, within a forward since the last backward
        self._backwards = 0
        self._checked_scales: int | None = None  # most among the losses of self-checks; None without one

    def before_logical_batch(self) -> None:
        """From now on nothing may write the parameters; and what `before_pass` does."""
        self._parameter_watch.open()
        self.before_pass()

    def before_pass(self) -> None:
        """Seed the global generators anew; warn, by name, where someone else seeded them."""
        self._seeded = set()
        if self._seeds is None:
            return
        replaced = self._seeds.replaced()
        if replaced:
            warnings.warn(
                f"{_seeded(replaced)}; they have been seeded anew from the operating system. "
                "Take torch.manual_seed out of the training loop",
                stacklevel=4,
            )
        self._seeds.renew()

    def publish(self, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        """Put a step's noised gradients into .grad: the only ones that the next backward may find there."""
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        self._published = gradients

    def note_checked(self, losses: Tensor) -> None:
        """Losses as a self-check was given them."""
        self._checked_scales = max(self._checked_scales or 0, scales_at_last(losses))

    def before_backward(self, losses: Tensor) -> None:
        """Raise RuntimeError for batch norms in training, gradients from elsewhere, changed buffers, or, in the 1st,
        2nd, 4th, ... backward, what the losses' graph holds of other modules; clear the gradients that `publish` put
        there.
        """
        self._backwards += 1
        if not self._backwards & (self._backwards - 1):
            check_graph(losses, self._model)
            self._look_at_scale(losses)
        # Those modules that had state at make_private: a walk over all of them is a per cent of a step. before_step
        # takes it before anything is released, and sees what was added or replaced since.
        now = snapshot(self._stateful)
        self._check_batch_norms(now)
        self._check_seeds()
        for name, parameter in self.trained.items():
            if parameter.grad is None:
                continue
            if parameter.grad is not self._published.get(parameter):
                raise RuntimeError(
                    f"{name!r}: its .grad is set, but not by a private step: a gradient computed elsewhere would "
                    "mix with the private one. Use optimizer.backward(losses) only, and call "
                    "optimizer.zero_grad() first."
                )
            parameter.grad = None
        self._published = {}
        self._check_buffers(now)

    def after_backward(self) -> None:
        """Raise RuntimeError where autograd filled .grad of a trained parameter, past its layer's rule, or where a
        parameter was written."""
        filled = [name for name, parameter in self.trained.items() if parameter.grad is not None]
        if filled:
            raise RuntimeError(
                f"trained parameters were used past their layers' rules: {quoted(filled)}. Autograd "
                "filled their .grad, so part of their gradient was not clipped (a tied weight read "
                "elsewhere, a functional call, a fused layer, a penalty on weights). Use the weight through "
                "its layer only, or freeze it."
            )
        self._parameter_watch.check()

    def before_step(self) -> None:
        """Raise RuntimeError for batch norms in training, or parameters or buffers that are not as they were."""
        now = snapshot(modules_of(self._model))
        self._check_batch_norms(now)
        self._check_parameters(now)
        self._check_buffers(now)
        self._buffer_watch.check()
        self._parameter_watch.check(last=True)

    def at_step(self) -> None:
        """The step itself may write the parameters, and so may the training loop after it."""
        self._parameter_watch.forget()

    def before_release(self) -> None:
        """Raise RuntimeError where buffers are not as they were: their values are compared, whichever step it is."""
        self._buffer_watch.compare()

    def _after_forward(self) -> None:
        """What a forward wrote; and what it began with: torch.random.fork_rng puts back a seed that was set in it."""
        self._parameter_watch.end()
        if torch.jit.is_tracing() or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if self._seeds is not None:
            self._seeded.update(self._seeds.replaced())

    def _check_seeds(self) -> None:
        now = [] if self._seeds is None else self._seeds.replaced()
        replaced, self._seeded = self._seeded.union(now), set()
        if replaced:
            raise RuntimeError(
                f"{_seeded(replaced)}, within a logical batch: what this forward drew is known. "
                "Take torch.manual_seed out of the training loop, also within torch.random.fork_rng (a forward that "
                "is not trained on may be seeded so under torch.no_grad()), call optimizer.zero_grad(), and do the "
                "logical batch again (logical_batch.parts, logical_batch.collate)"
            )

    def _look_at_scale(self, losses: Tensor) -> None:
        if self._checked_scales is not None and scales_at_last(losses) > self._checked_scales:
            self._checked_scales = None  # once
            warnings.warn(
                "optimizer.backward: the losses are divided or multiplied at last, and those that self_check was given "
                "were not. A factor that depends on the batch (losses / len(batch)) changes what each example adds "
                "when another one joins, beyond the clipping norm. Leave it out, as step() divides by the expected "
                "batch size; or put it into self_check's loss_fn, which finds such a factor",
                stacklevel=4,
            )

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def _check_batch_norms(self, now: Snapshot) -> None:
        if now.batch_norms:
            raise RuntimeError(batch_norm_message(batch_norms_in_training(self._model)))

    def _check_buffers(self, now: Snapshot) -> None:
        if now.buffers != self._then.buffers:
            changed = changed_buffers(self._buffers, buffer_marks(self._model))
            raise RuntimeError(
                f"buffers of the model changed since make_private: {quoted(changed)}. Running statistics, "
                "code books and the like would carry data of the examples into the saved model without noise. "
                "Put their modules into eval(), or set track_running_stats=False; move the model before "
                "make_private."
            )

    def _check_parameters(self, now: Snapshot) -> None:
        if now.trained != self._then.trained:
            _check_trained(trained_parameters(self._model), self.trained)
        if now.frozen != self._then.frozen:
            _check_frozen(_frozen(self._model), self._frozen)
        parameters = self._parameters()
        trained, held = {id(p) for p in self.trained.values()}, {id(p) for p in parameters}
        added = [tuple(p.shape) for p in parameters if id(p) not in self._held]
        if added:
            raise RuntimeError(
                f"the optimizer holds parameters it did not hold at make_private (shapes {added[:5]}): their "
                "gradients are neither clipped nor noised. Add them before make_private."
            )
        check_no_gradient([p for p in parameters if id(p) not in trained])
        lost = [name for name, parameter in self.trained.items() if id(parameter) not in held]
        if lost:
            raise RuntimeError(
                f"the optimizer no longer holds {quoted(lost)}: it would step without them. Do not "
                "rebuild parameters or groups after make_private."
            )


def _frozen(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters without requires_grad, by name, each under every name it has."""
    return {
        f"{prefix}.{name}" if prefix else name: parameter
        for prefix, module in named_modules(model)
        for name, parameter in module._parameters.items()
        if parameter is not None and not parameter.requires_grad
    }


def _check_frozen(now: dict[str, nn.Parameter], then: dict[str, nn.Parameter]) -> None:
    """Raise RuntimeError, by name, where frozen parameters were replaced, added or removed after make_private."""
    changed = sorted(name for name in now.keys() | then.keys() if now.get(name) is not then.get(name))
    if changed:
        raise RuntimeError(
            f"frozen parameters were replaced, added or removed after make_private: {some_of(changed)}. One that the "
            "model makes while it computes (a code book) would carry data of the examples into the saved model without "
            "noise. Take such updates out of the module, and move, wrap and replace parameters before make_private."
        )


def _check_trained(now: dict[str, nn.Parameter], then: dict[str, nn.Parameter]) -> None:
    """Raise RuntimeError, by name, when the trained parameters changed after make_private."""
    expected = {id(parameter): name for name, parameter in then.items()}
    present = {id(parameter): name for name, parameter in now.items()}
    gone = [name for key, name in expected.items() if key not in present]
    new = [name for key, name in present.items() if key not in expected]
    if gone or new:
        raise RuntimeError(
            "the trained parameters changed after make_private"
            + (f"; no longer there or frozen: {quoted(gone)}" if gone else "")
            + (f"; new, replaced or unfrozen: {quoted(new)}" if new else "")
            + ". Move, wrap, freeze and replace parameters before make_private."
        )
