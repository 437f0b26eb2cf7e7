"""Every Triton kernel compiled for every architecture, without a GPU: registers, spills, shared memory, instructions.

    python -m bench.gpu.triton_table                                 the whole table; bench/results/triton_table.json
    python -m bench.gpu.triton_table --architectures 90 --families linear --dtypes bfloat16

What is compiled is what the ops launch: each op is called on tensors without data, and a compiler stands in for the
launch. So every family in `triton_ops` is in the table as soon as `examples` can call it. Nothing runs and nothing
is timed. Exit status 1 where a kernel spills, needs more shared memory than the chip has, is a 16-bit matrix
kernel without tensor cores, or without wgmma on sm_90, or accumulates in one chain what the bounds say is cut.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from dpkernels.backends import registry, triton_ops
from dpkernels.backends.layer import GroupedLayer
from dpkernels.backends.triton_ops import availability, launching
from dpkernels.ops.layers import KINDS

OUTPUT = Path(__file__).resolve().parents[1] / "results" / "triton_table.json"
ARCHITECTURES = (80, 90, 100)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LAYOUTS = ("aligned", "ragged", "transposed")
SHARED_LIMIT = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    103: 227 * 1024,
    120: 99 * 1024,
}
"""Bytes of shared memory that one block may have (CUDA C programming guide, technical specifications)."""


@dataclass(frozen=True)
class Row:
    """One compiled kernel.

    Attributes:
        kernel, dtype, architecture, layout, config: what was compiled; `layout` of the tensors it reads.
        registers: of a thread.
        spilled: bytes of a thread's stack; where a kernel has no arrays, as here, that is what was spilled.
        shared, shared_limit: bytes a block.
        matrix: the matrix instruction in its PTX; "fma" where `tl.dot` became multiply-adds, "" where it has none.
        cut: whether products are accumulated from 0 and then added; None where there are none.
    """

    kernel: str
    dtype: str
    architecture: int
    layout: str
    config: str
    registers: int
    spilled: int
    shared: int
    shared_limit: int
    matrix: str
    cut: bool | None

    @property
    def faults(self) -> list[str]:
        """What must not be."""
        messages = []
        if self.spilled:
            messages.append(f"spills {self.spilled} bytes")
        if self.shared > self.shared_limit:
            messages.append(f"needs {self.shared} of {self.shared_limit} bytes of shared memory")
        if self.architecture == 90 and self.matrix and self.dtype != "float32" and self.matrix != "wgmma":
            messages.append(f"uses {self.matrix}, not wgmma")
        if self.matrix == "fma" and self.dtype != "float32":
            messages.append("multiplies without tensor cores, which the bounds count on")
        if self.cut is False:
            messages.append("accumulates in one chain")
        return messages


class _Driver:
    """What `JITFunction.warmup` asks of the active driver, for a GPU that is not there."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


def examples(
    family: str, dtype: torch.dtype, layout: str
) -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """(op, arguments, options) of calls of a family that reach all of its kernels; tensors have no data."""
    width, wide = (1001, 329) if layout == "ragged" else (1024, 512)

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        if layout == "transposed" and len(shape) == 3:
            return torch.empty(shape[0], shape[2], shape[1], dtype=kind, device="meta").transpose(1, 2)
        return torch.empty(*shape, dtype=kind, device="meta")

    batch = 4
    factors = torch.empty(batch, device="meta")
    if family.startswith("transducer_"):
        yield from _transducer(family, dtype, layout)
        return
    if family not in KINDS:  # no norm with its weighted sum
        yield from _grouped(family, empty, factors, width, wide)
        return
    lengths = torch.empty(batch, dtype=torch.int64, device="meta")
    takes = inspect.signature(getattr(triton_ops, f"{family}_norm_sq")).parameters
    # taps: a usual filter's, and the most that a program takes
    for frames, rank, taps in ((188, 16, 5), (3000, 64, 33), (188, 8, 9)):
        tensors, outs = _layer(family, empty, (batch, frames, width, wide), rank, taps)
        options: dict[str, Any] = {"lengths": lengths} if "lengths" in takes else {}
        if "padding" in takes:
            options["padding"] = taps // 2
        extra = dict.fromkeys(KINDS[family].norm_options, taps)
        yield f"{family}_norm_sq", tensors, {**options, **extra}
        if frames > wide and "lengths" in options:  # without lengths, the host knows that no sample is short
            yield f"{family}_norm_sq", tensors, extra
        for kind in (torch.float64, torch.float32):
            sums = tuple(torch.empty(*shape, dtype=kind, device="meta") for shape in outs)
            yield f"{family}_weighted_sum", (*tensors, factors, *sums), options
            if family == "linear":  # without lengths, as the engine has it, its sum is another loop
                yield f"{family}_weighted_sum", (*tensors, factors, *sums), {}


