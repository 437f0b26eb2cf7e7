"""Every norm and weighted sum as a comparison: our backends and methods, plain PyTorch, Opacus's own samplers.

"plain torch" is the shortest batched PyTorch expression, without bounds, float64 sums between samples or unread
samples: what most libraries run. Opacus's are the functions that its hooks call: "Opacus ghost" is its norm
sampler where it has one for the layer, "Opacus hooks" its per-sample gradient and then the norm.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from torch import Tensor, nn

from bench.names import OPACUS_GHOST, OPACUS_HOOKS
from dpkernels import ops, reference
from dpkernels.backends import native, registry
from dpkernels.backends.layer import GroupedLayer
from dpkernels.backends.triton_ops import availability

PLAIN = "plain torch"
VOCABULARY, TAPS, RANK, LAYERS = 1000, 9, 8, 24


@dataclass
class OpCase:
    """One op on one shape.

    Attributes:
        op: its name in dpkernels.ops.
        shape: for people and for the results file.
        sets: argument tuples, used in rotation; on a GPU more than its cache holds.
        exact: of the first set, by the float64 reference; a list of tensors.
        contenders: name -> function of an argument tuple's entries, giving what `exact` holds.
        flops, moved: of the floor: operations, and bytes with each input read and each output written once.
    """

    op: str
    shape: dict[str, int]
    sets: list[tuple[Any, ...]]
    exact: list[Tensor]
    contenders: dict[str, Callable[..., Any]]
    flops: float
    moved: float


@dataclass
class Maker:
    """A factory of cases for a device; `copies` argument sets each."""

    device: str
    dtype: torch.dtype = torch.float32
    copies: int = 1
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(3))

    def cases(self, size: int, frames: int, d: int, p: int, *, layers: bool) -> Iterator[OpCase]:
        """All ops on one shape; those of biases, norms, tables and convolutions only where `layers`."""
        yield from self._linear(size, frames, d, p)
        yield from self._lora(size, frames, d, p)
        if layers:
            yield from self._small(size, frames, p)
            yield from self._embedding(size, frames, p)
            yield from self._depthwise(size, p, frames)
            yield self._weighted_sums(size, frames, d, p)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, self.dtype)

    def _normalised(self, *shape: int) -> Tensor:
        """Return a LayerNorm's x̂, which Opacus's sampler, as it normalises again, does not change."""
        return nn.functional.layer_norm(self._normal(*shape), shape[-1:])

    def _factors(self, size: int) -> Tensor:
        return torch.rand(size, generator=self.generator).add(0.1).to(self.device)

    def _sets(self, make: Callable[[], tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        return [make() for _ in range(self.copies)]

    def _backends(self, op: str, **options: Any) -> dict[str, Callable[..., Any]]:
        backends: dict[str, Callable[..., Any]] = {}
        device = self.device.partition(":")[0]
        names = ["torch"] if native.unavailable_reason(device, op) else ["native", "torch"]
        if device != "cpu" and not availability.unavailable_reason(device):
            names.append("triton")
        for name in names:
            function = registry.function(name, op)
            if function is not None:
                backends[name] = lambda *a, function=function: function(*a, **options)
        return backends

    def _norm(
        self,
        op: str,
        shape: dict[str, int],
        sets: list[tuple[Any, ...]],
        plain: dict[str, Callable[..., Any]],
        flops: float,
        *,
        methods: tuple[str, ...] = (),
        layers: Callable[[tuple[Any, ...]], list[tuple[nn.Module, Tensor, Tensor]]],
        **options: Any,
    ) -> OpCase:
        exact = getattr(reference, op)(*sets[0], **options)
        contenders: dict[str, Callable[..., Any]] = {}
        for method in methods or ("",):
            chosen = {**options, **({"method": method} if method else {})}
            for backend, function in self._backends(op, **chosen).items():
                contenders[f"dpkernels {backend} {method}".strip()] = function
        contenders |= plain | _opacus(layers)
        moved = float(sum(t.numel() * t.element_size() for t in sets[0] if isinstance(t, Tensor)))
        return OpCase(op, shape, sets, _as_list(exact), contenders, flops, moved)

    def _sum(
        self,
        op: str,
        shape: dict[str, int],
        sets: list[tuple[Any, ...]],
        outs: tuple[Tensor, ...],
        plain: Callable[..., tuple[Tensor, ...]],
        flops: float,
        **options: Any,
    ) -> OpCase:
        exact = [torch.zeros_like(out) for out in outs]
        getattr(reference, op)(*sets[0], *exact, **options)

        def fresh(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
            def call(*arguments: Any) -> tuple[Tensor, ...]:
                for out in outs:
                    out.zero_()
                function(*arguments, *outs)
                return outs

            return call

        contenders: dict[str, Callable[..., Any]] = {
            f"dpkernels {name}": fresh(function) for name, function in self._backends(op, **options).items()
        }
        contenders[PLAIN] = plain
        read = sum(t.numel() * t.element_size() for t in sets[0] if isinstance(t, Tensor))
        written = sum(out.numel() * out.element_size() for out in outs)
        return OpCase(op, shape, sets, exact, contenders, flops, float(read + written))

    def _out(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self.device)

    def _linear(self, size: int, frames: int, d: int, p: int) -> Iterator[OpCase]:
        shape = {"B": size, "T": frames, "d": d, "p": p}
        sets = self._sets(lambda: (self._normal(size, frames, d), self._normal(size, frames, p)))

        def gram(x: Tensor, g: Tensor) -> Tensor:
            return (torch.bmm(x, x.mT) * torch.bmm(g, g.mT)).sum((1, 2))

        def direct(x: Tensor, g: Tensor) -> Tensor:
            return torch.bmm(g.mT, x).square().sum((1, 2))

        def weighted(x: Tensor, g: Tensor, c: Tensor) -> tuple[Tensor, ...]:
            return ((g * c[:, None, None].to(g.dtype)).flatten(0, 1).T @ x.flatten(0, 1),)

        layer = self._layer(nn.Linear(d, p, bias=False))
        yield self._norm(
            "linear_norm_sq",
            shape,
            sets,
            {PLAIN: gram, f"{PLAIN} direct": direct},
            size * min(2.0 * frames * p * d, float(frames**2 * (p + d))),
            methods=("auto", "gram", "direct"),
            layers=lambda a: [(layer, a[0], a[1])],
        )
        factors = self._factors(size)
        flops = 2.0 * size * frames * p * d
        with_factors = [(*tensors, factors) for tensors in sets]
        yield self._sum("linear_weighted_sum", shape, with_factors, (self._out(p, d),), weighted, flops)

    def _lora(self, size: int, frames: int, d: int, p: int) -> Iterator[OpCase]:
        shape = {"B": size, "T": frames, "d": d, "p": p, "r": RANK}
        sets = self._sets(lambda: tuple(self._normal(size, frames, width) for width in (d, RANK, p, RANK)))

        def norms(x: Tensor, h: Tensor, g: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
            return (dh.mT @ x).square().sum((1, 2)), (h.mT @ g).square().sum((1, 2))

        def weighted(x: Tensor, h: Tensor, g: Tensor, dh: Tensor, c: Tensor) -> tuple[Tensor, ...]:
            c = c[:, None, None].to(g.dtype)
            return (dh * c).flatten(0, 1).T @ x.flatten(0, 1), g.flatten(0, 1).T @ (h * c).flatten(0, 1)

        of_a, of_b = self._layer(nn.Linear(d, RANK, bias=False)), self._layer(nn.Linear(RANK, p, bias=False))
        flops = 2.0 * size * frames * RANK * (d + p)
        yield self._norm(
            "lora_norm_sq",
            shape,
            sets,
            {PLAIN: norms},
            flops,
            layers=lambda a: [(of_a, a[0], a[3]), (of_b, a[1], a[2])],
        )
        factors, outs = self._factors(size), (self._out(RANK, d), self._out(p, RANK))
        yield self._sum(
            "lora_weighted_sum", shape, [(*tensors, factors) for tensors in sets], outs, weighted, flops
        )

    def _small(self, size: int, frames: int, p: int) -> Iterator[OpCase]:
        shape = {"B": size, "T": frames, "p": p}
        sets = self._sets(lambda: (self._normal(size, frames, p),))
        pairs = self._sets(lambda: (self._normalised(size, frames, p), self._normal(size, frames, p)))
        factors, out = self._factors(size), self._out(p)
        entries = float(size * frames * p)
        bias = self._layer(nn.Linear(1, p))
        bias.weight.requires_grad_(False)
        norm = self._layer(nn.LayerNorm(p))
        norm.bias.requires_grad_(False)
        yield self._norm(
            "bias_norm_sq",
            shape,
            sets,
            {PLAIN: lambda g: g.sum(1).square().sum(1)},
            entries,
            layers=lambda a: [(bias, a[0][..., :1], a[0])],
        )
        with_factors = [(*tensors, factors) for tensors in sets]
        yield self._sum(
            "bias_weighted_sum",
            shape,
            with_factors,
            (out,),
            lambda g, c: (c.to(g.dtype) @ g.sum(1),),
            entries,
        )
        yield self._norm(
            "layer_norm_norm_sq",
            shape,
            pairs,
            {PLAIN: lambda x, g: (x * g).sum(1).square().sum(1)},
            2 * entries,
            layers=lambda a: [(norm, a[0], a[1])],
        )
        yield self._sum(
            "layer_norm_weighted_sum",
            shape,
            [(*tensors, factors) for tensors in pairs],
            (out,),
            lambda x, g, c: (c.to(g.dtype) @ (x * g).sum(1),),
            2 * entries,
        )

    def _embedding(self, size: int, frames: int, p: int) -> Iterator[OpCase]:
        shape = {"B": size, "T": frames, "p": p, "V": VOCABULARY}

        def make() -> tuple[Tensor, Tensor]:
            ids = torch.randint(0, VOCABULARY, (size, frames), generator=self.generator).to(self.device)
            return ids, self._normal(size, frames, p)

        def per_row(ids: Tensor, g: Tensor) -> Tensor:
            table = g.new_zeros(len(g), VOCABULARY, p)
            table.scatter_add_(1, ids[:, :, None].expand_as(g), g)
            return table.square().sum((1, 2))

        def weighted(ids: Tensor, g: Tensor, c: Tensor) -> tuple[Tensor, ...]:
            rows = (g * c[:, None, None].to(g.dtype)).flatten(0, 1)
            return (g.new_zeros(VOCABULARY, p).index_add_(0, ids.flatten(), rows),)

        sets, factors = self._sets(make), self._factors(size)
        table = self._layer(nn.Embedding(VOCABULARY, p))
        entries = float(size * frames * p)
        yield self._norm(
            "embedding_norm_sq",
            shape,
            sets,
            {PLAIN: per_row},
            entries,
            layers=lambda a: [(table, a[0], a[1])],
        )
        with_factors = [(*tensors, factors) for tensors in sets]
        outs = (self._out(VOCABULARY, p),)
        yield self._sum("embedding_weighted_sum", shape, with_factors, outs, weighted, entries)

    def _depthwise(self, size: int, channels: int, frames: int) -> Iterator[OpCase]:
        shape = {"B": size, "T": frames, "C": channels, "k": TAPS}
        pad = TAPS // 2

        def each(x: Tensor, g: Tensor) -> Tensor:
            windows = nn.functional.pad(x, (pad, pad)).unfold(2, TAPS, 1)
            return torch.einsum("bct,bctk->bck", g, windows)

        def weighted(x: Tensor, g: Tensor, c: Tensor) -> tuple[Tensor, ...]:
            return ((each(x, g) * c[:, None, None].to(g.dtype)).sum(0)[:, None],)

        sets = self._sets(
            lambda: (self._normal(size, channels, frames), self._normal(size, channels, frames))
        )
        conv = self._layer(nn.Conv1d(channels, channels, TAPS, padding=pad, groups=channels, bias=False))
        flops = 2.0 * size * frames * channels * TAPS
        yield self._norm(
            "depthwise_conv1d_norm_sq",
            shape,
            sets,
            {PLAIN: lambda x, g: each(x, g).square().sum((1, 2))},
            flops,
            layers=lambda a: [(conv, a[0], a[1])],
            kernel_size=TAPS,
            padding=pad,
        )
        factors, outs = self._factors(size), (self._out(channels, 1, TAPS),)
        with_factors = [(*tensors, factors) for tensors in sets]
        yield self._sum(
            "depthwise_conv1d_weighted_sum", shape, with_factors, outs, weighted, flops, padding=pad
        )

    def _weighted_sums(self, size: int, frames: int, d: int, p: int) -> OpCase:
        """Many LoRA layers in one call, and one after the other."""
        shape = {"B": size, "T": frames, "d": d, "p": p, "r": RANK, "layers": LAYERS}
        outs = [self._out(*sizes) for _ in range(LAYERS) for sizes in ((RANK, d), (p, RANK))]
        layers, factors = [], self._factors(size)
        for i in range(LAYERS):
            tensors = tuple(self._normal(size, frames, width) for width in (d, RANK, p, RANK))
            layers.append(GroupedLayer("lora", tensors, {"scaling": 1.0}, tuple(outs[2 * i : 2 * i + 2])))
        exact = [torch.zeros_like(out) for out in outs]
        reference.weighted_sums(
            [layer._replace(outs=tuple(exact[2 * i : 2 * i + 2])) for i, layer in enumerate(layers)], factors
        )

        def fresh(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
            def call(layers: list[GroupedLayer], factors: Tensor) -> tuple[Tensor, ...]:
                for out in outs:
                    out.zero_()
                function(layers, factors)
                return tuple(outs)

            return call

        def one_by_one(layers: list[GroupedLayer], factors: Tensor) -> None:
            for layer in layers:
                ops.lora_weighted_sum(*layer.tensors, factors, *layer.outs, scaling=1.0)

        def plain(layers: list[GroupedLayer], factors: Tensor) -> tuple[Tensor, ...]:
            c, sums = factors[:, None, None], []
            for x, h, g, dh in (layer.tensors for layer in layers):
                sums.append((dh * c.to(dh.dtype)).flatten(0, 1).T @ x.flatten(0, 1))
                sums.append(g.flatten(0, 1).T @ (h * c.to(h.dtype)).flatten(0, 1))
            return tuple(sums)

        contenders: dict[str, Callable[..., Any]] = {
            f"dpkernels {name}": fresh(function) for name, function in self._backends("weighted_sums").items()
        }
        contenders |= {"dpkernels, layer by layer": fresh(one_by_one), PLAIN: plain}
        read = sum(t.numel() * t.element_size() for layer in layers for t in layer.tensors)
        written = sum(out.numel() * out.element_size() for out in outs)
        flops = 2.0 * size * frames * RANK * (d + p) * LAYERS
        return OpCase(
            "weighted_sums", shape, [(layers, factors)], exact, contenders, flops, float(read + written)
        )

    def _layer(self, layer: nn.Module) -> Any:
        return layer.to(self.device, self.dtype)


def _as_list(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, tuple) else [value]


def _opacus(
    layers: Callable[[tuple[Any, ...]], list[tuple[nn.Module, Tensor, Tensor]]],
) -> dict[str, Callable[..., Any]]:
    """Opacus's samplers on (layer, activation, output gradient) triples, giving squared norms."""

    def ghost(*arguments: Any) -> tuple[Tensor, ...]:
        samplers = GradSampleModuleFastGradientClipping.NORM_SAMPLERS
        samples = [samplers[type(layer)](layer, [x], g) for layer, x, g in layers(arguments)]
        return tuple(next(iter(norms.values())).square() for norms in samples)

    def hooks(*arguments: Any) -> tuple[Tensor, ...]:
        samplers = GradSampleModule.GRAD_SAMPLERS
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            samples = [samplers[type(layer)](layer, [x], g) for layer, x, g in layers(arguments)]
        return tuple(next(iter(gradients.values())).flatten(1).square().sum(1) for gradients in samples)

    return {OPACUS_GHOST: ghost, OPACUS_HOOKS: hooks}
