"""How this GPU's tensor cores round, found by experiments through the kernels' own `product`, beside what is assumed.

    python -m bench.gpu.tensor_cores              prints what was found; exit status 1 where it is coarser than
                                                  assumed; $OUT/<device>/tensor_cores.json (OUT: bench/results)
    python -m bench.gpu.tensor_cores --model 8,1  without a GPU: a device in software, of 8 products and 1 extra bit

An experiment is an inner product whose terms are zeros but for a few. `BIG` and -`BIG` cancel, and what is left of a
small term beside them tells how it was cut: that needs no assumption on the rounding of the sum.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.gpu.tensor_core_model import CUTS, Model
from bench.gpu.tensor_core_search import Dots, random_rows, worst
from bench.harness import machine
from dpkernels.backends.triton_ops import bounds

BIG = 15
"""Exponent of the large terms: small ones are then normal numbers' products down to 2⁻²⁸, in float16 too."""

_LEAST_BLOCK = 4
"""Products of a block that the experiments need."""

MOST_BITS = 40
"""A term this many bits below the largest counts as lost: a device that keeps it has no need of a bound."""


@dataclass(frozen=True)
class Found:
    """What the experiments say of one dtype, chain and instruction.

    Attributes:
        blocks: products in each block, in the order in which blocks are added; in_order: whether a block's products
            are neighbours, and blocks follow each other as the products do.
        kept: bits that a product, a product beside a large accumulator, and a small accumulator keep below the
            largest term of their block; None, and "unknown" below, where blocks are too few or too small to tell.
        align, final: how a term is cut in the alignment, and a block's sum to float32.
        accumulator: whether it is aligned with the products or added to their sum.
        subnormals: whether subnormal factors are taken; subnormal_exponent: the one that aligns a subnormal factor,
            less that of the smallest normal number: 0, or below where its own digits count.
        zero_counts: whether a factor 0 beside a large one moves the alignment.
        antisymmetric: whether -a gives -(a·b), bit for bit.
        model_agrees: share of random rows that have the bits of the model with these properties.
        worst: error over the assumed bound, the largest found by a search.
    """

    dtype: str
    chain: int
    instruction: str
    blocks: list[int]
    in_order: bool
    kept: list[int | None]
    align: str
    final: str
    accumulator: str
    subnormals: bool
    subnormal_exponent: int
    zero_counts: bool
    antisymmetric: bool
    model_agrees: float | None
    worst: float

    @property
    def block(self) -> int:
        """Products in the smallest block."""
        return min(self.blocks)

    @property
    def extra(self) -> int:
        """Bits kept below float32's 23."""
        return min((bits for bits in self.kept if bits is not None), default=0) - 23

    def faults(self, assumed: bounds.TensorCore) -> list[str]:
        """In what it is coarser than assumed."""
        messages = []
        if self.block < min(assumed.block, self.chain):
            messages.append(f"blocks of {self.block} products, not {assumed.block}")
        if self.extra < assumed.extra:
            messages.append(f"{self.extra} extra bits, not {assumed.extra}")
        for what, cut in (("a term", self.align), ("a sum", self.final)):
            if cut not in (*_NAMES.values(), "unknown"):
                messages.append(f"¾ and -¾ of the last place of {what} became {cut}")
        if not self.subnormals:
            messages.append("subnormal factors are lost")
        if self.subnormal_exponent > 0:
            messages.append("subnormal factors are aligned above the smallest normal number")
        if not self.worst <= 1.0:
            messages.append(f"an error of {self.worst:.2f} times the bound")
        return [f"{self.dtype}, chain {self.chain}, {self.instruction}: {fault}" for fault in messages]


class Experiments:
    """Inner products of rows that are zero but for given pairs of factors, on one device."""

    def __init__(self, dots: Dots, dtype: torch.dtype, chain: int, device: str = "cpu") -> None:
        self.dots, self.dtype, self.chain, self.device = dots, dtype, chain, device

    def run(self, rows: Sequence[dict[int, tuple[float, float]]]) -> list[float]:
        """Each row's result; a row is {place: (factor, factor)}."""
        a, b = (torch.zeros(len(rows), self.chain, dtype=torch.float64) for _ in range(2))
        at = [(i, place) for i, row in enumerate(rows) for place in row]
        index = tuple(torch.tensor(at).T)
        for tensor, which in ((a, 0), (b, 1)):
            tensor[index] = torch.tensor(
                [pair[which] for row in rows for pair in row.values()], dtype=torch.float64
            )
        narrow = [t.to(self.dtype) for t in (a, b)]
        assert all(torch.equal(n.double(), t) for n, t in zip(narrow, (a, b), strict=True))
        return self.dots(*(t.to(self.device) for t in narrow)).double().tolist()

    def kept(self, row: Callable[[tuple[float, float]], dict[int, tuple[float, float]]]) -> int:
        """The smallest term, in bits below BIG, of which something is left."""
        bits = range(10, MOST_BITS + 1)
        left = self.run([row(power(BIG - j)) for j in bits])
        return max((j for j, value in zip(bits, left, strict=True) if value), default=0)


