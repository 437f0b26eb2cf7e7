"""Frozen batch norms: torch's three, and subclasses that call torch's batch norm (timm's BatchNormAct2d).

As in the other norms, the backward sums the gradients of weight and bias over time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from dpkernels.nn.recording.module import GhostModule, named_modules
from dpkernels.nn.recording.records import BiasRecord, NormRecord
from dpkernels.nn.tensors import accumulation_dtype, no_autocast
from dpkernels.nn.thin import is_thin


class FrozenBatchNorm(GhostModule, _BatchNorm):
    """Batch norm that always normalises with its running statistics, in training mode too, and never
    updates them.

    y = (x − mean)/√(var + ε)·weight + bias, so a sample's output does not depend on the rest of its batch.
    The weight and bias can be trained. The state_dict is that of the batch norm that it replaces;
    `freeze_batch_norm` creates it.

    The forward raises ValueError without running statistics (track_running_stats=False).
    """

    ghost_channels_second = True
    ghost_forms = ("weight", "bias")
    ghost_in_graph = True

    def forward(self, input: Tensor) -> Tensor:
        """input [B,C,*] (or [B,C]) -> the same shape."""
        if self.running_mean is None or self.running_var is None:
            raise ValueError(
                f"{self.ghost_label()!r}: a batch norm without running statistics cannot be frozen; "
                "use track_running_stats=True, or another norm"
            )
        self._check_input_dim(input)
        if self._ghost_active(self.weight, self.bias):
            return _FrozenBatchNorm.apply(input, self.weight, self.bias, self)
        return self._normalise(input, self.weight, self.bias)

    def _normalise(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps)


class FrozenBatchNorm1d(FrozenBatchNorm, nn.BatchNorm1d):
    """FrozenBatchNorm for [B,C] and [B,C,T]."""


class FrozenBatchNorm2d(FrozenBatchNorm, nn.BatchNorm2d):
    """FrozenBatchNorm for [B,C,H,W]."""


class FrozenBatchNorm3d(FrozenBatchNorm, nn.BatchNorm3d):
    """FrozenBatchNorm for [B,C,D,H,W]."""


class FrozenOwnBatchNorm(FrozenBatchNorm):
    """A frozen batch norm with its own forward, which always runs as in evaluation mode.

    The layer records that forward's call of torch.nn.functional.batch_norm with the module's statistics. The code
    before and after it (an activation, another layout) runs unchanged. `freeze_batch_norm` creates these classes.

    The forward raises RuntimeError if that call has another weight, bias, ε or mode than the module's.
    """

    own_class: ClassVar[type[nn.Module]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original class's in evaluation mode."""
        training, self.training = self.training, False
        try:
            if not self._ghost_active(self.weight, self.bias):
                return self.own_class.forward(self, *args, **kwargs)
            with _ReplacedCall(self, lambda x: _FrozenBatchNorm.apply(x, self.weight, self.bias, self)):
                return self.own_class.forward(self, *args, **kwargs)
        finally:
            self.training = training

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As nn.Module's, but the copy creates the class again, which cannot be found by name."""
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, (self.own_class,), *state


def _new(own_class: type[nn.Module]) -> nn.Module:
    frozen = _frozen_class(own_class)
    return frozen.__new__(frozen)


class _ReplacedCall(TorchFunctionMode):
    """Within this context `replacement` replaces `layer`'s call of F.batch_norm; other calls stay unchanged."""

    def __init__(self, layer: _BatchNorm, replacement: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.replacement, self.calls = layer, replacement, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.batch_norm:
            return func(*args, **kwargs)
        x, mean, var = args
        layer = self.layer
        if mean is not layer.running_mean or var is not layer.running_var:
            return func(*args, **kwargs)
        given = (kwargs["weight"], kwargs["bias"])
        if given[0] is not layer.weight or given[1] is not layer.bias:
            raise RuntimeError("its forward calls batch_norm with another weight or bias than its own")
        if kwargs["training"] or kwargs["eps"] != layer.eps:
            raise RuntimeError(
                "its forward calls batch_norm in training mode or with another eps while it evaluates"
            )
        self.calls += 1
        return self.replacement(x)


_FROZEN: dict[type[nn.Module], type[FrozenBatchNorm]] = {
    nn.BatchNorm1d: FrozenBatchNorm1d,
    nn.BatchNorm2d: FrozenBatchNorm2d,
    nn.BatchNorm3d: FrozenBatchNorm3d,
}
# subclass of a batch norm -> the frozen class created for it
_FROZEN_OWN: dict[type[nn.Module], type[FrozenBatchNorm]] = {}


def freeze_batch_norm(model: nn.Module) -> nn.Module:
    """BatchNorm1d/2d/3d -> FrozenBatchNorm1d/2d/3d, and subclasses -> FrozenOwnBatchNorm, in place; returns `model`.

    A subclass keeps its forward, which then also runs in training as in evaluation mode (timm's BatchNormAct2d).

    Raises ValueError naming a batch norm that cannot be frozen: it has no running statistics, it belongs to another
    class (SyncBatchNorm has no meaning with frozen statistics: convert it first), or it is a subclass whose forward
    does not normalise by torch.nn.functional.batch_norm, uses its weight elsewhere or mixes the samples.
    """
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm) or isinstance(module, FrozenBatchNorm):
            continue
        reason = freezing_refusal(module)
        if reason is not None:
            raise ValueError(f"freeze_batch_norm: {name!r} ({type(module).__name__}): {reason}")
        module.__class__ = _FROZEN.get(type(module)) or _frozen_class(type(module))
    return model


