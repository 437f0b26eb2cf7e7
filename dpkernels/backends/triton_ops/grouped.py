"""Norms and weighted sums of many layers, with common launches for LoRA, narrow linear layers and per-sample vectors.

For most of these layers, a launch takes the host longer than the kernel takes the GPU. So one launch of a kind computes
all layers with a few columns on one side, and all materialised gradients; the op of its own family computes each other
layer. Each call sends addresses; the list of pieces depends on shapes only, and is cached.

A norm's bound covers all kernels of `configs.SUMS`, so it holds for each of them.
"""

import functools
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from dpkernels.backends import registry
from dpkernels.backends.layer import GroupedLayer
from dpkernels.backends.torch_ops.grouped import add_layer, norms_of
from dpkernels.backends.triton_ops import bounds, configs, tensor_cores
from dpkernels.backends.triton_ops.grouped_kernels import (
    add_columns,
    finish_group,
    grouped_norms,
    grouped_sums,
    grouped_vector_norms,
    grouped_vector_sums,
)
from dpkernels.backends.triton_ops.launching import (
    aligned,
    architecture,
    dense,
    float64_int,
    in_pairs,
    is_long,
    launch,
    rows,
    scratch,
    tile_of,
    tiles,
    upcast,
)
from dpkernels.backends.triton_ops.lora import rank_columns

_NARROW = 32
"""The largest number of columns of a narrow side of a linear layer."""

_FEWEST_PROGRAMS = 256
"""With fewer programs, sums are computed layer by layer: a program adds all samples of a piece, and few programs would
leave the GPU idle."""

_GROUPED = (torch.bfloat16, torch.float16, torch.float32)

_TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


class Form(NamedTuple):
    """The common part of all problems of one shape: a model has hundreds of layers but few forms.

    Attributes:
        kernel: the kernel that computes the problems.
        kind: the common properties of one launch: dtypes of tensors and out, ALIGN of wide and narrow, R.
        pieces: the number of pieces of BN columns in a problem.
        before, after: the fields of a table row before and after the first piece; addresses precede both.
    """

    kernel: Any
    kind: tuple[Any, ...]
    pieces: int
    before: tuple[int, ...]
    after: tuple[int, ...]


def _form(
    kernel: Any, wide: Tensor, narrow: Tensor | None, scaling: float, out: Tensor | None, by_columns: bool
) -> Form | None:
    """Return the form of a problem, or None if it cannot share a launch.

    kernel: the kernel that computes it, which determines BN. by_columns: whether out is [n, r] and not [r, n].
    """
    if not wide.numel() or (narrow is not None and not narrow.numel()):
        return None
    (_, wide_b, wide_t, _, width), w_align = rows(wide)
    n_align, columns, rank_tiles, strides = 0, 0, 1, (1, 0)
    narrow_b, narrow_t, rank = 0, 0, 0
    if narrow is not None:
        (_, narrow_b, narrow_t, _, rank), n_align = rows(narrow)
        entries = narrow.shape[2]
        columns = rank_columns(entries)
        rank_tiles = tiles(entries, columns)
        strides = (entries, 1) if by_columns else (1, wide.shape[2])
    if w_align == 0 or (narrow is not None and n_align == 0):
        return None
    strip = tile_of(kernel, wide, "BN", w_align > 1 or narrow is None)
    pieces = tiles(wide.shape[2], strip) * rank_tiles
    return Form(
        kernel,
        (wide.dtype, None if out is None else out.dtype, w_align, n_align, columns),
        pieces,
        (wide_b, wide_t, width, narrow_b, narrow_t, rank, wide.shape[1], rank_tiles),
        (pieces, *strides, float64_int(scaling)),
    )


class Problem(NamedTuple):
    """wideᵀ narrow of every sample, times a scaling; a vector has no narrow.

    Attributes:
        form: the part in common with other problems.
        wide: the [B, T, n] tensor, which starts at a multiple of 16 bytes.
        narrow: the [B, T, r] tensor, which starts at such a multiple too.
        out: contiguous [n, r], [r, n] or [n], to which the sum is added.
    """

    form: Form
    wide: Tensor
    narrow: Tensor | None
    out: Tensor | None

    def fields(self, first: int) -> list[int]:
        """Return the problem's row of the table, with its first piece."""
        form, wide, narrow, out = self
        narrow_address = 0 if narrow is None else narrow.data_ptr()
        out_address = 0 if out is None else out.data_ptr()
        return [wide.data_ptr(), narrow_address, out_address, *form.before, first, *form.after]


