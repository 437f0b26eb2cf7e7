"""Norms and weighted sums of many layers: LoRA, narrow linear layers and per-sample vectors go out together.

What a launch costs the host is more than what most of these layers cost the GPU. So layers with a few columns on one
side, and gradients that are materialised already, are done by one launch for all of a kind; the others one by one, by
their own family's op. Addresses are sent with each call; the list of pieces, which depends on shapes only, is kept.

Bounds do not depend on who makes the sum: a norm's covers all kernels of `configs.SUMS`.
"""

import functools
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from dpkernels.backends import registry
from dpkernels.backends.torch_grouped import Layer, add_layer, epilogue, layers, norm_layers, of_layer
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
    launch,
    rows,
    scratch,
    tile_of,
    tiles,
    upcast,
)
from dpkernels.backends.triton_ops.lora import rank_columns

_NARROW = 32
"""Columns up to which a side of a linear layer counts as narrow."""

_FEWEST_PROGRAMS = 256
"""Below it a sum goes layer by layer: a program does all samples of a piece, and too few would leave the GPU idle."""

_GROUPED = (torch.bfloat16, torch.float16, torch.float32)

_TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


class Form(NamedTuple):
    """What is common to all problems of one shape: a model has hundreds of layers and a handful of these.

    Attributes:
        kernel: the one that does them.
        kind: what one launch has in common: dtypes of tensors and out, ALIGN of wide and narrow, R.
        pieces: in how many pieces of BN columns a problem is done.
        before, after: of a row of the table, what stands between the addresses and the first piece, and behind it.
    """

    kernel: Any
    kind: tuple[Any, ...]
    pieces: int
    before: tuple[int, ...]
    after: tuple[int, ...]


def _form(
    kernel: Any, wide: Tensor, narrow: Tensor | None, scaling: float, out: Tensor | None, by_columns: bool
) -> Form | None:
    """The form of a problem, or None for one that cannot go with others.

    kernel: the one that will do it, which says what BN is. by_columns: whether out is [n, r] and not [r, n].
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
        form: what it has in common with others.
        wide: the [B, T, n] tensor, which starts at a multiple of 16 bytes.
        narrow: the [B, T, r] tensor, which does too.
        out: [n, r], [r, n] or [n] that the sum is added to, contiguous.
    """

    form: Form
    wide: Tensor
    narrow: Tensor | None
    out: Tensor | None

    def fields(self, first: int) -> list[int]:
        """Its row of the table, with its first piece."""
        form, wide, narrow, out = self
        narrow_address = 0 if narrow is None else narrow.data_ptr()
        out_address = 0 if out is None else out.data_ptr()
        return [wide.data_ptr(), narrow_address, out_address, *form.before, first, *form.after]


@dataclass
class Group:
    """Problems of one kind: what one launch does."""

    problems: list[Problem] = field(default_factory=list)

    @property
    def like(self) -> Tensor:
        """A tensor of its device and dtype."""
        return self.problems[0].wide

    @property
    def kernel(self) -> Any:
        """The kernel that does it."""
        return self.form.kernel

    @property
    def form(self) -> Form:
        """That of its first problem: of one kind, and by one kernel, are all."""
        return self.problems[0].form

    @property
    def vectors(self) -> bool:
        """Whether its problems have no narrow side."""
        return bool(self.form.kind[4] == 0)

    def constants(self, *, sums: bool) -> dict[str, Any]:
        """The constexprs of its kernels."""
        dtype, out, w_align, n_align, columns = self.form.kind
        found = {"DTYPE": _TYPES[dtype], "W_ALIGN": w_align}
        if sums:
            assert out is not None
            found["OUT_DTYPE"] = _TYPES[out]
        if columns:
            found |= {"N_ALIGN": n_align, "R": columns, "UPCAST": upcast(self.like)}
        return found

    @property
    def aligned(self) -> bool:
        """Whether its configuration is that of aligned tensors."""
        return self.vectors or bool(self.form.kind[2] > 1)

    @property
    def pieces(self) -> int:
        """Of all its problems: the programs of a sum."""
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
    """[pieces, 2] int32: (problem, piece), piece by piece for problems in a row of which only the first `begins`.

    One a stream: an entry that is dropped goes back to the memory of the stream it was made on.
    """
    del stream
    sets: list[list[int]] = []
    for problem, first in enumerate(begins):
        if first:
            sets.append([])
        sets[-1].append(problem)
    work = [(problem, piece) for one in sets for piece in range(counts[one[0]]) for problem in one]
    return torch.tensor(work, dtype=torch.int32, device="cpu").view(-1, 2).to(device)


def _groups(problems: Iterable[Problem]) -> list[Group]:
    found: dict[tuple[Any, ...], Group] = {}
    for problem in problems:
        found.setdefault(problem.form.kind, Group()).problems.append(problem)
    return list(found.values())