def _transducer(
    family: str, dtype: torch.dtype, layout: str
) -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """As `examples`, for an op of the transducer loss: Parakeet's joint network, as a TDT and as an RNN-T."""
    hidden, classes = (329, 1001) if layout == "ragged" else (640, 8198)
    batch, frames, labels = 4, 188, 50
    cells = (batch, frames, labels + 1)

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=kind, device="meta")

    lengths = (empty(batch, kind=torch.int64), empty(batch, kind=torch.int64))
    for durations, activation in (((0, 1, 2, 3, 4), "relu"), ((), "tanh")):
        outputs = classes + len(durations)
        scores = empty(*cells, 2 + len(durations), kind=torch.float32)
        if family == "transducer_lattice":
            yield family, (scores, *lengths), {"durations": durations}
            continue
        states = (empty(batch, frames, hidden), empty(batch, labels + 1, hidden), empty(outputs, hidden))
        bias = empty(outputs) if durations else None
        joint = (*states, bias, empty(batch, labels, kind=torch.int64), *lengths)
        normalizers = empty(*cells, 2 if durations else 1, kind=torch.float32)
        backward = (normalizers, scores, empty(batch, kind=torch.float32))
        arguments = joint if family == "transducer_scores" else (*joint, *backward)
        yield family, arguments, {"blank": 0, "durations": durations, "activation": activation}


def _layer(
    family: str, empty: Callable[..., Tensor], sizes: tuple[int, int, int, int], rank: int, taps: int
) -> tuple[tuple[Tensor, ...], tuple[tuple[int, ...], ...]]:
    """The tensors of a layer, and the shapes of its sums.

    Raises:
        ValueError: the family has no layer here.
    """
    batch, frames, width, wide = sizes
    if family == "linear":
        return (empty(batch, frames, width), empty(batch, frames, wide)), ((wide, width),)
    if family == "bias":
        return (empty(batch, frames, width),), ((width,),)
    if family == "lora":
        tensors = tuple(empty(batch, frames, n) for n in (width, rank, wide, rank))
        return tensors, ((rank, width), (wide, rank))
    if family == "layer_norm":
        return (empty(batch, frames, width),) * 2, ((width,),)
    if family == "embedding":
        ids = torch.empty(batch, frames, dtype=torch.int64, device="meta")
        return (ids, empty(batch, frames, width)), ((1000, width),)
    if family == "depthwise_conv1d":
        return (empty(batch, width, frames),) * 2, ((width, 1, taps),)
    raise ValueError(f"family: {family!r} has Triton kernels, but no layer here; add it to `_layer`")


def _grouped(
    family: str, empty: Callable[..., Tensor], factors: Tensor, width: int, wide: int
) -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """As `examples`, for the ops on many layers: a LoRA layer and a vector, so many that they are grouped."""
    batch, layers = len(factors), 16
    for frames, rank in ((188, 8), (188, 16), (188, 64), (3000, 16), (3000, 64)):
        x, h, g, dh = (empty(batch, frames, n) for n in (width, rank, wide, rank))
        if family == "lora_gradients":
            yield "lora_gradients", (x, h, g, dh), {}
            continue
        vector = GroupedLayer("bias", (torch.empty(batch, 1, width, device="meta"),))
        loras = [GroupedLayer("lora", (x, h, g, dh), {"scaling": 1.0})] * layers
        if family == "total_norm_sq":
            yield family, ([*loras, vector],), {}
            continue
        if family != "weighted_sums":
            raise ValueError(
                f"family: {family!r} has Triton kernels, but no calls here; add them to `_grouped`"
            )
        for kind in (torch.float64, torch.float32):
            of_a, of_b, of_vector = (
                torch.empty(*shape, dtype=kind, device="meta")
                for shape in ((rank, width), (wide, rank), (width,))
            )
            given = [lora._replace(outs=(of_a, of_b)) for lora in loras]
            yield family, ([*given, vector._replace(outs=(of_vector,))], factors), {}


def families() -> list[str]:
    """Families that have Triton kernels."""
    return [name for name, ops in registry.families().items() if all(hasattr(triton_ops, op) for op in ops)]


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of a kernel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if match is None:
        raise RuntimeError(f"cuobjdump: no resource usage in its output:\n{text}")
    return int(match[1]), int(match[2])


def _matrix(ptx: str, ttgir: str) -> str:
    for name, text in (("wgmma", "wgmma.mma_async"), ("tcgen05", "tcgen05.mma"), ("mma.sync", "mma.sync")):
        if text in ptx:
            return name
    return "fma" if re.search(r"= tt\.dot ", ttgir) else ""


def cut(ttir: str) -> bool | None:
    """Whether every product starts at a constant 0, so that what is added to it is another accumulation."""
    products = re.findall(r"= tt\.dot [^,]+, [^,]+, (%\w+)", ttir)
    if not products:
        return None
    zeros = set(re.findall(r"(%\w+) = arith\.constant dense<0\.0+e\+00>", ttir))
    return all(accumulator in zeros for accumulator in products)