def power(exponent: int, factor: float = 1.0) -> tuple[float, float]:
    """Two factors whose product is factor · 2^exponent, both normal numbers in float16."""
    half = exponent // 2
    return factor * 2.0**half, 2.0 ** (exponent - half)


def minus(pair: tuple[float, float]) -> tuple[float, float]:
    return -pair[0], pair[1]


def ranks(e: Experiments) -> list[int]:
    """For each place the number of its block, in the order in which blocks are added.

    A small term is lost beside BIG and beside -BIG, and if it came before them, as part of the accumulator. So it is
    left only where both are in earlier blocks: that is counted, over pairs of places at every distance 2^k.
    """
    pairs = [(i, i | s) for s in _powers_below(e.chain) for i in range(e.chain) if not i & s]
    a, b = (torch.zeros(len(pairs), e.chain, e.chain, dtype=e.dtype) for _ in range(2))
    small, every = power(BIG - MOST_BITS), range(e.chain)
    a[:, every, every], b[:, every, every] = small[0], small[1]
    for n, pair in enumerate(pairs):
        a[n][:, pair], b[n][:, pair] = torch.tensor(power(BIG), dtype=e.dtype)
        a[n][:, pair[1]] *= -1
    flat = (t.flatten(0, 1).to(e.device) for t in (a, b))
    left = (e.dots(*flat) != 0).view(len(pairs), e.chain).cpu()
    for n, pair in enumerate(pairs):
        left[n, pair] = False
    later = left.sum(0).tolist()
    order = sorted(set(later))
    return [order.index(n) for n in later]


def _powers_below(n: int) -> list[int]:
    return [1 << k for k in range(n.bit_length() - 1)]


def cut_name(up: float, down: float) -> str:
    """From what ¾ and -¾ of a unit became, in units."""
    return _NAMES.get((up, down), f"{up:g}, {down:g}")


_NAMES = {(0.0, 0.0): "toward zero", (1.0, -1.0): "to nearest", (0.0, -1.0): "down", (1.0, 0.0): "up"}


def alignment_cut(e: Experiments, first: list[int], bits: int) -> str:
    """How ¾ of the last place that is kept is cut, of a positive and of a negative term."""
    small, unit = power(BIG - bits - 2, 1.5), 2.0 ** (BIG - bits)
    small = small[0], 2 * small[1]
    big = power(BIG)
    rows = [{first[0]: big, first[1]: term, first[2]: minus(big)} for term in (small, minus(small))]
    up, down = e.run(rows)
    return cut_name(up / unit, down / unit)


def final_cut(e: Experiments, first: list[int]) -> str:
    """How ¾ of a float32's last place is cut: 4.5 + 7·2⁻²³, whose terms no alignment cuts."""
    terms = [power(BIG, 1.5)] * 3 + [power(BIG - 21, 1.75)]
    rows = [dict(zip(first[:4], signed, strict=True)) for signed in (terms, [minus(term) for term in terms])]
    up, down = (value / 2.0**BIG for value in e.run(rows))
    return cut_name((up - 4.5) * 2.0**21 - 1, (down + 4.5) * 2.0**21 + 1)


def accumulator_place(e: Experiments, first: list[int], second: list[int], bits: int) -> str:
    """A block of products that are each too small beside the accumulator, and together are not."""
    half = power(BIG - bits - 1)
    if len(second) * 2.0 ** (-bits - 1) < 2.0**-23:
        return "unknown"
    [value] = e.run([{first[0]: power(BIG), **dict.fromkeys(second, half)}])
    return "aligned with the products" if value == 2.0**BIG else "added to their sum"


def subnormals(e: Experiments, first: list[int], bits: int) -> tuple[bool, int]:
    """(whether they are taken, the exponent that aligns them less that of the smallest normal number)."""
    info = torch.finfo(e.dtype)
    tiny, least = info.smallest_normal * info.eps, math.frexp(info.smallest_normal)[1] - 1
    [alone] = e.run([{first[0]: (tiny, 2.0**BIG)}])
    exponents = range(-28, least + BIG) if e.dtype == torch.float16 else range(-160, least + BIG)
    rows = [{first[0]: (tiny, 2.0**BIG), first[1]: power(x), first[2]: (-tiny, 2.0**BIG)} for x in exponents]
    smallest = min(
        (x for x, value in zip(exponents, e.run(rows), strict=True) if value), default=exponents[-1]
    )
    exponent = least + round(math.log2(info.eps))  # of the subnormal number by its digits
    return alone == tiny * 2.0**BIG, max(smallest + bits - BIG, exponent) - least


def zero_counts(e: Experiments, first: list[int]) -> bool:
    [value] = e.run([{first[0]: (0.0, 2.0**BIG), first[1]: power(-28)}])
    return value != 2.0**-28


