"""How the checks look into a model: its modes, one private backward, its modules' outputs."""

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
    """Have the tape's axes asked for now where they were not, by a forward: before hooks are placed that see it."""
    if tape.needs_to_ask:
        loss_fn(model, batch)
        tape.discard()


def row_error(model: nn.Module, tape: Tape, loss_fn: LossFunction, batch: Any) -> RowError | None:
    """What the row check says of a batch, None where all rows are the examples'; the tape learns its axes from it."""
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
    "As the batch came it did not, so the model takes rows in one order only, as packed sequences that have to be "
    "sorted do. pack_padded_sequence(..., enforce_sorted=False) computes the same, and takes any order",
)


ALONE = (
    "for an example alone",
    "In the batch it did not. Statistics over the batch (batch_norm(training=True)) cannot be of one example, and mix "
    "those of a batch: take them out, or those of evaluation",
)


@contextmanager
def explained(mode: str, said: tuple[str, str]) -> Iterator[None]:
    """What loss_fn raises for rows that the check made is said to come of them: `said` is what they are, and why."""
    try:
        yield
    except (torch.OutOfMemoryError, SelfCheckError, DrawsUnlike):
        raise
    except Exception as error:
        made, cause = said
        raise SelfCheckError(
            f"self-check ({mode} mode): {made} loss_fn raised {type(error).__name__}: {error}\n{cause}",
            SelfCheckReport(),
        ) from error


@torch.no_grad()
def private_gradient(
    records: list[Record], trained: dict[str, nn.Parameter], sample: int, batch_size: int
) -> dict[str, Tensor]:
    """What the private path adds for one sample at factor 1: float64, by name. Zero without a record."""
    sums = {p: torch.zeros(p.shape, dtype=torch.float64, device=p.device) for p in trained.values()}
    factors = torch.zeros(batch_size)
    factors[sample] = 1
    add_weighted_sums(records, factors, sums)  # as the optimizer does
    # What autograd filled past the layers' rules is part of the sum's gradient, not of a sample's: shown by
    # its absence.
    for parameter in trained.values():
        parameter.grad = None
    return {name: sums[parameter] for name, parameter in trained.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """All modules in evaluation mode."""
    with _put_back(model):
        model.eval()
        yield


@contextmanager
def training_without_dropout(model: nn.Module) -> Iterator[None]:
    """The modules' own modes, and dropout off: also functional dropout, unless parts of the model are compiled."""
    with _put_back(model), without_dropout(model, functional=not has_compiled(model)):
        yield


@contextmanager
def as_it_is(model: nn.Module) -> Iterator[None]:
    """The modules' own modes, dropout included."""
    with _put_back(model):
        yield


@contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Gradients are recorded, and empty; modes and gradients are as before afterwards."""
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
    """Whether forwards in the present mode agree to the last bit: nothing kept, and no random draws that matter.

    `times`: forwards where the model draws; where it draws nothing, two tell.
    """
    with torch.no_grad(), tape.paused():
        first, before = loss_fn(model, batch), generator_states()
        again = torch.equal(loss_fn(model, batch), first)
        drawn = generator_states() != before
        return again and all(torch.equal(loss_fn(model, batch), first) for _ in range(2, times) if drawn)


class Behaviour(Enum):
    """What a second forward of the same batch gives."""

    REPEATS = "the same losses"
    DRAWS = "the same losses under the same random draws"
    KEEPS = "other losses also then: something is kept from forward to forward, or drawn elsewhere"


def behaviour_of(model: nn.Module, tape: Tape, loss_fn: LossFunction, batch: Any) -> Behaviour:
    """How the model behaves in its present mode."""
    if repeatable(model, tape, loss_fn, batch):
        return Behaviour.REPEATS
    seed = secret_seed()
    with torch.no_grad(), tape.paused():
        with same_draws(seed):
            first = loss_fn(model, batch)
        with same_draws(seed):
            again = loss_fn(model, batch)
    return Behaviour.DRAWS if torch.equal(first, again) else Behaviour.KEEPS


def draws_past_torch(model: nn.Module, tape: Tape, loss_fn: LossFunction, batch: Any) -> bool:
    """Whether a forward draws from Python's or numpy's global generator."""
    before = foreign_generator_states()
    with torch.no_grad(), tape.paused():
        loss_fn(model, batch)
    return foreign_generator_states() != before


@contextmanager
def watched(model: nn.Module, see: Callable[[str, Tensor], object]) -> Iterator[None]:
    """`see(name, output)` of the floating-point tensors that the innermost modules return, in order of execution; of
    those within a tuple, too (attention and its weights).
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
    """The modules without children, and ghost layers that have some, by name.

    Nothing within a ghost layer that is no mere container: it may compute as one with its children (LoRA), and with a
    hook on one of them would take another path than in training, and than where checkpointing computes it again without
    the hook. Nothing of a compiled module: torch.compile would make the hook part of the code that training runs, and
    does not look whether hooks came or went.
    """
    # All of them first: a module that is shared has another name, and may be met elsewhere before.
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
    """Whether torch.compile has the model or a part of it. No module is asked for its truth, which is its length."""
    return next(compiled(model), None) is not None


def compiled(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that torch.compile has, by whichever of its ways."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if (
            module._compiled_call_impl is not None
            or "_orig_mod" in module._modules  # torch.compile(module)
            or hasattr(forward, "_torchdynamo_orig_callable")
        ):
            yield module
