"""The guard of a private model: checks before every backward and step that it has not changed since make_private."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dpkernels.nn import Tape, batch_norms_in_training, mixes_samples, modules_of, named_modules
from dpkernels.privacy.guards.buffers import BufferWatch, buffer_marks, changed_buffers
from dpkernels.privacy.guards.gathered import GatheredWatch
from dpkernels.privacy.guards.gradient_clipping import watch_clipping
from dpkernels.privacy.guards.graph import check_graph, scales_at_last
from dpkernels.privacy.guards.parameters import ParameterWatch
from dpkernels.privacy.guards.preconditions import (
    batch_norm_message,
    check_forward,
    check_no_gradient,
    quoted,
    some_of,
    trained_parameters,
)
from dpkernels.privacy.rng.model_draws import SecretSeeds

_SEEDED = (
    "{names} generator was seeded after make_private: dropout and other random draws of the model would be known, and "
    "one more example would then change the contributions of others by far more than the clipping norm"
)


@dataclass(frozen=True)
class Snapshot:
    """The state of a model that must not change during private training, from one walk over its modules.

    Attributes:
        batch_norms: whether a batch norm mixes the samples of a batch.
        buffers: (identity, version) of every buffer that state_dict() would release, in the modules' order.
        trained: identities of the parameters with requires_grad, in the modules' order.
        frozen: identities of the other parameters.
    """

    batch_norms: bool
    buffers: list[tuple[int, int]]
    trained: list[int]
    frozen: list[int]


def snapshot(modules: Iterable[nn.Module]) -> Snapshot:
    """The snapshot of a model's modules. Checks compare snapshots, and search for names only if two differ."""
    batch_norms = False
    buffers: list[tuple[int, int]] = []
    trained: list[int] = []
    frozen: list[int] = []
    for module in modules:  # thousands in every step: plain loops, no calls for modules without state
        if module._buffers:
            unsaved = module._non_persistent_buffers_set
            buffers += [
                (id(buffer), buffer._version)
                for name, buffer in module._buffers.items()
                if buffer is not None and name not in unsaved
            ]
            batch_norms = batch_norms or mixes_samples(module)
        elif isinstance(module, _BatchNorm):  # a batch norm without running statistics has no buffers
            batch_norms = batch_norms or mixes_samples(module)
        if module._parameters:
            for parameter in module._parameters.values():
                if parameter is not None:
                    (trained if parameter.requires_grad else frozen).append(id(parameter))
    return Snapshot(batch_norms, buffers, trained, frozen)