def measure(
    dots: Dots,
    dtype: torch.dtype,
    chain: int,
    assumed: bounds.TensorCore,
    *,
    instruction: str = "",
    device: str = "cpu",
    rows: int = 2000,
    rounds: int = 200,
) -> Found:
    """All experiments on one device.

    Args:
        dots: the device.
        dtype: torch.bfloat16 or torch.float16.
        chain: products in one accumulation.
        assumed: what its bound is made of.
        instruction: what it is called, for the result.
        device: where its tensors must be.
        rows, rounds: of the search, and of the comparison with the model.
    """
    e = Experiments(dots, dtype, chain, device)
    of_place = ranks(e)
    members = [[p for p in range(chain) if of_place[p] == r] for r in range(max(of_place) + 1)]
    big, first = power(BIG), members[0]
    kept: list[int | None] = [None, None, None]
    align = final = accumulator = "unknown"
    taken, exponent, counts = True, 0, False
    if len(first) >= _LEAST_BLOCK:
        kept[0] = e.kept(lambda small: {first[0]: big, first[1]: small, first[2]: minus(big)})
        align, final = alignment_cut(e, first, kept[0]), final_cut(e, first)
        (taken, exponent), counts = subnormals(e, first, kept[0]), zero_counts(e, first)
        if len(members) > 1 and len(members[1]) > 1:
            second = members[1]
            kept[1] = e.kept(lambda small: {first[0]: big, second[0]: minus(big), second[1]: small})
            kept[2] = e.kept(lambda small: {first[0]: small, second[0]: big, second[1]: minus(big)})
            accumulator = accumulator_place(e, first, second, kept[1])
    generator = torch.Generator(device).manual_seed(1)
    pairs = [random_rows(rows, chain, dtype, generator, tiny) for tiny in (False, True)]
    a, b = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    results = dots(a, b)
    agrees = None
    if kept[0] is not None and align in CUTS and final in CUTS:
        late = accumulator == "added to their sum"
        model = Model(len(first), kept[0] - 23, align, final, late, taken, counts)
        agrees = round(float((model(a.cpu(), b.cpu()) == results.cpu()).double().mean()), 6)
    return Found(
        dtype=str(dtype).removeprefix("torch."),
        chain=chain,
        instruction=instruction,
        blocks=[len(block) for block in members],
        in_order=of_place == sorted(of_place),
        kept=kept,
        align=align,
        final=final,
        accumulator=accumulator,
        subnormals=taken,
        subnormal_exponent=exponent,
        zero_counts=counts,
        antisymmetric=bool(torch.equal(dots(-a, b), -results)),
        model_agrees=agrees,
        worst=round(
            worst(dots, dtype, chain, chain * assumed.roundings * bounds.UNIT, rows, rounds, device), 4
        ),
    )


CASES = tuple(
    (dtype, chain, rows)
    for dtype in (torch.bfloat16, torch.float16)
    for chain, rows in ((16, 64), (64, 64), (128, 64), (64, 16))
)
"""(dtype, chain, rows of a tile): the chains of the kernels, and the other instruction that Triton may choose."""


def of_this_gpu(cases: Iterable[tuple[torch.dtype, int, int]] = CASES) -> list[Found]:
    """All experiments on the current CUDA device."""
    from dpkernels.backends.triton_ops import launching, tensor_cores

    assumed = bounds.tensor_core(launching.architecture(torch.device("cuda")))
    experiments = []
    for dtype, chain, rows in cases:

        def dots(a: Tensor, b: Tensor, rows: int = rows) -> Tensor:
            return tensor_cores.row_products_of(a, b, rows)

        name = tensor_cores.instruction(dtype, chain, rows)
        experiments.append(measure(dots, dtype, chain, assumed, instruction=name, device="cuda"))
    return experiments


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.tensor_cores",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, help="the JSON file to write instead")
    parser.add_argument("--model", help="products of a block, extra bits: probe a device in software")
    parser.add_argument("--architecture", type=int, help="whose bound --model is held against; default: any")
    given = parser.parse_args(arguments)
    report: dict[str, Any]
    if given.model:
        block, extra = (int(n) for n in given.model.split(","))
        architecture = given.architecture or 0
        assumed = bounds.tensor_core(architecture)
        report = {"about": {"device": f"model of {block} products, {extra} extra bits"}}
        experiments = [
            measure(Model(block, extra), dtype, 64, assumed, rows=200, rounds=20)
            for dtype in (torch.bfloat16, torch.float16)
        ]
    elif torch.cuda.is_available():
        architecture = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
        assumed, experiments = bounds.tensor_core(architecture), of_this_gpu()
        report = {"about": machine.about("cuda")}
    else:
        print("no GPU here; fix: run this on a machine with one, or give --model", file=sys.stderr)
        return 2
    faults = [fault for experiment in experiments for fault in experiment.faults(assumed)]
    report |= {
        "architecture": architecture,
        "assumed": asdict(assumed) | {"roundings": assumed.roundings},
        "faults": faults,
    }
    head = json.dumps(report, indent=1, ensure_ascii=False).removesuffix("\n}")
    lines = ",\n  ".join(json.dumps(asdict(experiment), ensure_ascii=False) for experiment in experiments)
    text = f'{head},\n "found": [\n  {lines}\n ]\n}}'
    print(text)
    if given.output is None and not given.model:
        given.output = machine.path(report["about"], "tensor_cores")
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(text + "\n", encoding="utf-8")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