def _problems(
    layer: Layer, kernels: tuple[Any, Any], forms: dict[tuple[Any, ...], Form | None]
) -> list[Problem] | None:
    """The problems that a layer is made of, or None for one that its own family's op must do.

    kernels: for products and for vectors. forms: those of the layers before it in this call, by what decides them.
    """
    family = layer.family
    if layer.tensors[-1].dtype not in _GROUPED:
        return None
    pairs: tuple[tuple[Tensor, Tensor | None, float, bool], ...]
    if family == "lora":
        x, h, g, dh = layer.tensors
        pairs = ((x, dh, 1.0, False), (g, h, layer.options["scaling"], True))
    elif family == "bias" and layer.tensors[0].shape[1] == 1:
        pairs = ((layer.tensors[0], None, 1.0, False),)
    elif family == "linear":
        x, g = layer.tensors
        if min(x.shape[2], g.shape[2]) > _NARROW:
            return None
        pairs = ((x, g, 1.0, False),) if g.shape[2] <= _NARROW else ((g, x, 1.0, True),)
    else:
        return None
    found = []
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
        found.append(Problem(form, wide, narrow, out))
    return found


def _split(given: Iterable[Layer], kernels: tuple[Any, Any]) -> tuple[list[Problem], list[Layer]]:
    """Problems of the layers that go together, and the other layers."""
    problems: list[Problem] = []
    rest: list[Layer] = []
    ours: dict[str, bool] = {}
    forms: dict[tuple[Any, ...], Form | None] = {}
    for layer in given:
        if layer.family not in ours:
            # A family that another backend serves goes to that one: a norm's bound is on what its own sum adds.
            function = registry.implementation(layer.sum_op, layer.tensors[-1].device.type)
            ours[layer.family] = function.__module__.startswith(__package__)
        mine = _problems(layer, kernels, forms) if ours[layer.family] else None
        if mine is None:
            rest.append(layer)
        else:
            problems += mine
    return problems, rest


def _group_norms(group: Group, norms: Tensor, first_column: int) -> None:
    """The norms of a group's problems into columns of norms [B, columns], from first_column on."""
    x, batch, pieces = group.like, len(norms), group.pieces
    work, table = group.tables()
    partials = scratch(x, batch, pieces, 2)
    constants = group.constants(sums=False)
    arguments: tuple[Any, ...] = (work, table, partials, pieces)
    sizes, chain, per_term = constants["W_ALIGN"], (1, 1), bounds.ROUNDINGS_FMA
    if not group.vectors:
        arguments = (*arguments, 1.0)
        constants["SMALLEST"] = bounds.smallest(x.dtype)
        sizes *= constants["N_ALIGN"]
        kernels = ("grouped_norms", *configs.SUMS["linear"], *configs.SUMS["lora"])
        chain = configs.extremes(kernels, "BT", x.dtype, architecture(x.device))
        per_term = tensor_cores.roundings(x)
    launch(group.kernel, batch * pieces, x, *arguments, aligned=group.aligned, **constants)
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
        PER_TERM=per_term,
        LEAST=chain[0],
        MOST=chain[1],
    )


def total_norm_sq(
    xs: list[Tensor],
    gs: list[Tensor],
    kinds: list[str],
    hs: list[Tensor],
    dhs: list[Tensor],
    scalings: list[float],
    padding_idxs: list[int],
    kernel_sizes: list[int],
    strides: list[int],
    paddings: list[int],
    dilations: list[int],
) -> Tensor:
    """Σ over layers of ‖g_iᵀx_i‖² and its like, rounded up; see `dpkernels.ops.total_norm_sq`."""
    given = norm_layers(
        xs, gs, kinds, hs, dhs, scalings, padding_idxs, kernel_sizes, strides, paddings, dilations
    )
    problems, rest = _split(given, (grouped_norms, grouped_vector_norms))
    alone = [part for layer in rest for part in of_layer(layer)]
    batch = len(gs[0])
    norms = scratch(gs[0], batch, len(problems) + len(alone))
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
    if not group.vectors:
        arguments = (*arguments, 1.0)
    launch(
        group.kernel,
        group.pieces,
        group.like,
        *arguments,
        aligned=group.aligned,
        **group.constants(sums=True),
    )


def clip_and_noise(
    xs: list[Tensor],
    gs: list[Tensor],
    kinds: list[str],
    factors: Tensor,
    outs: list[Tensor],
    hs: list[Tensor],
    dhs: list[Tensor],
    scalings: list[float],
    padding_idxs: list[int],
    strides: list[int],
    paddings: list[int],
    dilations: list[int],
    key: Tensor,
    nonces: Tensor,
    noise_scale: float,
    grid: float,
    divisor: float,
) -> None:
    """out += Σ_i c_i g_iᵀx_i for every layer, then noise; see `dpkernels.ops.clip_and_noise`."""
    given = list(layers(xs, gs, kinds, outs, hs, dhs, scalings, padding_idxs, strides, paddings, dilations))
    problems, apart = _split(given, (grouped_sums, grouped_vector_sums))
    groups = _groups(problems)
    if sum(group.pieces for group in groups) < _FEWEST_PROGRAMS:
        groups, apart = [], given
    for group in groups:
        _group_sums(group, factors)
    for layer in apart:
        add_layer(layer, factors)
    epilogue(outs, key, nonces, noise_scale, grid, divisor)
