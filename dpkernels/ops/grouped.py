"""Weighted sums of many layers in one call, with noise and division as its epilogue."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dpkernels.ops import _check, _library, bias, conv, embedding, linear, lora, norm
from dpkernels.ops.sweep import check_secrets

KINDS = ("linear", "bias", "lora", "embedding", "layer_norm", "depthwise_conv1d")
_TENSOR_OPTIONS = ("hs", "dhs")

_MOST_COMPARED = 16
"""Layers that others are compared with: to compare with more would cost more than to check."""


def _check_ids(
    xs: list[Tensor], gs: list[Tensor], kinds: list[str], factors: Tensor, outs: list[Tensor], *rest: object
) -> None:
    """Embedding ids lie in their tables, looked at where looking is free."""
    for i, (kind, place) in enumerate(zip(kinds, layout(kinds), strict=False)):
        if kind == "embedding":
            embedding._check_ids(xs[i], gs[i], factors, outs[place])


_clip_and_noise = _library.define(
    "clip_and_noise",
    "(Tensor[] xs, Tensor[] gs, str[] kinds, Tensor factors, Tensor(a!)[] outs, Tensor[] hs, Tensor[] dhs, "
    "float[] scalings, int[] padding_idxs, int[] strides, int[] paddings, int[] dilations, Tensor key, "
    "Tensor nonces, float noise_scale, float grid, float divisor) -> ()",
    fake=lambda *args, **kwargs: None,
    check=_check_ids,
)


def layout(kinds: Sequence[str]) -> list[int]:
    """The place of every layer's first out, and their number at the end: LoRA layers have two, the others one."""
    places = [0]
    for kind in kinds:
        places.append(places[-1] + (2 if kind == "lora" else 1))
    return places


