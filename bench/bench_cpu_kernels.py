"""Native CPU kernels against what PyTorch offers for the same result, as JSON on stdout.

    python bench/bench_cpu_kernels.py [--ops linear,lora,layers,depthwise] [--repeats 15]

Contenders take turns; medians and minima are given. `native`; `torch_ops`, the sound composition that
dpkernels falls back to; `torch_plain`, the shortest batched PyTorch expression, without bounds, float64 sums
between samples or unread samples (what most libraries run). Each result is checked against the float64
reference first: one that is wrong, or a native norm below the truth, has no time.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from dpkernels import reference
from dpkernels.backends import native, native_ops, torch_ops

Contenders = dict[str, Callable[[], Any]]
LINEAR = [(144, 144), (384, 384), (384, 1536), (1024, 4096)]
FRAMES = (50, 150, 500)
RANK, VOCABULARY, TAPS = 8, 1000, 9


def _batch(d: int) -> int:
    return 16 if d < 1024 else 8


def _close(name: str, contender: str, given: Tensor, exact: Tensor) -> None:
    error = float((given.double() - exact.double()).norm() / exact.double().norm())
    if not error < 2e-2:
        raise SystemExit(f"{name}: {contender} is off by {error:.1e}")
    if contender == "native" and name.endswith("norm_sq") and bool((given < exact).any()):
        raise SystemExit(f"{name}: native is below the exact norm")


def _norms(op: str, arguments: tuple[Tensor, ...], plain: Callable[[], Tensor], **options: Any) -> Contenders:
    exact = getattr(reference, op)(*arguments, **options)
    contenders: Contenders = {
        "native": lambda: getattr(native_ops, op)(*arguments, **options),
        "torch_ops": lambda: getattr(torch_ops, op)(*arguments, **options),
        "torch_plain": plain,
    }
    for contender, function in contenders.items():
        given = function()
        pairs = zip(given, exact, strict=True) if isinstance(exact, tuple) else [(given, exact)]
        for one, truth in pairs:
            _close(op, contender, one, truth)
    return contenders


def _sums(
    op: str,
    arguments: tuple[Tensor, ...],
    outs: tuple[Tensor, ...],
    plain: Callable[[], tuple[Tensor, ...]],
    **options: Any,
) -> Contenders:
    exact = tuple(torch.zeros_like(out) for out in outs)
    getattr(reference, op)(*arguments, *exact, **options)
    for contender, backend in (("native", native_ops), ("torch_ops", torch_ops)):
        for out in outs:
            out.zero_()
        getattr(backend, op)(*arguments, *outs, **options)
        for one, truth in zip(outs, exact, strict=True):
            _close(op, contender, one, truth)
    for one, truth in zip(plain(), exact, strict=True):
        _close(op, "torch_plain", one, truth)
    return {
        "native": lambda: getattr(native_ops, op)(*arguments, *outs, **options),
        "torch_ops": lambda: getattr(torch_ops, op)(*arguments, *outs, **options),
        "torch_plain": plain,
    }


def _linear(x: Tensor, g: Tensor, c: Tensor) -> Iterator[tuple[str, Contenders]]:
    d, p, frames = x.shape[2], g.shape[2], x.shape[1]

    def gram() -> Tensor:
        return (torch.bmm(x, x.mT) * torch.bmm(g, g.mT)).sum((1, 2))

    def direct() -> Tensor:
        return torch.stack([(g[i].T @ x[i]).square().sum() for i in range(len(x))])

    def total() -> tuple[Tensor, ...]:
        return ((g * c[:, None, None]).flatten(0, 1).T @ x.flatten(0, 1),)

    if frames * (p + d) < 2 * 2 * p * d:
        yield "linear_norm_sq gram", _norms("linear_norm_sq", (x, g), gram, method="gram")
    yield "linear_norm_sq direct", _norms("linear_norm_sq", (x, g), direct, method="direct")
    out = torch.zeros(p, d, dtype=torch.float64)
    yield "linear_weighted_sum", _sums("linear_weighted_sum", (x, g, c), (out,), total)


def _lora(x: Tensor, g: Tensor, c: Tensor) -> Iterator[tuple[str, Contenders]]:
    h, dh = torch.randn(*x.shape[:2], RANK), torch.randn(*x.shape[:2], RANK)

    def norms() -> tuple[Tensor, Tensor]:
        return (dh.mT @ x).square().sum((1, 2)), (h.mT @ g).square().sum((1, 2))

    def total() -> tuple[Tensor, ...]:
        scale = c[:, None, None]
        return (dh * scale).flatten(0, 1).T @ x.flatten(0, 1), g.flatten(0, 1).T @ (h * scale).flatten(0, 1)

    yield "lora_norm_sq", _norms("lora_norm_sq", (x, h, g, dh), norms)
    outs = tuple(torch.zeros(*s, dtype=torch.float64) for s in ((RANK, x.shape[2]), (g.shape[2], RANK)))
    yield "lora_weighted_sum", _sums("lora_weighted_sum", (x, h, g, dh, c), outs, total)


def _layers(g: Tensor, c: Tensor) -> Iterator[tuple[str, Contenders]]:
    x = torch.randn_like(g)
    scale = c[:, None, None]
    ids = torch.randint(0, VOCABULARY, g.shape[:2])
    p = g.shape[2]
    yield "bias_norm_sq", _norms("bias_norm_sq", (g,), lambda: g.sum(1).square().sum(1))
    out = torch.zeros(p, dtype=torch.float64)
    yield "bias_weighted_sum", _sums("bias_weighted_sum", (g, c), (out,), lambda: (c @ g.sum(1),))
    yield "layer_norm_norm_sq", _norms("layer_norm_norm_sq", (x, g), lambda: (x * g).sum(1).square().sum(1))
    yield (
        "layer_norm_weighted_sum",
        _sums("layer_norm_weighted_sum", (x, g, c), (out,), lambda: (c @ (x * g).sum(1),)),
    )

    def per_row() -> Tensor:
        table = torch.zeros(len(g), VOCABULARY, p)
        table.scatter_add_(1, ids[:, :, None].expand_as(g), g)
        return table.square().sum((1, 2))

    def table() -> tuple[Tensor, ...]:
        return (torch.zeros(VOCABULARY, p).index_add_(0, ids.flatten(), (g * scale).flatten(0, 1)),)

    yield "embedding_norm_sq", _norms("embedding_norm_sq", (ids, g), per_row)
    out = torch.zeros(VOCABULARY, p, dtype=torch.float64)
    yield "embedding_weighted_sum", _sums("embedding_weighted_sum", (ids, g, c), (out,), table)


def _depthwise(batch: int, channels: int, frames: int, c: Tensor) -> Iterator[tuple[str, Contenders]]:
    x, g = torch.randn(batch, channels, frames), torch.randn(batch, channels, frames)
    pad = TAPS // 2

    def each() -> Tensor:
        windows = torch.nn.functional.pad(x, (pad, pad)).unfold(2, TAPS, 1)
        return torch.einsum("bct,bctk->bck", g, windows)

    out = torch.zeros(channels, 1, TAPS, dtype=torch.float64)
    yield (
        "depthwise_conv1d_norm_sq",
        _norms(
            "depthwise_conv1d_norm_sq",
            (x, g),
            lambda: each().square().sum((1, 2)),
            kernel_size=TAPS,
            padding=pad,
        ),
    )
    yield (
        "depthwise_conv1d_weighted_sum",
        _sums(
            "depthwise_conv1d_weighted_sum",
            (x, g, c),
            (out,),
            lambda: ((each() * c[:, None, None]).sum(0)[:, None],),
            padding=pad,
        ),
    )


def _cases(wanted: set[str]) -> Iterator[tuple[str, dict[str, int], Contenders]]:
    for d, p in LINEAR:
        for frames in FRAMES:
            batch = _batch(d)
            shape = {"B": batch, "T": frames, "d": d, "p": p}
            x, g, c = torch.randn(batch, frames, d), torch.randn(batch, frames, p), torch.rand(batch)
            groups: dict[str, Callable[[], Iterator[tuple[str, Contenders]]]] = {
                "linear": lambda x=x, g=g, c=c: _linear(x, g, c),
                "lora": lambda x=x, g=g, c=c: _lora(x, g, c),
                "layers": lambda g=g, c=c: _layers(g, c),
            }
            if (d, p) == (384, 384):
                groups["depthwise"] = lambda b=batch, d=d, t=frames, c=c: _depthwise(b, d, t, c)
            for group in wanted & groups.keys():
                for name, contenders in groups[group]():
                    yield name, shape, contenders


def _times(contenders: Contenders, repeats: int) -> dict[str, list[float]]:
    """Milliseconds: contenders take turns, so that what else the machine does meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for function in contenders.values():
        function()
    for _ in range(repeats):
        for name, function in contenders.items():
            start = time.perf_counter()
            function()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def _summary(
    times: dict[str, list[float]], of: Callable[[list[float]], float]
) -> dict[str, dict[str, float]]:
    values = {name: of(own) for name, own in times.items()}
    ratios = {name: round(values["native"] / v, 3) for name, v in values.items() if name != "native"}
    return {"ms": {name: round(v, 4) for name, v in values.items()}, "native_over": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", default="linear,lora,layers,depthwise")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for name, shape, contenders in _cases(set(options.ops.split(","))):
        times = _times(contenders, options.repeats)
        row = {
            "op": name,
            **shape,
            "median": _summary(times, statistics.median),
            "least": _summary(times, min),
        }
        rows.append(row)
        print(json.dumps(row), file=sys.stderr)
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "isa": native.isa(),
    }
    print(json.dumps({"about": about, "results": rows}, indent=1))


if __name__ == "__main__":
    main()