def compiled(
    architectures: Sequence[int],
    dtypes: Sequence[torch.dtype],
    names: Sequence[str],
    layouts: Sequence[str],
    kernels: Sequence[str] = (),
) -> Iterator[Row]:
    """One row for every distinct kernel (of `kernels`, where given) that the examples of families `names` launch.

    Raises:
        RuntimeError: triton is interpreting kernels, so that none can be compiled.
    """
    if availability.interpreting():
        raise RuntimeError("TRITON_INTERPRET is set, so kernels cannot be compiled; unset it")
    rows: list[Row] = []
    seen: set[str] = set()
    place = Row("", "", 0, "", "", 0, 0, 0, 0, "", None)

    def compile_instead(
        function: Any,
        programs: int,
        device: torch.device,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
    ) -> None:
        types = [str(getattr(a, "dtype", type(a))) for a in arguments]
        key = f"{function.__name__} {place.architecture} {types} {sorted(keywords.items())}"
        if key in seen or (kernels and function.__name__ not in kernels):
            return
        seen.add(key)
        kernel = function.warmup(*arguments, grid=(1,), **keywords, **launching.OPTIONS)
        if hasattr(kernel, "result"):
            kernel = kernel.result()
        registers, spilled = _resources(kernel.asm["cubin"])
        config = " ".join(f"{name}={value}" for name, value in keywords.items())
        rows.append(
            replace(
                place,
                kernel=function.__name__,
                config=config,
                registers=registers,
                spilled=spilled,
                shared=kernel.metadata.shared,
                shared_limit=SHARED_LIMIT[place.architecture],
                matrix=_matrix(kernel.asm["ptx"], kernel.asm["ttgir"]),
                cut=cut(kernel.asm["ttir"]),
            )
        )

    for architecture in architectures:
        driver.set_active(_Driver(architecture))
        with (
            mock.patch.object(launching, "execute", compile_instead),
            mock.patch.object(launching, "architecture", lambda device, a=architecture: a),
            # What an op leaves to a layer's own family is Triton's as well.
            mock.patch.object(registry, "implementation", lambda op, device: getattr(triton_ops, op)),
        ):
            for dtype in dtypes:
                for layout in layouts:
                    name = str(dtype).removeprefix("torch.")
                    place = replace(place, dtype=name, architecture=architecture, layout=layout)
                    for family in names:
                        for op, arguments, options in examples(family, dtype, layout):
                            getattr(triton_ops, op)(*arguments, **options)
                            yield from rows
                            rows.clear()


def show(rows: Sequence[Row], console: Console) -> None:
    """The table, a line for each row, faults in red."""
    title = f"Triton {triton.__version__}: compiled, not run; no figure here is a timing"
    table = Table(title=title, title_justify="left")
    for name in ("kernel", "dtype", "sm", "layout", "registers", "spilled", "shared KiB", "matrix", "faults"):
        table.add_column(name, justify="right" if name in ("registers", "spilled", "shared KiB") else "left")
    for row in rows:
        numbers = (str(row.registers), str(row.spilled), f"{row.shared / 1024:.1f}")
        where = (row.kernel, row.dtype, str(row.architecture), row.layout)
        table.add_row(
            *where, *numbers, row.matrix, f"[red]{'; '.join(row.faults)}[/red]" if row.faults else ""
        )
    console.print(table)


def save(rows: Sequence[Row], path: Path) -> None:
    """Write the rows, a line each so that differences are readable, after counts of them."""
    head = {
        "what": "static compile table: registers, spills and shared memory as the compiler reports them; not timings",
        "triton": triton.__version__,
        "torch": torch.__version__,
        "architectures": sorted({row.architecture for row in rows}),
        "kernels": len({row.kernel for row in rows}),
        "compiled": len(rows),
        "spilling": sum(row.spilled > 0 for row in rows),
        "faulty": sum(bool(row.faults) for row in rows),
    }
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{json.dumps(head)[:-1]},\n"rows": [\n{lines}\n]}}\n', encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    def listed(text: str) -> list[str]:
        return [part for part in text.split(",") if part]

    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.triton_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for option, default in (
        ("architectures", [str(a) for a in ARCHITECTURES]),
        ("dtypes", names),
        ("families", families()),
        ("layouts", list(LAYOUTS)),
    ):
        parser.add_argument(
            f"--{option}", type=listed, default=default, help=f"of {','.join(default)}; default: all"
        )
    parser.add_argument("--kernels", type=listed, default=[], help="by their functions' names; default: all")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    given = parser.parse_args(arguments)
    rows = list(
        compiled(
            [int(a) for a in given.architectures],
            [getattr(torch, name) for name in given.dtypes],
            given.families,
            given.layouts,
            given.kernels,
        )
    )
    show(rows, Console(width=None if sys.stdout.isatty() else 160))
    save(rows, given.output)
    faulty = sum(bool(row.faults) for row in rows)
    print(f"{len(rows)} kernels, {faulty} with faults; written to {given.output}")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