@dataclass
class Group:
    """The problems of one kind, which one launch computes."""

    problems: list[Problem] = field(default_factory=list)

    @property
    def like(self) -> Tensor:
        """A tensor of the group's device and dtype."""
        return self.problems[0].wide

    @property
    def kernel(self) -> Any:
        """The group's kernel."""
        return self.form.kernel

    @property
    def form(self) -> Form:
        """The form of the first problem; all problems have its kind and kernel."""
        return self.problems[0].form

    @property
    def vectors(self) -> bool:
        """Whether the problems have no narrow side."""
        return bool(self.form.kind[4] == 0)

    def constants(self, *, sums: bool) -> dict[str, Any]:
        """Return the constexprs of the group's kernel."""
        dtype, out, w_align, n_align, columns = self.form.kind
        constexprs = {"DTYPE": _TYPES[dtype], "W_ALIGN": w_align}
        if sums:
            assert out is not None
            constexprs["OUT_DTYPE"] = _TYPES[out]
        if columns:
            constexprs |= {"N_ALIGN": n_align, "R": columns, "UPCAST": upcast(self.like)}
        return constexprs

    @property
    def aligned(self) -> bool:
        """Whether the configuration is that of aligned tensors."""
        return self.vectors or bool(self.form.kind[2] > 1)

    @property
    def pieces(self) -> int:
        """The number of pieces of all problems, which is the number of programs of a sum."""
        return sum(problem.form.pieces for problem in self.problems)

    def tables(self) -> tuple[Tensor, Tensor]:
        """(work [pieces, 2] int32, table [problems, FIELDS] int64) on the device."""
        lines: list[int] = []
        counts, begins, total, before = [], [], 0, (0, 0)
        for problem in self.problems:
            row = problem.fields(total)
            lines += row
            pieces = problem.form.pieces
            counts.append(pieces)
            total += pieces
            # Problems in a row that read one tensor are done side by side, so that it comes from the cache.
            reads = (row[0], pieces)
            begins.append(reads != before)
            before = reads
        table = torch.frombuffer(array("q", lines), dtype=torch.int64)
        device = self.like.device
        if device.type == "cuda":
            table = table.pin_memory().to(device, non_blocking=True)
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        return _work(tuple(counts), tuple(begins), device, stream), table


@functools.lru_cache(maxsize=64)
def _work(counts: tuple[int, ...], begins: tuple[bool, ...], device: torch.device, stream: int) -> Tensor:
    """Return (problem, piece) [pieces, 2] int32. A problem that does not begin a set alternates with those before it.

    The cache has one entry a stream, because a dropped entry's memory returns to the stream on which it was allocated.
    """
    del stream
    sets: list[list[int]] = []
    for problem, first in enumerate(begins):
        if first:
            sets.append([])
        sets[-1].append(problem)
    work = [
        (problem, piece) for members in sets for piece in range(counts[members[0]]) for problem in members
    ]
    return torch.tensor(work, dtype=torch.int32, device="cpu").view(-1, 2).to(device)


def _groups(problems: Iterable[Problem]) -> list[Group]:
    groups: dict[tuple[Any, ...], Group] = {}
    for problem in problems:
        groups.setdefault(problem.form.kind, Group()).problems.append(problem)
    return list(groups.values())


Pairs = tuple[tuple[Tensor, Tensor | None, float, bool], ...]
"""(wide, narrow or None, scaling, whether out is [n, r]) of each product in a layer's gradients."""


def _of_lora(layer: GroupedLayer) -> Pairs | None:
    x, h, g, dh = layer.tensors
    return (x, dh, 1.0, False), (g, h, layer.options["scaling"], True)


def _of_bias(layer: GroupedLayer) -> Pairs | None:
    (g,) = layer.tensors
    return ((g, None, 1.0, False),) if g.shape[1] == 1 else None


def _of_linear(layer: GroupedLayer) -> Pairs | None:
    x, g = layer.tensors
    if min(x.shape[2], g.shape[2]) > _NARROW:
        return None
    return ((x, g, 1.0, False),) if g.shape[2] <= _NARROW else ((g, x, 1.0, True),)


_PAIRS: dict[str, Callable[[GroupedLayer], Pairs | None]] = {
    "lora": _of_lora,
    "bias": _of_bias,
    "linear": _of_linear,
}
"""For each kind, the function that returns a layer's pairs, or None if the op of its family must compute it."""


def _problems(
    layer: GroupedLayer, kernels: tuple[Any, Any], forms: dict[tuple[Any, ...], Form | None]
) -> list[Problem] | None:
    """Return a layer's problems, or None if the op of its family must compute it.

    kernels: those for products and for vectors. forms: a cache of this call's forms.
    """
    of_kind = _PAIRS.get(layer.kind)
    pairs = of_kind(layer) if of_kind and layer.tensors[-1].dtype in _GROUPED else None
    if pairs is None:
        return None
    problems = []
    for i, (wide, narrow, scaling, by_columns) in enumerate(pairs):
        out = layer.outs[i] if layer.outs else None
        wide, narrow = aligned(wide), None if narrow is None else aligned(narrow)
        of_narrow = None if narrow is None else (narrow.shape, narrow.stride())
        of_out = None if out is None else out.dtype
        key = (wide.shape, wide.stride(), wide.dtype, of_narrow, scaling, of_out, by_columns)
        if key not in forms:
            kernel = kernels[1] if narrow is None else kernels[0]
            forms[key] = _form(kernel, wide, narrow, scaling, out, by_columns)
        form = forms[key]
        if form is None or not (out is None or out.is_contiguous()):
            return None
        problems.append(Problem(form, wide, narrow, out))
    return problems