def _frozen_class(own_class: type[nn.Module]) -> type[FrozenBatchNorm]:
    if own_class not in _FROZEN_OWN:
        body = {"__module__": own_class.__module__, "own_class": own_class}
        name = f"Frozen{own_class.__name__}"
        _FROZEN_OWN[own_class] = type(name, (FrozenOwnBatchNorm, own_class), body)
    return _FROZEN_OWN[own_class]


def freezing_refusal(module: _BatchNorm) -> str | None:
    """Why this batch norm cannot be frozen, with the fix; None if it can."""
    base = next((c for c in type(module).__mro__ if c in _FROZEN), None)
    if base is None:
        return "not a subclass of nn.BatchNorm1d, 2d or 3d; replace it by nn.BatchNorm*d"
    if module.running_mean is None:
        return "no running statistics (track_running_stats=False); use track_running_stats=True"
    obstacle = _forward_obstacle(module, _SPACE[base], is_thin(type(module), base))
    return obstacle and f"a subclass whose forward {obstacle}; replace it by nn.BatchNorm*d"


_SPACE: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (2,),
    nn.BatchNorm2d: (2, 2),
    nn.BatchNorm3d: (2, 2, 2),
}


def _forward_obstacle(module: _BatchNorm, space: tuple[int, ...], thin: bool) -> str | None:
    """Why the forward of a subclass cannot be frozen, from a run on noise; None if it can be.

    The run uses copies of the module's tensors, so the module does not change. A thin subclass may take another layout
    than torch's and raise for the noise; that is accepted, since its code was checked.
    """
    assert module.running_mean is not None
    state = {name: t.detach().clone() for name, t in (*module.named_parameters(), *module.named_buffers())}
    before = {name: t.clone() for name, t in state.items()}
    affine = [
        state[name].requires_grad_() for name in ("weight", "bias") if getattr(module, name) is not None
    ]
    x = torch.rand(2, module.num_features, *space).to(module.running_mean).requires_grad_()
    modes = [(part, part.training) for part in module.modules()]
    replaced = _ReplacedCall(module, lambda x: x * 1.0)
    module.eval()
    try:
        with torch.enable_grad(), replaced:
            y = functional_call(module, state, (x,))
    except Exception as error:  # noqa: BLE001  any error is the reason
        return None if thin else f"raises for an input of {list(x.shape)}: {error}"
    finally:
        for part, training in modes:
            part.training = training
    if not replaced.calls or not isinstance(y, Tensor):
        return "does not normalise by torch.nn.functional.batch_norm with its own statistics"
    others = torch.autograd.grad(y.sum(), affine, allow_unused=True, retain_graph=True) if affine else ()
    if any(gradient is not None for gradient in others):
        return "uses its weight or bias for more than batch_norm"
    if y.is_meta:
        return None
    (gradient,) = torch.autograd.grad(y[0].sum(), x)
    if bool(gradient[1].any()):
        return "mixes the samples of a batch"
    if any(not torch.equal(state[name], t) for name, t in before.items()):
        return "changes its parameters or buffers in evaluation mode"
    return None


def batch_norms_in_training(model: nn.Module) -> list[str]:
    """Names of the batch norms that mix the samples of a batch: in training mode, or without statistics."""
    return [name for name, module in named_modules(model) if mixes_samples(module)]


def mixes_samples(module: nn.Module) -> bool:
    """Whether the module is a batch norm in training mode, or without statistics."""
    return (
        isinstance(module, _BatchNorm)
        and not isinstance(module, FrozenBatchNorm)
        and (module.training or module.running_mean is None)
    )


class _FrozenBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: FrozenBatchNorm) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.tape, ctx.layer, ctx.weight, ctx.bias = layer.ghost_tape, layer, weight, bias
        ctx.save_for_backward(
            x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None
        )
        return layer._normalise(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return (None,) * 4
        x, weight = ctx.saved_tensors
        layer, dx = ctx.layer, None
        with no_autocast(g.device.type):
            wide = accumulation_dtype(g)
            channels = (1, -1, *(1,) * (g.dim() - 2))
            scale = torch.rsqrt(layer.running_var.to(wide) + layer.eps)
            if ctx.needs_input_grad[0]:
                dx = (g * (scale * weight.to(wide)).view(channels)).to(g.dtype)
            over_time = g.to(wide).flatten(2) if g.dim() > 2 else g.to(wide).unsqueeze(2)
            if x is not None:
                x_hat = (x.to(wide) - layer.running_mean.to(wide).view(channels)) * scale.view(channels)
                total = (x_hat.view(over_time.shape) * over_time).sum(2)
                ctx.tape.add(NormRecord(layer.ghost_label(), ctx.weight, total))
            if ctx.bias is not None and ctx.needs_input_grad[2]:
                ctx.tape.add(BiasRecord(layer.ghost_label(), ctx.bias, over_time.sum(2)))
        return dx, None, None, None
