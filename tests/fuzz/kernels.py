"""The native ops that are no layer's: clip factors, the noise, the fused step and the transducer; and refusals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dpkernels import reference
from dpkernels.backends import native, native_ops
from tests.fuzz import layers
from tests.fuzz.draw import Draw
from tests.fuzz.layers import both_threads
from tests.fuzz.memory import Guarded, same_bits
from tests.ops.checks import automatic_factors_within, factors_within
from tests.ops.tolerances import FUSED_GRADIENT, FUSED_OFF
from tests.ops.transducer import Batch, make

ISAS = ("baseline", "avx2", "avx512")


@contextmanager
def instructions(name: str) -> Iterator[None]:
    """Within it kernels use another instruction set; "" is the best one."""
    native.set_isa(name)
    try:
        yield
    finally:
        native.set_isa("")


def available() -> tuple[str, ...]:
    """The instruction sets of this machine."""
    return ISAS[: ISAS.index(native.isa()) + 1]


def _everywhere(compute: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What a computation returns with one or two threads and every instruction set, bit by bit (any NaN is one)."""
    results = []
    for name in available():
        with instructions(name):
            results.append(both_threads(compute))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            canonical = (torch.where(t.isnan(), torch.nan, t) if t.is_floating_point() else t for t in (a, b))
            assert same_bits(*canonical), "another instruction set gives other bits"
    return results[0]


def clip(draw: Draw) -> None:
    """Clip factors of any numbers: c·√norm_sq ≤ C in exact arithmetic."""
    dtype = draw.note("dtype", draw.one_of((torch.float32, torch.float64)))
    squares = draw.values((draw.integer(0, 40),), dtype)
    draw.note("values", squares.kind)
    exponent = draw.rng.uniform(-300, 300) if draw.chance(0.2) else draw.rng.uniform(-6, 6)
    limit = draw.note("limit", float(10.0**exponent))
    norm_sq = squares.tensor if draw.chance(0.2) else squares.tensor.abs()
    with Guarded().outputs():
        factors = native_ops.clip_factors(norm_sq, limit)
    factors_within(norm_sq, limit, factors)
    stability = draw.note("stability", float(10.0 ** draw.rng.uniform(-6, 1)))
    automatic = native_ops.automatic_clip_factors(norm_sq, limit, stability)
    automatic_factors_within(norm_sq, limit, stability, automatic)


def noise(draw: Draw) -> None:
    """Keystream and normals, from any counter on: the reference's."""
    key, nonce = draw.rng.bytes(32), draw.rng.bytes(12)
    near_end = draw.chance(0.3)
    blocks = draw.note("blocks", draw.integer(0, 40))
    end = 1 << 32
    counter = draw.note(
        "counter", end - blocks - draw.integer(0, 3) if near_end else draw.integer(0, 1 << 20)
    )
    counter = min(counter, end - max(1, blocks))  # a block's own number is below 2³²

    def stream() -> list[Tensor]:
        with Guarded().outputs():
            return [native_ops.chacha20_keystream(key, counter, nonce, blocks)]

    (given,) = _everywhere(stream)
    assert torch.equal(given, reference.chacha20_keystream(key, counter, nonce, blocks)), "other bytes"
    count = draw.note("count", draw.integer(0, 8 * blocks))
    dtype = draw.one_of((torch.float32, torch.float64))

    def normals() -> list[Tensor]:
        options = {"key": key, "nonce": nonce, "counter": counter, "dtype": dtype}
        with Guarded().outputs():
            return [native_ops.chacha20_normal(count, **options)]

    (given,) = _everywhere(normals)
    wanted = reference.chacha20_normal(count, key=key, nonce=nonce, counter=counter)
    rounding = 1e-12 if dtype == torch.float64 else 1e-7
    torch.testing.assert_close(given.double(), wanted, rtol=rounding, atol=1e-13)