def _split(
    given: Iterable[GroupedLayer], kernels: tuple[Any, Any]
) -> tuple[list[Problem], list[GroupedLayer]]:
    """Return the problems of layers that share launches, and the other layers."""
    problems: list[Problem] = []
    rest: list[GroupedLayer] = []
    grouped: dict[str, bool] = {}
    forms: dict[tuple[Any, ...], Form | None] = {}
    for layer in given:
        if layer.kind not in grouped:
            # Another backend computes the families that it serves, because a norm bounds the sum of its own backend.
            function = registry.implementation(layer.sum_op, layer.device_type)
            grouped[layer.kind] = function.__module__.startswith(__package__)
        layer_problems = _problems(layer, kernels, forms) if grouped[layer.kind] else None
        if layer_problems is None:
            rest.append(layer)
        else:
            problems += layer_problems
    return problems, rest


def _group_norms(group: Group, norms: Tensor, first_column: int) -> None:
    """Write the norms of a group's problems to columns of norms [B, columns], from first_column on."""
    x, batch, pieces = group.like, len(norms), group.pieces
    work, table = group.tables()
    partials = scratch(x, batch, pieces, 2)
    constants = group.constants(sums=False)
    arguments: tuple[Any, ...] = (work, table, partials, pieces)
    sizes, chain, per_term = constants["W_ALIGN"], 1, bounds.ROUNDINGS_FMA
    long = False
    if not group.vectors:
        arguments = (*arguments, 1.0)
        longest = max(problem.wide.shape[1] for problem in group.problems)
        long = constants["LONG"] = is_long(group.kernel, x, group.aligned, longest)
        constants["SMALLEST"] = bounds.smallest(x.dtype)
        sizes *= constants["N_ALIGN"]
        kernels = ("grouped_norms", *configs.SUMS["linear"], *configs.SUMS["lora"])
        chain = configs.largest(kernels, "BT", x.dtype, architecture(x.device))
        per_term = tensor_cores.roundings(x)
    variant = "long" if long else ""
    launch(group.kernel, batch * pieces, x, *arguments, aligned=group.aligned, variant=variant, **constants)
    launch(
        finish_group,
        batch * len(group.problems),
        norms,
        table,
        partials,
        norms,
        len(group.problems),
        pieces,
        norms.shape[1],
        first_column,
        SIZES=sizes,
        ROUNDINGS=bounds.sum_roundings(chain, per_term),
    )


def total_norm_sq(layers: Sequence[GroupedLayer]) -> Tensor:
    """Σ over layers of ‖g_iᵀx_i‖² and its like, rounded up; see `dpkernels.ops.total_norm_sq`."""
    problems, rest = _split(layers, (grouped_norms, grouped_vector_norms))
    alone = [part for layer in rest for part in norms_of(layer)]
    first = layers[0].tensors[0]
    batch = len(first)
    norms = scratch(first, batch, len(problems) + len(alone))
    place = 0
    for group in _groups(problems):
        _group_norms(group, norms, place)
        place += len(group.problems)
    if alone:
        norms[:, place:] = torch.stack(alone, 1)
    out = torch.empty(batch, dtype=torch.float32, device=norms.device)
    launch(add_columns, batch, out, norms, out, norms.shape[1])
    return out


def _group_sums(group: Group, factors: Tensor) -> None:
    work, table = group.tables()
    arguments: tuple[Any, ...] = (work, table, dense(factors), len(factors))
    constants = group.constants(sums=True)
    if not group.vectors:
        arguments = (*arguments, 1.0)
        frames = max(problem.wide.shape[1] for problem in group.problems)
        constants["PAIRS"] = in_pairs(group.kernel, group.like, frames, group.aligned)
    launch(group.kernel, group.pieces, group.like, *arguments, aligned=group.aligned, **constants)


def weighted_sums(layers: Sequence[GroupedLayer], factors: Tensor) -> None:
    """out += Σ_i c_i g_iᵀx_i for every layer; see `dpkernels.ops.weighted_sums`."""
    problems, apart = _split(layers, (grouped_sums, grouped_vector_sums))
    groups = _groups(problems)
    if sum(group.pieces for group in groups) < _FEWEST_PROGRAMS:
        groups, apart = [], list(layers)
    for group in groups:
        _group_sums(group, factors)
    for layer in apart:
        add_layer(layer, factors)