def clip_and_noise(
    xs: Sequence[Tensor],
    gs: Sequence[Tensor],
    kinds: Sequence[str],
    factors: Tensor,
    outs: Sequence[Tensor],
    *,
    hs: Sequence[Tensor] = (),
    dhs: Sequence[Tensor] = (),
    scalings: Sequence[float] = (),
    padding_idxs: Sequence[int] = (),
    strides: Sequence[int] = (),
    paddings: Sequence[int] = (),
    dilations: Sequence[int] = (),
    key: bytes | None = None,
    nonces: Sequence[bytes] = (),
    noise_scale: float = 0.0,
    grid: float = 0.0,
    divisor: float = 1.0,
) -> None:
    """Add every layer's clipped gradients to its sum, in place; at the end of a step also noise them and divide.

    For each layer l of kind k, `k_weighted_sum`: out_l += Σ_i c_i g_iᵀx_i and its like. On a CPU the layers are shared
    out among the threads in one loop, with the same bits; on a GPU LoRA layers and vectors are one launch for all,
    whose float64 additions have another order. Then, where `key` is given, once a logical batch:

        out = round((out + noise_scale·z)/grid)·grid/divisor          in float64; without a grid, nothing is rounded

    with z the normals that `chacha20_normal` makes of key and that out's nonce.

    Args:
        xs: one a layer, all with the same B: layer inputs; ids for an embedding, x̂ for a layer_norm; a bias's is not
            read (give its g).
        gs: one a layer: gradients of the layers' outputs.
        kinds: one a layer, of KINDS.
        factors: [B] float32, c_i from `clip_factors`; a sample with factor 0 is not read.
        outs: one a layer, in its parameter's shape; for a LoRA layer two, A's and B's. All contiguous, of one dtype:
            float64, or float32 where no noise is asked for. None may overlap another.
        hs, dhs, scalings: one for each LoRA layer, as `lora_weighted_sum` takes them.
        padding_idxs: one for each embedding; -1 for none.
        strides, paddings, dilations: one for each depthwise_conv1d.
        key: 32 bytes, secret; None: no epilogue.
        nonces: 12 bytes for each out; a (key, nonce) is never to be used twice.
        noise_scale: standard deviation of the noise, ≥ 0.
        grid: a power of two, or 0.
        divisor: the expected batch size, > 0.

    Raises:
        TypeError: dtypes that do not fit; a key or nonce that is not bytes.
        ValueError: lists of lengths that do not fit, an unknown kind, an out given twice; and what the layers' own
            weighted sums raise.

    Source: Bu et al. 2022, arXiv:2210.00038 (book-keeping); Abadi et al. 2016, arXiv:1607.00133, algorithm 1.
    """
    options: dict[str, dict[str, Sequence[Any]]] = {
        "lora": {"hs": hs, "dhs": dhs, "scalings": scalings},
        "embedding": {"padding_idxs": padding_idxs},
        "depthwise_conv1d": {"strides": strides, "paddings": paddings, "dilations": dilations},
    }
    check_lists(kinds, {"xs": xs, "gs": gs}, options, outs)
    places = layout(kinds)
    for i, own in unlike_layers(kinds, xs, gs, options, outs):
        kind, mine, taps = kinds[i], outs[places[i] : places[i + 1]], 1
        if kind == "depthwise_conv1d":
            _check.shape("out", mine[0], (None, 1, None), "[C, 1, k]")
            taps = mine[0].shape[2]
        elif kind == "embedding":
            _check.shape("out", mine[0], (None, gs[i].shape[2]), "[V, d]")
        check_layer(kind, xs[i], gs[i], own, taps, mine[0].shape[0] if kind == "embedding" else None)
        if xs[i].shape[:1] != factors.shape:
            raise ValueError(
                f"xs[{i}]: expected a batch of {len(factors)}, as factors has; given {list(xs[i].shape)}; "
                "pass one micro-batch"
            )
        _check.weighted_sum(factors, gs[i], **_outs_of(kind, xs[i], gs[i], mine))
    _check_outs(outs, noised=key is not None)
    secrets = (torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8))
    if key is not None:
        secrets = check_secrets(outs, key, nonces, (), noise_scale, grid, divisor)[:2]
    if not kinds:
        return
    _clip_and_noise(
        list(xs), list(gs), list(kinds), factors, list(outs), list(hs), list(dhs), [float(s) for s in scalings],
        list(padding_idxs), list(strides), list(paddings), list(dilations), *secrets, float(noise_scale), float(grid),
        float(divisor),
    )  # fmt: skip
    torch.autograd.graph.increment_version(list(outs))


def check_lists(
    kinds: Sequence[str],
    layers: dict[str, Sequence[object]],
    options: Mapping[str, Mapping[str, Sequence[object]]],
    outs: Sequence[object] | None = None,
) -> None:
    """Known kinds, and lists of as many entries as there are layers (of a kind, of parameters) to them."""
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"kinds: given {kind!r}; pass one of {', '.join(KINDS)} a layer")
    expected = [(name, values, len(kinds), "layer") for name, values in layers.items()]
    if outs is not None:
        expected.append(("outs", outs, layout(kinds)[-1], "parameter"))
    for kind, lists in options.items():
        expected += [
            (name, values, list(kinds).count(kind), f"{kind} layer") for name, values in lists.items()
        ]
    for name, values, count, what in expected:
        if len(values) != count:
            raise ValueError(f"{name}: expected {count}, one a {what}; given {len(values)}; pass one each")