def step(draw: Draw) -> None:
    """A fused step and the noise on sums, of parameters of any sizes and values."""
    shapes = [
        draw.sizes(draw.integer(1, 3), 30_000 if draw.chance(0.1) else 600) for _ in range(draw.integer(1, 4))
    ]
    draw.note("shapes", shapes)
    dtype = draw.note("dtype", draw.one_of((torch.float32, torch.bfloat16)))
    kind = draw.note("values", draw.one_of(("normal", "normal", "extreme", "not finite")))
    op = draw.note("op", draw.one_of(("noise_adamw", "noise_sgd", "noise_sums")))

    def tensors(of: torch.dtype) -> list[Tensor]:
        return [draw.values(shape, of, kind).tensor for shape in shapes]

    def secret(size: int) -> Tensor:
        return (
            torch.frombuffer(bytearray(draw.rng.bytes(size)), dtype=torch.uint8)
            if size
            else torch.empty(0, dtype=torch.uint8)
        )

    noise = (draw.one_of((0.0, 1.7, 1e-3)), draw.one_of((0.0, 2.0**-12)), draw.one_of((1.0, 12.0)))
    hyper = {
        "noise_adamw": (1e-2, 0.9, 0.999, 1e-8, draw.one_of((0.0, 0.1)), draw.chance(0.5)),
        "noise_sgd": (0.1, draw.one_of((0.0, 0.9)), 0.0, draw.one_of((0.0, 0.1)), draw.chance(0.5)),
    }
    draw.note("noise", noise)
    sums, key, nonces = tensors(torch.float64), secret(32), secret(12 * len(shapes))
    if op == "noise_sums":
        lists: list[list[Tensor]] = [sums]
        rest: tuple[Any, ...] = (key, nonces, *noise)
    else:
        momentum = op == "noise_sgd" and bool(hyper[op][1])
        states = 2 if op == "noise_adamw" else int(momentum)
        lists = [
            tensors(dtype),
            sums,
            *(_states(tensors(torch.float32), positive=n == 1) for n in range(states)),
        ]
        if not states:
            lists.append([])
        lists.append(tensors(dtype) if draw.chance(0.5) else [])
        steps = [float(draw.integer(1, 5)) for _ in shapes]
        stochastic = dtype == torch.bfloat16 and draw.chance(0.5)
        rounding = secret(12 * len(shapes) if stochastic else 0)
        rest = (steps, key, nonces, rounding, *noise, draw.chance(0.5), *draw.note("hyper", hyper[op]))

    def compute() -> list[Tensor]:
        guarded = Guarded()
        copies = [[guarded.copy(t) for t in one] for one in lists]
        getattr(native_ops, op)(*copies, *rest)
        guarded.check()
        return [t for one in copies for t in one]

    given = _everywhere(compute)
    if kind == "normal":
        copies = [[t.clone() for t in one] for one in lists]
        getattr(reference, op)(*copies, *rest)
        wanted = [t for one in copies for t in one]
        off = {"rtol": 2.0**-6, "atol": 1e-2} if dtype == torch.bfloat16 else FUSED_OFF
        for ours, theirs in zip(given, wanted, strict=True):
            same = torch.isclose(ours.double(), theirs.double(), **off)
            # a normal that differs in its last bit may round to another multiple of the grid
            allowed = FUSED_GRADIENT * same.numel() + (1 if noise[1] else 0)
            assert int((~same).sum()) <= allowed, f"{int((~same).sum())} entries differ from the reference"


def _states(tensors: list[Tensor], *, positive: bool) -> list[Tensor]:
    return [t.abs() for t in tensors] if positive else tensors


def transducer(draw: Draw) -> None:
    """The four transducer ops on ragged batches; ordinary numbers are the reference's."""
    torch.manual_seed(draw.integer(0, 2**31))
    count = draw.integer(1, 3)
    frames = tuple(draw.one_of((0, 1, 2, 5, 33)) for _ in range(count))
    labels = tuple(draw.one_of((0, 1, 3, 6)) for _ in range(count))
    hidden, classes = draw.one_of((1, 5, 15, 16, 17, 33)), draw.one_of((2, 13, 14, 15, 60, 253))
    dtype = draw.note("dtype", draw.one_of((torch.float32, torch.float64)))
    durations = draw.note("durations", draw.one_of(((), (0, 1), (3, 1, 0, 7), (1,), (2**62, 1))))
    draw.note("sizes", (frames, labels, hidden, classes))
    batch = make(
        durations,
        frames=frames,
        labels=labels,
        hidden=hidden,
        classes=classes,
        bias=draw.chance(0.5),
        blank=draw.integer(0, 1),
        activation=draw.note("activation", draw.one_of(("relu", "tanh"))),
        dtype=dtype,
    )
    scale = draw.note("scale", draw.one_of((1.0, 1e-3, 10.0, 1e4)))
    batch = replace(batch, encoder=batch.encoder * scale)
    broken = draw.note("not finite", draw.chance(0.15))
    if broken and batch.encoder.numel():
        batch.encoder.view(-1)[draw.integer(0, batch.encoder.numel() - 1)] = draw.one_of((math.nan, math.inf))
    given = both_threads(lambda: _every_op(batch))
    if not broken and scale < 1e4:
        for ours, theirs in zip(given, _every_op(batch, reference), strict=True):
            finite = theirs[theirs.isfinite()]
            size = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
            tolerance = 2e-5 if dtype == torch.float32 else 1e-11
            torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * size)


