"""Tools of the checks: modes of a model, one private backward, random behaviour, and outputs of its modules."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from dpkernels.nn import GhostModule, Record, RowCheck, RowError, Tape, add_weighted_sums, named_modules
from dpkernels.nn.layers.expanded import ExpandingModule
from dpkernels.privacy.guards.preconditions import check_losses
from dpkernels.privacy.rng.model_draws import (
    foreign_generator_states,
    generator_states,
    same_draws,
    secret_seed,
    without_dropout,
)
from dpkernels.privacy.self_check.draws import DrawsUnlike
from dpkernels.privacy.self_check.findings import SelfCheckError, SelfCheckReport

LossFunction = Callable[[nn.Module, Any], Tensor]


def private_backward(tape: Tape, losses: Tensor) -> list[Record]:
    """The records of one backward of losses [B]."""
    tape.open(losses.shape[0])
    try:
        losses.sum().backward()
        return tape.close()
    except BaseException:
        tape.discard()
        raise


def settle_axes(model: nn.Module, tape: Tape, loss_fn: LossFunction, batch: Any) -> None:
    """Let the tape find its batch axes by a forward now, if it has not: later forwards have hooks that would see it."""
    if tape.needs_to_ask:
        loss_fn(model, batch)
        tape.discard()


def row_error(model: nn.Module, tape: Tape, loss_fn: LossFunction, batch: Any) -> RowError | None:
    """The row check's error for a batch, or None if every row belongs to one example; also sets the tape's axes."""
    losses = loss_fn(model, batch)
    check_losses(losses)
    if len(losses) < 2:
        return None
    try:
        with RowCheck(tape).checking(losses):
            private_backward(tape, losses)
    except RowError as error:
        return error
    finally:
        tape.discard()
    return None


IN_ANOTHER_ORDER = (
    "with the batch's rows in another order",
    "For the batch in its own order it did not, so the model accepts only one order of rows, as packed sequences that "
    "must be sorted do. pack_padded_sequence(..., enforce_sorted=False) computes the same for every order",
)


ALONE = (
    "for an example alone",
    "For the batch it did not. Statistics over the batch (batch_norm(training=True)) are not defined for one example, "
    "and mix the examples of a batch: remove them, or use the running statistics of evaluation",
)


@contextmanager
def explained(mode: str, texts: tuple[str, str]) -> Iterator[None]:
    """Convert loss_fn's error for a changed batch to a SelfCheckError. `texts`: the change and the likely cause."""
    try:
        yield
    except (torch.OutOfMemoryError, SelfCheckError, DrawsUnlike):
        raise
    except Exception as error:
        change, cause = texts
        raise SelfCheckError(
            f"self-check ({mode} mode): {change} loss_fn raised {type(error).__name__}: {error}\n{cause}",
            SelfCheckReport(),
        ) from error


