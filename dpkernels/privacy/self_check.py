"""The self-check: is every example's gradient its own, and does the private backward see the gradient
autograd sees?

For a few examples of a batch, what the private path would add for each of them (factor 1 for it, 0 for the
others) is compared with the gradient of a one-example batch through torch's own layers. They differ where an
example's gradient depends on its batch-mates or on the padding they cause, where a layer's batch axis is not
the first, or where a norm rule is wrong. It is done in evaluation mode, and again with the modules' own modes
but dropout off, where the model then gives the same losses twice.
"""

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from dpkernels.nn import GhostModule, Record, Tape, add_weighted_sums, named_modules
from dpkernels.nn.expanded import ExpandingModule
from dpkernels.privacy.checks import check_losses, trained_parameters
from dpkernels.privacy.clipping import total_norm_sq

LossFunction = Callable[[nn.Module, Any], Tensor]
# Relative to a parameter's own gradient: float32 keeps 1e-5 or better through deep models; half precision
# keeps 1e-2.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 6e-2, torch.float16: 2e-2}
# A parameter whose gradient is this small a part of the example's is compared with that part instead:
# rounding only.
_FLOOR = 1e-3
# Norms are rounded up: nothing is taken off for the dtype. What is left is the comparison's own rounding.
_SHORTFALL = 1e-3


@dataclass(frozen=True)
class Difference:
    """How far one parameter's gradient is off. NOT PRIVATE.

    Attributes:
        parameter: qualified name.
        sample: index in the batch.
        error: ‖private − one by one‖ over the larger of ‖one by one‖ and 10⁻³ of the example's whole
            gradient.
        norm: ‖one by one‖.
        mode: "eval" or "train".
    """

    parameter: str
    sample: int
    error: float
    norm: float
    mode: str


@dataclass(frozen=True)
class SelfCheckReport:
    """What was compared. NOT PRIVATE.

    Attributes:
        differences: every parameter × sample × mode, worst first.
        tolerance: largest error accepted.
        first_module: in order of execution, the first module whose output for a sample differs; None where
            none does.
        norm_shortfall: largest factor by which a norm fell below the gradient's (<= 1 where norms are upper
            bounds).
    """

    differences: list[Difference] = field(default_factory=list)
    tolerance: float = 0.0
    first_module: str | None = None
    norm_shortfall: float = 0.0

    @property
    def failures(self) -> list[Difference]:
        """The differences beyond the tolerance."""
        return [item for item in self.differences if not item.error <= self.tolerance]


class SelfCheckError(RuntimeError):
    """The self-check failed; `report` has the numbers, the message names the layers."""

    def __init__(self, message: str, report: SelfCheckReport) -> None:
        super().__init__(message)
        self.report = report


def self_check(
    model: nn.Module,
    tape: Tape,
    loss_fn: LossFunction,
    batch: Any,
    *,
    singles: Sequence[Any] | None = None,
    samples: int = 3,
    tolerance: float | None = None,
) -> SelfCheckReport:
    """Compare per-example gradients of the private path with one-by-one gradients.

    Args:
        model: the private model.
        tape: its tape.
        loss_fn: loss_fn(model, batch) -> [B].
        batch: a tensor, or dicts, tuples and lists of tensors, batch first. At least two examples show
            dependence on batch-mates; unequal lengths show dependence on padding, when `singles` are given.
        singles: one-example batches of the batch's first examples, each collated alone, so with no padding of
            its batch-mates. By default slices of `batch`, whose padding stays.
        samples: how many examples to compare.
        tolerance: largest relative error; default by the narrowest dtype that the model computes in.

    Raises:
        SelfCheckError: the layers that differ, with their numbers.
        ValueError, TypeError: losses of another shape than [B]; nothing in the batch with B rows.
    """
    if _rows(batch) == 0:
        raise ValueError(
            "self_check: batch holds no example, so nothing would be compared; give at least two"
        )
    trained = trained_parameters(model)
    differences: list[Difference] = []
    first_module: str | None = None
    shortfall = 0.0
    computed: set[torch.dtype] = set()
    with closing(checked_modes(model, tape, loss_fn, batch)) as modes:
        for mode in modes:
            found, module, short, dtypes = _compare(
                model, tape, trained, loss_fn, batch, singles, samples, mode
            )
            differences += found
            first_module = first_module or module
            shortfall = max(shortfall, short)
            computed |= dtypes
    if tolerance is None:
        tolerance = max(_TOLERANCES[dtype] for dtype in computed)
    differences.sort(key=lambda item: -item.error if not math.isnan(item.error) else -math.inf)
    report = SelfCheckReport(differences, tolerance, first_module, shortfall)
    if report.failures:
        raise SelfCheckError(_explain(report), report)
    if shortfall > 1 + _SHORTFALL:
        raise SelfCheckError(
            f"a gradient's norm was computed {shortfall:.4f} times too small: clipping would let through "
            "more than C. A norm rule is wrong; please report the model's layers.",
            report,
        )
    return report