class ModelGuard:
    """Refuses, by name, changes of a model or an optimizer since this guard was created.

    Args:
        model: the private model.
        tape: its tape, which calls the guard when a forward begins and ends.
        optimizer: the wrapped optimizer.
        seeds: the global generators' secret seeds, or None if they need not stay secret.

    Attributes:
        trained: the trained parameters by name.
    """

    def __init__(
        self, model: nn.Module, tape: Tape, optimizer: torch.optim.Optimizer, seeds: SecretSeeds | None
    ) -> None:
        self.trained = trained_parameters(model)
        watch_clipping(model, self.trained.values())
        self._gathered = GatheredWatch(model)
        # The parameters themselves, since a later tensor could get the identity of a freed one.
        self._frozen = _frozen(model)
        self._model = model
        self._optimizer = optimizer
        self._held = {id(parameter) for parameter in self._parameters()}
        self._buffers = buffer_marks(model)
        self._buffer_watch = BufferWatch(model)
        self._parameter_watch = ParameterWatch(model)
        self._leaf = tape.compiled.leaf
        tape.before_forward, tape.after_forward = self._before_forward, self._after_forward
        modules = list(modules_of(model))
        self._initial = snapshot(modules)
        # The modules that have buffers or are batch norms: a snapshot before a backward reads only these.
        self._stateful = [m for m in modules if m._buffers or isinstance(m, _BatchNorm)]
        self._published: Mapping[nn.Parameter, Tensor] = {}
        self._seeds = seeds
        self._seeded: set[str] = set()  # generators that were seeded within a forward since the last backward
        self._backwards = 0
        self._checked_scales: int | None = None  # of the losses in self-checks, at most

    def before_logical_batch(self) -> None:
        """Start the watch of the parameters, and seed as `before_pass` does."""
        self._gathered.drop()
        self._parameter_watch.open()
        self.before_pass()

    def before_pass(self) -> None:
        """Seed the global generators again; warn, by name, if other code has seeded them."""
        self._seeded = set()
        if self._seeds is None:
            return
        replaced = self._seeds.replaced()
        if replaced:
            warnings.warn(
                f"{_SEEDED.format(names=', '.join(replaced))}; the generators have now been seeded from the operating "
                "system. Take torch.manual_seed out of the training loop (transformers' set_seed calls it, and so does "
                "the construction of a Trainer: construct it before make_private)",
                stacklevel=4,
            )
        self._seeds.renew()

    def publish(self, gradients: Mapping[nn.Parameter, Tensor]) -> None:
        """Set .grad to a step's noised gradients: the next backward accepts no others there."""
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        self._published = gradients

    def note_checked(self, losses: Tensor) -> None:
        """Record how often the losses of a self-check were scaled."""
        self._checked_scales = max(self._checked_scales or 0, scales_at_last(losses))

    def before_backward(self, losses: Tensor) -> None:
        """Raise RuntimeError for batch norms in training, gradients from elsewhere, changed buffers, or, in the 1st,
        2nd, 4th, ... backward, parts of other modules in the losses' graph. Clear the gradients that `publish` has set.
        """
        self._backwards += 1
        if not self._backwards & (self._backwards - 1):
            check_graph(losses, self._model, self._leaf)
            self._look_at_scale(losses)
        # Only the modules that had state at make_private: a walk over all modules takes a per cent of a step.
        # before_step walks over all of them before anything is released, and finds additions and replacements.
        now = snapshot(self._stateful)
        self._check_batch_norms(now)
        self._check_seeds()
        for name, parameter in self.trained.items():
            if parameter.grad is None:
                continue
            if parameter.grad is not self._published.get(parameter):
                raise RuntimeError(
                    f"'{name}.grad' is set, but not by a private step: a gradient computed elsewhere would "
                    "mix with the private one. Use optimizer.backward(losses) only, and call "
                    "optimizer.zero_grad() first."
                )
            parameter.grad = None
        self._published = {}
        self._check_buffers(now)

    def after_backward(self) -> None:
        """Raise RuntimeError if autograd filled .grad of a trained parameter, past its layer's rule, or if a parameter
        was written."""
        filled = [name for name, parameter in self.trained.items() if parameter.grad is not None]
        if filled:
            raise RuntimeError(
                f"trained parameters were used past their layers' rules: {quoted(filled)}. Autograd "
                "filled their .grad, so part of their gradient was not clipped (a tied weight read "
                "elsewhere, a functional call, a fused layer, a penalty on weights). Use the weight through "
                "its layer only, or freeze it."
            )
        self._gathered.check()
        self._gathered.drop()
        self._parameter_watch.check()

    def before_step(self) -> None:
        """Raise RuntimeError for batch norms in training, or changed parameters or buffers."""
        self._gathered.check()
        self._gathered.drop()
        now = snapshot(modules_of(self._model))
        self._check_batch_norms(now)
        self._check_parameters(now)
        self._check_buffers(now)
        self._buffer_watch.check()
        self._parameter_watch.check(last=True)

    def at_step(self) -> None:
        """End the watch of the parameters: the step and the training loop after it may write them."""
        self._parameter_watch.forget()

    def after_failure(self) -> None:
        """Make a sharded model ready for another forward after a forward or backward that raised."""
        self._gathered.reset()

    def before_release(self) -> None:
        """Raise RuntimeError if buffers changed; compares their values at every call."""
        self._buffer_watch.compare()

    def _before_forward(self) -> None:
        check_forward()
        self._parameter_watch.begin()

    def _after_forward(self) -> None:
        """Check the parameters, and record seeded generators: torch.random.fork_rng later restores their seed."""
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
                f"{_SEEDED.format(names=', '.join(sorted(replaced)))}, within a logical batch: the draws of this "
                "forward are known. Take torch.manual_seed out of the training loop, also within torch.random.fork_rng "
                "(a forward that is not trained on may be seeded under torch.no_grad()), call optimizer.zero_grad(), "
                "and repeat the logical batch (logical_batch.parts, logical_batch.collate)"
            )

    def _look_at_scale(self, losses: Tensor) -> None:
        if self._checked_scales is not None and scales_at_last(losses) > self._checked_scales:
            self._checked_scales = None  # once
            warnings.warn(
                "optimizer.backward: the last operation on the losses is a division or product, which the losses in "
                "self_check did not have. A factor that depends on the batch (losses / len(batch)) changes each "
                "example's contribution when another example joins, beyond the clipping norm. Leave it out, since "
                "step() divides by the expected batch size; or put it into self_check's loss_fn: the check finds such "
                "a factor",
                stacklevel=4,
            )

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def _check_batch_norms(self, now: Snapshot) -> None:
        if now.batch_norms:
            raise RuntimeError(batch_norm_message(batch_norms_in_training(self._model)))

    def _check_buffers(self, now: Snapshot) -> None:
        if now.buffers != self._initial.buffers:
            changed = changed_buffers(self._buffers, buffer_marks(self._model))
            raise RuntimeError(
                f"buffers of the model changed since make_private: {quoted(changed)}. Running statistics, "
                "code books and similar buffers would carry data of the examples into the saved model without noise. "
                "Put their modules into eval(), or set track_running_stats=False; move the model before "
                "make_private."
            )

    def _check_parameters(self, now: Snapshot) -> None:
        if now.trained != self._initial.trained:
            _check_trained(trained_parameters(self._model), self.trained)
        if now.frozen != self._initial.frozen:
            _check_frozen(_frozen(self._model), self._frozen)
        parameters = self._parameters()
        trained, held = {id(p) for p in self.trained.values()}, {id(p) for p in parameters}
        added = [tuple(p.shape) for p in parameters if id(p) not in self._held]
        if added:
            raise RuntimeError(
                f"the optimizer holds parameters that it did not hold at make_private (shapes {added[:5]}): their "
                "gradients are neither clipped nor noised. Add them before make_private."
            )
        check_no_gradient([p for p in parameters if id(p) not in trained])
        lost = [name for name, parameter in self.trained.items() if id(parameter) not in held]
        if lost:
            raise RuntimeError(
                f"the optimizer no longer holds {quoted(lost)}: it would not update them. Do not "
                "rebuild parameters or groups after make_private."
            )