@torch.no_grad()
def private_gradient(
    records: list[Record], trained: dict[str, nn.Parameter], sample: int, batch_size: int
) -> dict[str, Tensor]:
    """The contribution of one sample in the private path at factor 1: float64, by name. Zero without a record."""
    sums = {p: torch.zeros(p.shape, dtype=torch.float64, device=p.device) for p in trained.values()}
    factors = torch.zeros(batch_size)
    factors[sample] = 1
    add_weighted_sums(records, factors, sums)  # as the optimizer does
    # A .grad that autograd filled past the layers' rules is the whole batch's. It is dropped, so that the sample's
    # gradient lacks it and the comparison fails.
    for parameter in trained.values():
        parameter.grad = None
    return {name: sums[parameter] for name, parameter in trained.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """All modules in evaluation mode."""
    with _restored(model):
        model.eval()
        yield


@contextmanager
def training_without_dropout(model: nn.Module) -> Iterator[None]:
    """The modules' own modes, and dropout off: also functional dropout, unless parts of the model are compiled."""
    with _restored(model), without_dropout(model, functional=not has_compiled(model)):
        yield


@contextmanager
def in_own_modes(model: nn.Module) -> Iterator[None]:
    """The modules' own modes, dropout included."""
    with _restored(model):
        yield


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Enable autograd with empty .grad; restore modes and .grad at the end."""
    modes = {module: module.training for module in model.modules()}
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    for parameter in gradients:
        parameter.grad = None
    try:
        with torch.enable_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, gradient in gradients.items():
            parameter.grad = gradient


def repeatable(model: nn.Module, tape: Tape, loss_fn: LossFunction, batch: Any, times: int = 2) -> bool:
    """Whether forwards in the present mode agree to the last bit: no values are kept, and no draw changes the losses.

    times: number of forwards if the model draws at random; two are enough if it does not.
    """
    with torch.no_grad(), tape.paused():
        first, before = loss_fn(model, batch), generator_states()
        equal = torch.equal(loss_fn(model, batch), first)
        drawn = generator_states() != before
        return equal and all(torch.equal(loss_fn(model, batch), first) for _ in range(2, times) if drawn)


class Behaviour(Enum):
    """The result of a second forward of the same batch."""

    REPEATS = "the same losses"
    DRAWS = "the same losses under the same random draws"
    KEEPS = "other losses also under the same draws: the model keeps values, or has a generator of its own"


def behaviour_of(model: nn.Module, tape: Tape, loss_fn: LossFunction, batch: Any) -> Behaviour:
    """The model's behaviour in its present mode."""
    if repeatable(model, tape, loss_fn, batch):
        return Behaviour.REPEATS
    seed = secret_seed()
    with torch.no_grad(), tape.paused():
        with same_draws(seed):
            first = loss_fn(model, batch)
        with same_draws(seed):
            second = loss_fn(model, batch)
    return Behaviour.DRAWS if torch.equal(first, second) else Behaviour.KEEPS


def draws_past_torch(model: nn.Module, tape: Tape, loss_fn: LossFunction, batch: Any) -> bool:
    """Whether a forward draws from Python's or numpy's global generator."""
    before = foreign_generator_states()
    with torch.no_grad(), tape.paused():
        loss_fn(model, batch)
    return foreign_generator_states() != before


@contextmanager
def watched(model: nn.Module, see: Callable[[str, Tensor], object]) -> Iterator[None]:
    """Call `see(name, output)` for each floating-point tensor that an innermost module returns, in order of execution,
    also for those within a tuple (attention and its weights).
    """

    def hook_of(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
            for part in output if isinstance(output, tuple) else (output,):
                if isinstance(part, Tensor) and part.is_floating_point():
                    see(name, part)

        return hook

    handles = [module.register_forward_hook(hook_of(name)) for name, module in innermost(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def innermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules without children, and the ghost layers that have children, by name.

    Modules within a ghost layer that is no plain container are left out. Such a layer may compute as one with its
    children (LoRA). With a hook on a child it would take another path than in training, and than in a checkpoint's
    recomputation without the hook. Modules within a compiled module are left out, too: torch.compile would make the
    hook part of the compiled code of training, and does not notice added or removed hooks.
    """
    # The whole set comes first: a shared module has several names, and may occur elsewhere before.
    within = {inner for module in compiled(model) for inner in module.modules()}
    ghosts = {
        module
        for module in model.modules()
        if isinstance(module, GhostModule)
        and not isinstance(module, ExpandingModule)
        and not module.ghost_container
    }
    within |= {inner for module in ghosts for inner in module.modules() if inner is not module}
    for name, module in named_modules(model):
        if module not in within and (module in ghosts or next(module.children(), None) is None):
            yield name, module


def has_compiled(model: nn.Module) -> bool:
    """Whether the model or a part of it is compiled. A module's truth value is not used, since it may be its length."""
    return next(compiled(model), None) is not None


def compiled(model: nn.Module) -> Iterator[nn.Module]:
    """The modules compiled with torch.compile, in any of its ways."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if (
            module._compiled_call_impl is not None
            or "_orig_mod" in module._modules  # torch.compile(module)
            or hasattr(forward, "_torchdynamo_orig_callable")
        ):
            yield module