def _rows(batch: Any) -> int | None:
    """Rows of the first tensor of a batch; None where it holds none."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else None
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    return next((rows for rows in map(_rows, parts) if rows is not None), None)


def _compare(
    model: nn.Module,
    tape: Tape,
    trained: dict[str, nn.Parameter],
    loss_fn: LossFunction,
    batch: Any,
    singles: Sequence[Any] | None,
    samples: int,
    mode: str,
) -> tuple[list[Difference], str | None, float, set[torch.dtype]]:
    with _outputs(model) as together:
        losses = loss_fn(model, batch)
    check_losses(losses)
    batch_size = losses.shape[0]
    records = private_backward(tape, losses)
    with torch.no_grad():
        norm_sq = total_norm_sq(records, batch_size, losses.device).cpu()
    count = min(samples, batch_size) if singles is None else min(samples, len(singles), batch_size)
    differences: list[Difference] = []
    first_module: str | None = None
    shortfall = 0.0
    for sample in range(count):
        single = take_sample(batch, sample, batch_size) if singles is None else singles[sample]
        private = private_gradient(records, trained, sample, batch_size)
        with tape.paused(), _outputs(model) as alone:
            expected = _plain_gradient(loss_fn(model, single), trained)
        whole = math.sqrt(sum(float(gradient.norm()) ** 2 for gradient in expected.values()))
        for name in trained:
            norm = float(expected[name].norm())
            error = float((private[name] - expected[name]).norm()) / max(norm, _FLOOR * whole, 1e-30)
            differences.append(Difference(name, sample, error, norm, mode))
        contribution = math.sqrt(sum(float(gradient.norm()) ** 2 for gradient in private.values()))
        bound = math.sqrt(max(float(norm_sq[sample]), 0.0))
        shortfall = max(shortfall, contribution / bound if bound else (math.inf if contribution else 0.0))
        first_module = first_module or _first_difference(together, alone, sample, batch_size)
    dtypes = {output.dtype for output in together.values()} | {p.dtype for p in trained.values()}
    dtypes |= {
        p.dtype for module in _compiled(model) for p in module.parameters()
    }  # where no output is collected
    return differences, first_module, shortfall, dtypes & _TOLERANCES.keys()


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


def _plain_gradient(losses: Tensor, trained: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    if losses.shape != (1,):
        raise ValueError(
            f"loss_fn gave losses of shape {tuple(losses.shape)} for a batch of one example; expected (1,)"
        )
    gradients = torch.autograd.grad(losses.sum(), list(trained.values()), allow_unused=True)
    return {
        name: (torch.zeros_like(parameter) if gradient is None else gradient).double()
        for (name, parameter), gradient in zip(trained.items(), gradients, strict=True)
    }


def take_sample(batch: Any, sample: int, batch_size: int) -> Any:
    """The one-example batch at `sample`: what has batch_size rows is sliced, everything else kept."""
    return with_rows(batch, batch_size, lambda rows: rows[sample : sample + 1], lambda texts: [texts[sample]])


def with_rows(
    batch: Any,
    batch_size: int,
    of_tensor: Callable[[Tensor], Tensor],
    of_list: Callable[[Sequence[Any]], list[Any]],
) -> Any:
    """The batch with other rows: `of_tensor` of every tensor of batch_size rows, `of_list` of every such list (texts,
    one an example), everything else kept; dicts, named tuples, tuples and lists are gone through.
    """

    def again(value: Any) -> Any:
        return with_rows(value, batch_size, of_tensor, of_list)

    if isinstance(batch, Tensor):
        return of_tensor(batch) if batch.dim() and batch.shape[0] == batch_size else batch
    if isinstance(batch, dict) or hasattr(batch, "items"):
        return {key: again(value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(again, batch))
    if isinstance(batch, list | tuple):
        if len(batch) == batch_size and not any(isinstance(value, Tensor) for value in batch):
            return type(batch)(of_list(batch))
        return type(batch)([again(value) for value in batch])
    return batch


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
def _outputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collects the first tensor that each innermost module returns, by name, in order of execution."""
    collected: dict[str, Tensor] = {}
    handles = []

    def collect(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                collected.setdefault(name, output.detach())

        return hook

    for name, module in _innermost(model):
        handles.append(module.register_forward_hook(collect(name)))
    try:
        yield collected
    finally:
        for handle in handles:
            handle.remove()


def _innermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules without children, and ghost layers that have some, by name.

    Nothing within a ghost layer: it may compute as one with its children (LoRA), and with a hook on one of them would
    take another path than in training, and than where checkpointing computes it again without the hook. Nothing of a
    compiled module: torch.compile would make the hook part of the code that training runs, and does not look whether
    hooks came or went.
    """
    # All of them first: a module that is shared has another name, and may be met elsewhere before.
    within = {inner for module in _compiled(model) for inner in module.modules()}
    ghosts = {
        module
        for module in model.modules()
        if isinstance(module, GhostModule) and not isinstance(module, ExpandingModule)
    }
    within |= {inner for module in ghosts for inner in module.modules() if inner is not module}
    for name, module in named_modules(model):
        if module not in within and (module in ghosts or not any(module.children())):
            yield name, module


def _compiled(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that torch.compile has, by whichever of its ways."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if (
            module._compiled_call_impl is not None
            or "_orig_mod" in module._modules  # torch.compile(module)
            or hasattr(forward, "_torchdynamo_orig_callable")
        ):
            yield module


def _first_difference(
    together: dict[str, Tensor], alone: dict[str, Tensor], sample: int, batch_size: int
) -> str | None:
    for name, output in together.items():
        single = alone.get(name)
        if single is None or output.dim() == 0 or output.shape[0] != batch_size or single.shape[:1] != (1,):
            continue
        row = output[sample : sample + 1]
        if row.dim() != single.dim():
            continue
        # A one-example batch that was not padded is shorter: compare what both have.
        common = tuple(slice(0, min(a, b)) for a, b in zip(row.shape, single.shape, strict=True))
        first, second = row[common].double(), single[common].double()
        scale = float(second.abs().max()) if second.numel() else 0.0
        limit = 10 * _TOLERANCES.get(output.dtype, 2e-3)
        if second.numel() and not float((first - second).abs().max()) <= limit * max(scale, 1e-6):
            return name
    return None


def _explain(report: SelfCheckReport) -> str:
    worst: dict[str, Difference] = {}
    for item in report.failures:
        worst.setdefault(item.parameter, item)
    lines = "".join(
        f"\n  {item.parameter}: off by {item.error:.3g} of its norm (example {item.sample}, {item.mode} mode)"
        for item in list(worst.values())[:12]
    )
    where = ""
    if report.first_module is not None:
        where = f"\nThe first module whose output for an example depends on its batch: {report.first_module}."
    return (
        "self-check: the gradient of an example in its batch is not its gradient alone, beyond "
        f"{report.tolerance:g}, for {len(worst)} parameters:{lines}{where}\nLikely causes: normalisation "
        "over the batch, padding that is not masked, a layer whose first dimension is not the batch, a loss "
        "that mixes examples, or, where errors are below 0.01 and on a GPU, convolutions in TF32, torch's default "
        "(torch.backends.cudnn.allow_tf32 = False). (These numbers are NOT PRIVATE.)"
    )
