"""How the self-check and the mates check look into a model: its modes, one private backward, its modules' outputs."""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from dpkernels.nn import GhostModule, Record, Tape, add_weighted_sums, named_modules
from dpkernels.nn.expanded import ExpandingModule

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


def checked_modes(
    model: nn.Module, tape: Tape, loss_fn: LossFunction, batch: Any
) -> Generator[str, None, None]:
    """Evaluation mode, and training mode with dropout off where the model then repeats itself: "eval", "train".

    The model is in it until the next is asked for; close the generator, so that an error leaves no mode behind.
    """
    for mode in ("eval", "train"):
        with _mode(model, train=mode == "train"):
            if mode == "eval" or _repeatable(model, tape, loss_fn, batch):
                yield mode


@contextmanager
def _mode(model: nn.Module, *, train: bool) -> Iterator[None]:
    """All modules in evaluation mode, or the dropout layers only; gradients and modes put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    for parameter in gradients:
        parameter.grad = None
    for module in model.modules():
        if not train or isinstance(module, _DropoutNd):
            module.training = False
    try:
        with torch.enable_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, gradient in gradients.items():
            parameter.grad = gradient


def _repeatable(model: nn.Module, tape: Tape, loss_fn: LossFunction, batch: Any) -> bool:
    """Whether two forwards in the present mode agree to the last bit (no dropout, no random masks)."""
    with torch.no_grad(), tape.paused():
        return torch.equal(loss_fn(model, batch), loss_fn(model, batch))


@contextmanager
def watched(model: nn.Module, see: Callable[[str, Tensor], object]) -> Iterator[None]:
    """`see(name, output)` of the floating-point tensors that the innermost modules return, in order of execution."""

    def hook_of(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                see(name, output)

        return hook

    handles = [module.register_forward_hook(hook_of(name)) for name, module in innermost(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def innermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules without children, and ghost layers that have some, by name.

    Nothing within a ghost layer: it may compute as one with its children (LoRA), and with a hook on one of them would
    take another path than in training, and than where checkpointing computes it again without the hook. Nothing of a
    compiled module: torch.compile would make the hook part of the code that training runs, and does not look whether
    hooks came or went.
    """
    # All of them first: a module that is shared has another name, and may be met elsewhere before.
    within = {inner for module in compiled(model) for inner in module.modules()}
    ghosts = {
        module
        for module in model.modules()
        if isinstance(module, GhostModule) and not isinstance(module, ExpandingModule)
    }
    within |= {inner for module in ghosts for inner in module.modules() if inner is not module}
    for name, module in named_modules(model):
        if module not in within and (module in ghosts or not any(module.children())):
            yield name, module


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