def _frozen(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters without requires_grad, by name; a shared one is under each of its names."""
    return {
        f"{prefix}.{name}" if prefix else name: parameter
        for prefix, module in named_modules(model)
        for name, parameter in module._parameters.items()
        if parameter is not None and not parameter.requires_grad
    }


def _check_frozen(now: dict[str, nn.Parameter], then: dict[str, nn.Parameter]) -> None:
    """Raise RuntimeError, by name, if frozen parameters were replaced, added or removed after make_private."""
    changed = sorted(name for name in now.keys() | then.keys() if now.get(name) is not then.get(name))
    if changed:
        raise RuntimeError(
            f"frozen parameters were replaced, added or removed after make_private: {some_of(changed)}. A parameter "
            "that the model creates in its forward (a code book) would carry data of the examples into the saved model "
            "without noise. Take such updates out of the module, and move, wrap and replace parameters before "
            "make_private."
        )


def _check_trained(now: dict[str, nn.Parameter], then: dict[str, nn.Parameter]) -> None:
    """Raise RuntimeError, by name, if the trained parameters changed after make_private."""
    expected = {id(parameter): name for name, parameter in then.items()}
    present = {id(parameter): name for name, parameter in now.items()}
    gone = [name for key, name in expected.items() if key not in present]
    new = [name for key, name in present.items() if key not in expected]
    if gone or new:
        raise RuntimeError(
            "the trained parameters changed after make_private"
            + (f"; removed or frozen: {quoted(gone)}" if gone else "")
            + (f"; new, replaced or unfrozen: {quoted(new)}" if new else "")
            + ". Move, wrap, freeze and replace parameters before make_private."
        )
