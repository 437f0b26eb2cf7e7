"""The fused noise-and-optimizer step: one pass adds noise, divides, updates the parameters and clears the sums.

The ops' schemas take the key as a tensor, not as bytes: a graph stores a reference to a tensor, not its value.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from dpkernels.ops import _check, _library
from dpkernels.ops._secrets import check_secrets

PARAMETER_DTYPES = (torch.float32, torch.bfloat16)

_NOISE = (
    "Tensor key, Tensor nonces, Tensor rounding_nonces, float noise_scale, float grid, float divisor, "
    "bool maximize"
)


def _fake(*args: object, **kwargs: object) -> None:
    """Return nothing."""


_noise_adamw = _library.define(
    "noise_adamw",
    "(Tensor(a!)[] params, Tensor(b!)[] sums, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, "
    f"Tensor(e!)[] grads, float[] steps, {_NOISE}, float lr, float beta1, float beta2, float eps, "
    "float weight_decay, bool decoupled) -> ()",
    fake=_fake,
)
_noise_sgd = _library.define(
    "noise_sgd",
    "(Tensor(a!)[] params, Tensor(b!)[] sums, Tensor(c!)[] momentum_buffers, Tensor(d!)[] grads, float[] steps, "
    f"{_NOISE}, float lr, float momentum, float dampening, float weight_decay, bool nesterov) -> ()",
    fake=_fake,
)


def noise_adamw(
    params: Sequence[Tensor],
    sums: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[float],
    *,
    key: bytes,
    nonces: Sequence[bytes],
    noise_scale: float,
    divisor: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    maximize: bool = False,
    grid: float = 0.0,
    grads: Sequence[Tensor] = (),
    rounding_nonces: Sequence[bytes] = (),
) -> None:
    """Add noise to the sums, divide them, take an AdamW (or Adam) step with them in place, and set the sums to 0.

    For every entry, with z = `chacha20_normal(n, key=key, nonce=nonces[i])` for tensor i,

        g = round((sum + noise_scale·z)/grid)·grid/divisor                      float64, then rounded to float32
        g ← g + weight_decay·p (Adam),   or   p ← (1 - lr·weight_decay)·p (AdamW)
        m ← β₁m + (1 - β₁)g,   v ← β₂v + (1 - β₂)g²,   p ← p - lr/(1 - β₁ᵗ)·m/(√v/√(1 - β₂ᵗ) + eps)    float32

    The result is that of noise followed by `torch.optim.AdamW`, up to rounding. Each buffer is read once and written
    once. The bits are the same for every number of threads; those of native code also on every CPU and GPU.

    Args:
        params: float32 or bfloat16, contiguous, of any shapes, all on one device.
        sums: float64, of the params' shapes: the sums of clipped gradients. Set to 0.
        exp_avgs, exp_avg_sqs: float32, of the params' shapes: m and v.
        steps: t of each tensor, counted from 1 and including this step.
        key: 32 bytes, secret.
        nonces: 12 bytes each; never use a (key, nonce) twice.
        noise_scale: standard deviation of the noise on the sum, in the sum's units; 0: no noise is drawn.
        divisor: the expected batch size, > 0.
        lr, beta1, beta2, eps, weight_decay: AdamW's.
        decoupled: True for AdamW, False for Adam.
        maximize: whether to ascend.
        grid: a power of two: the noised sum is rounded to a multiple of it, ties to even; 0: no rounding.
        grads: empty, or tensors of the params' shapes and dtypes that receive g.
        rounding_nonces: empty, or 12 bytes each, also never used twice: bfloat16 params are then rounded stochastically
            by 16 bits of that stream an entry, up with the probability that makes the expectation exact.

    Raises:
        TypeError: a dtype does not fit, or key or nonces are not bytes.
        ValueError: lengths, shapes or devices differ, a tensor is not contiguous, or a number is out of range.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101; Abadi et al. 2016, arXiv:1607.00133, algorithm 1.
    """
    states = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    _check_lists(params, sums, states, grads, steps)
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= value < 1:
            raise ValueError(f"{name}: expected 0 ≤ {name} < 1; given {value}; choose one such as 0.9")
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        _check.finite(name, value)
    if not params:
        return
    noise = check_secrets(params, key, nonces, rounding_nonces, noise_scale, grid, divisor)
    lists = [list(tensors) for tensors in (params, sums, exp_avgs, exp_avg_sqs, grads)]
    hyper = [float(value) for value in (lr, beta1, beta2, eps, weight_decay)]
    _noise_adamw(*lists, [float(step) for step in steps], *noise, maximize, *hyper, decoupled)
    _written(*lists)


def noise_sgd(
    params: Sequence[Tensor],
    sums: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    steps: Sequence[float],
    *,
    key: bytes,
    nonces: Sequence[bytes],
    noise_scale: float,
    divisor: float,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    grid: float = 0.0,
    grads: Sequence[Tensor] = (),
    rounding_nonces: Sequence[bytes] = (),
) -> None:
    """Add noise to the sums, divide them, take an SGD step with them in place, and set the sums to 0.

    For every entry, with g as in `noise_adamw`, in float32

        g ← g + weight_decay·p
        b ← momentum·b + (1 - dampening)·g   (b ← g in a buffer's first step),   g ← b, or g + momentum·b (nesterov)
        p ← p - lr·g

    The result is that of noise followed by `torch.optim.SGD`, up to rounding.

    Args:
        params, sums, key, nonces, noise_scale, divisor, maximize, grid, grads, rounding_nonces: as in `noise_adamw`.
        momentum_buffers: float32, of the params' shapes: b. Empty if momentum is 0; zeros before the first step.
        steps: 1 for a buffer that has not been written, more for one that has.
        lr, momentum, dampening, weight_decay, nesterov: SGD's.

    Raises:
        TypeError: a dtype does not fit, or key or nonces are not bytes.
        ValueError: lengths, shapes or devices differ, a tensor is not contiguous, or a number is out of range.

    Source: Sutskever et al. 2013, ICML; Abadi et al. 2016, arXiv:1607.00133, algorithm 1.
    """
    states = {"momentum_buffers": momentum_buffers} if momentum != 0 else {}
    _check_lists(params, sums, states, grads, steps)
    if momentum == 0 and momentum_buffers:
        raise ValueError(
            f"momentum_buffers: expected none; given {len(momentum_buffers)}, but momentum is 0; pass []"
        )
    for name, value in (
        ("lr", lr),
        ("momentum", momentum),
        ("dampening", dampening),
        ("weight_decay", weight_decay),
    ):
        _check.finite(name, value)
    if not params:
        return
    noise = check_secrets(params, key, nonces, rounding_nonces, noise_scale, grid, divisor)
    lists = [list(tensors) for tensors in (params, sums, momentum_buffers, grads)]
    hyper = [float(value) for value in (lr, momentum, dampening, weight_decay)]
    _noise_sgd(*lists, [float(step) for step in steps], *noise, maximize, *hyper, nesterov)
    _written(*lists)


def _check_lists(
    params: Sequence[Tensor],
    sums: Sequence[Tensor],
    states: dict[str, Sequence[Tensor]],
    grads: Sequence[Tensor],
    steps: Sequence[float],
) -> None:
    given: dict[str, Sequence[object]] = {"sums": sums, "steps": steps, **states}
    if grads:
        given["grads"] = grads
    for name, values in given.items():
        if len(values) != len(params):
            raise ValueError(
                f"{name}: expected {len(params)}, as many as params; given {len(values)}; pass one a parameter"
            )
    for step in steps:
        if not (math.isfinite(step) and step >= 1):
            raise ValueError(f"steps: expected numbers ≥ 1; given {step}; count this step too")
    wide = {"sums": (sums, torch.float64)} | {
        name: (tensors, torch.float32) for name, tensors in states.items()
    }
    # A model may have a thousand parameters, so the message is computed only for one that does not fit.
    shapes = [param.shape for param in params]
    device = params[0].device if params else None
    lists = {"params": (params, None), **wide} | ({"grads": (grads, None)} if grads else {})
    dtypes = [param.dtype for param in params]
    fit = all(dtype in PARAMETER_DTYPES for dtype in dtypes) and all(
        [tensor.dtype for tensor in tensors] == (dtypes if dtype is None else [dtype] * len(params))
        and [tensor.shape for tensor in tensors] == shapes
        and all(tensor.device == device and tensor.is_contiguous() for tensor in tensors)
        for tensors, dtype in lists.values()
    )
    if not fit:
        for i in range(len(params)):
            _refuse(i, params, wide, grads)
    starts = [_start(tensor) for tensors, _ in lists.values() for tensor in tensors if tensor.numel()]
    if len(set(starts)) != len(starts):
        _refuse_shared({name: tensors for name, (tensors, _) in lists.items()})


def _start(tensor: Tensor) -> object:
    """Return the start of a tensor's memory: its address, or its storage and offset if it has no address."""
    if type(tensor) in (Tensor, Parameter) and not tensor.is_meta:
        return tensor.data_ptr()
    return tensor.untyped_storage()._cdata, tensor.storage_offset()  # a fake or meta tensor has no memory


def _refuse_shared(lists: dict[str, Sequence[Tensor]]) -> None:
    """Raise for the first tensor that starts at the address of another."""
    places: dict[object, str] = {}
    for i in range(len(lists["params"])):
        for label, tensors in lists.items():
            name, place = f"{label}[{i}]", _start(tensors[i])
            if tensors[i].numel() and places.setdefault(place, name) != name:
                raise ValueError(
                    f"{name}: expected separate memory; given that of {places[place]}, which would be written twice; "
                    "pass a tied parameter once"
                )


def _refuse(
    i: int,
    params: Sequence[Tensor],
    wide: dict[str, tuple[Sequence[Tensor], torch.dtype]],
    grads: Sequence[Tensor],
) -> None:
    """Raise for the first of parameter i's tensors that does not fit."""
    param = params[i]
    if param.dtype not in PARAMETER_DTYPES:
        raise TypeError(
            f"params[{i}]: expected float32 or bfloat16; given {param.dtype}; convert it, or call noise_sums and "
            "torch's optimizer"
        )
    dense = {f"params[{i}]": param}
    for name, (tensors, dtype) in wide.items():
        if tensors[i].dtype != dtype:
            raise TypeError(f"{name}[{i}]: expected {dtype}; given {tensors[i].dtype}; convert it")
        dense[f"{name}[{i}]"] = tensors[i]
    if grads:
        if grads[i].dtype != param.dtype:
            raise TypeError(
                f"grads[{i}]: expected {param.dtype}, as params[{i}] has; given {grads[i].dtype}; convert it"
            )
        dense[f"grads[{i}]"] = grads[i]
    _check.same_device(**({"params[0]": params[0]} | dense))
    for name, tensor in dense.items():
        _check.shape(name, tensor, tuple(param.shape), f"params[{i}]'s shape")
        if not tensor.is_contiguous():
            raise ValueError(
                f"{name}: expected a contiguous tensor; given strides {tensor.stride()}; copy it"
            )


def _written(*lists: Sequence[Tensor]) -> None:
    """Tell autograd that the tensors changed, so that a backward with their saved values raises."""
    torch.autograd.graph.increment_version([tensor for tensors in lists for tensor in tensors])