def unlike_layers(
    kinds: Sequence[str],
    xs: Sequence[Tensor],
    gs: Sequence[Tensor],
    options: Mapping[str, Mapping[str, Sequence[Any]]],
    outs: Sequence[Tensor] = (),
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The layers that have to be checked, as (place, its options): those not like one that was.

    A check sees a tensor's shape, dtype and device, and the other options as they are, so layers that agree in these
    pass or fail together; and a model has hundreds of layers, but a handful of shapes. (192 LoRA layers:
    3.8 ms of Python for norms and sums on one core, in place of 5.9.)
    """
    seen: list[tuple[object, ...]] = []  # not a set: symbolic sizes have no hash
    of_kind, places = dict.fromkeys(KINDS, 0), layout(kinds)
    for i, kind in enumerate(kinds):
        n = of_kind[kind]
        of_kind[kind] += 1
        own = {name: values[n] for name, values in options[kind].items()} if kind in options else {}
        tensors = [xs[i], gs[i], *outs[places[i] : places[i + 1]]]
        tensors += [own[name] for name in _TENSOR_OPTIONS if name in own]
        like = (
            kind,
            [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors],
            [value for name, value in own.items() if name not in _TENSOR_OPTIONS],
        )
        if like not in seen:
            if len(seen) < _MOST_COMPARED:
                seen.append(like)
            yield i, own


def check_layer(
    kind: str, x: Tensor, g: Tensor, options: Mapping[str, Any], taps: int, rows: int | None = None
) -> None:
    """The inputs of a layer, as its own ops check them; options: of its kind, by the names of the lists.

    rows: of an embedding's table, where it is known.
    """
    if kind == "linear":
        linear.check_pair(x, g, None)
    elif kind == "bias":
        bias._check_gradient(g, None)
    elif kind == "lora":
        lora._check_inputs(x, options["hs"], g, options["dhs"], options["scalings"], None)
    elif kind == "embedding":
        embedding._check_inputs(x, g, options["padding_idxs"], rows)
    elif kind == "layer_norm":
        norm._check_inputs(x, g, None)
    else:
        conv._check_inputs(x, g, taps, options["strides"], options["paddings"], options["dilations"])


def _outs_of(
    kind: str, x: Tensor, g: Tensor, outs: Sequence[Tensor]
) -> dict[str, tuple[Tensor, tuple[int, ...], str]]:
    """The outs of a layer with the shapes they must have."""
    if kind == "lora":
        rank = outs[0].shape[0] if outs[0].dim() else 0
        return {
            "out_a": (outs[0], (rank, x.shape[2]), "[r, d]"),
            "out_b": (outs[1], (g.shape[2], rank), "[p, r]"),
        }
    if kind == "linear":
        return {"out": (outs[0], (g.shape[2], x.shape[2]), "[p, d]")}
    if kind == "embedding":
        return {"out": (outs[0], tuple(outs[0].shape), "[V, d]")}
    if kind == "depthwise_conv1d":
        return {"out": (outs[0], (x.shape[1], 1, outs[0].shape[2]), "[C, 1, k]")}
    return {"out": (outs[0], (g.shape[2],), "[p]" if kind == "bias" else "[d]")}


def _check_outs(outs: Sequence[Tensor], *, noised: bool) -> None:
    dtype, device = (outs[0].dtype, outs[0].device) if outs else (None, None)
    for i, out in enumerate(outs):
        if not out.is_contiguous():
            raise ValueError(
                f"outs[{i}]: expected a contiguous tensor; given strides {out.stride()}; copy it"
            )
        if out.dtype != dtype:
            raise TypeError(f"outs[{i}]: expected {dtype}, as outs[0] has; given {out.dtype}; convert it")
        if noised and out.dtype != torch.float64:
            raise TypeError(
                f"outs[{i}]: expected float64, as noise is asked for; given {out.dtype}; convert it"
            )
        if out.device != device:
            _check.same_device(**{"outs[0]": outs[0], f"outs[{i}]": out})
    if not any(isinstance(out, torch._subclasses.FakeTensor) for out in outs):
        spans = sorted((out.data_ptr(), out.data_ptr() + out.nbytes) for out in outs if out.numel())
        if any(end > start for (_, end), (start, _) in pairwise(spans)):
            raise ValueError(
                "outs: expected tensors that do not overlap; given two that do; merge the layers' records"
            )