def _every_op(batch: Batch, module: Any = native_ops) -> list[Tensor]:
    """What the four ops return, each from the results of the ones before."""
    lengths = (batch.frame_lengths, batch.target_lengths)
    with Guarded().outputs() if module is native_ops else nullcontext():
        scores, normalizers = module.transducer_scores(*batch.joint, **batch.options, sigma=batch.sigma)
        losses, flows = module.transducer_lattice(scores, *lengths, durations=batch.durations)
        saved = (*batch.joint, normalizers, flows, torch.linspace(-1, 2, len(losses)).to(losses))
        states = module.transducer_gradients(*saved, **batch.options)
        cells = module.transducer_cells(*saved, **batch.options)
    return [scores, normalizers, losses, flows, *states, *cells]


def refused(draw: Draw) -> None:
    """Arguments that no kernel can serve are refused by name, and nothing is written."""
    layer = layers.drawn(draw, filled=True)
    outs = [torch.full(shape, 3.0, dtype=torch.float64) for shape in layer.outs]
    factors = torch.ones(layer.batch)
    options, tensors = dict(layer.sum_options), list(layer.tensors.values())
    wrong = draw.one_of(
        ("threads", "lengths") if layer.family in layers.WITH_LENGTHS else ("threads", "sizes")
    )
    if wrong == "sizes" and layer.family == "embedding":
        tensors[0] = tensors[0].clone()
        value = draw.one_of((-1, -(2**63), 2**63 - 1, layer.outs[0][0]))
        tensors[0].view(-1)[draw.integer(0, tensors[0].numel() - 1)] = value
        options["padding_idx"] = None
    elif wrong == "sizes":
        reaches = layer.options["kernel_size"] > 1 and layer.tensors["g"].numel() > 0
        name, beyond = "padding", (-1, 2**31, 2**62, 2**63 - 1, -(2**63))
        if draw.chance(0.6):
            name = draw.one_of(("stride", "dilation"))
            beyond = (-1, 0, -(2**63)) if name == "stride" or not reaches else (*beyond, 0)
        options[name] = draw.one_of(beyond)
    extra = {}
    if wrong == "lengths":
        lengths = [draw.integer(0, layer.tensors["g"].shape[1]) for _ in range(layer.batch)]
        wrong_length = draw.one_of((layer.tensors["g"].shape[1] + 1, -1, 2**63 - 1, -(2**63)))
        lengths[draw.integer(0, layer.batch - 1)] = wrong_length
        extra = {"lengths": torch.tensor(lengths, dtype=torch.int64)}
    draw.note("wrong", (wrong, options, extra))
    threads = native.threads
    native.threads = lambda: draw.one_of((0, -1, -(2**31))) if wrong == "threads" else 1  # type: ignore[misc]
    try:
        for op, more in ((f"{layer.family}_weighted_sum", (factors, *outs)), (f"{layer.family}_norm_sq", ())):
            if not more and layer.family == "embedding" and wrong == "sizes":
                continue  # a norm takes no table, so every id is one
            own = options if more else {**layer.options, **(options if wrong == "sizes" else {})}
            try:
                getattr(native_ops, op)(*tensors, *more, **own, **extra)
            except ValueError:
                continue
            raise AssertionError(f"{op} accepts wrong {wrong}")
    finally:
        native.threads = threads
    for out in outs:
        assert bool((out == 3.0).all()), "a refused call has written to its output"


KINDS: Sequence[tuple[str, Callable[[Draw], None], int]] = (
    ("layers", layers.check, 10),
    ("clip", clip, 1),
    ("noise", noise, 1),
    ("step", step, 2),
    ("transducer", transducer, 2),
    ("refused", refused, 2),
)
"""Kinds of cases of native code, and how many of 18 each is."""
