"""Group *ops*: each norm op and weighted sum × method × backend, against plain PyTorch and Opacus's samplers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bench.cases import native as native_bench
from bench.cases import optim as optim_cases
from bench.cases.ops import PLAIN, Maker, OpCase
from bench.harness.checker import CANNOT, OK, WRONG
from bench.harness.results import Row, compare_rows
from bench.harness.session import Bench
from bench.harness.timer import Call, interleave, stopwatch
from dpkernels import ops

# (B, T, d, p); the first of each width also runs the ops that know only one width.
ON_CPU = [(8, t, d, p) for d, p in ((256, 256), (256, 1024), (1024, 1024)) for t in (50, 150, 500)]
ON_GPU = [(16, t, d, p) for d, p in ((1024, 1024), (1024, 4096)) for t in (188, 750)]
TOLERANCE = {torch.float32: 2e-2, torch.bfloat16: 5e-2}
"""Relative, of a norm or a sum. Norms are rounded up by design: at these shapes by up to 1 % of the square."""

SIZES = [(10**6, 100), (10**7, 100)]
"""(parameters, in so many tensors)."""

SHAPES = ON_GPU if torch.cuda.is_available() else ON_CPU


def _ids(shape: tuple[int, ...]) -> str:
    return "B{}-T{}-{}x{}".format(*shape)


@pytest.mark.parametrize("shape", SHAPES, ids=_ids)
def test_ops(bench: Bench, shape: tuple[int, int, int, int]) -> None:
    if bench.quick:
        if shape != SHAPES[0]:
            pytest.skip("--benchmark-quick: one shape")
        shape = (2, 16, 24, 32)
    size, frames, d, p = shape
    on_gpu = bench.device.startswith("cuda")
    maker = Maker(bench.device, bench.dtype, copies=_copies(bench, size * frames * (d + p)) if on_gpu else 1)
    for case in maker.cases(size, frames, d, p, layers=bench.quick or d == p):
        _run(bench, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("count", "tensors"), SIZES)
def test_fused_step(bench: Bench, count: int, tensors: int, dtype: torch.dtype) -> None:
    if bench.quick:
        if (count, dtype) != (SIZES[0][0], torch.float32):
            pytest.skip("--benchmark-quick: one size")
        count, tensors = 4096, 3
    elif bench.device.startswith("cuda"):
        count *= 20  # larger than its second-level cache
    name = str(dtype).removeprefix("torch.")
    shape = {"n": count, "tensors": tensors}
    rows, runners = {}, {}
    contenders = [optim_cases.FUSED, optim_cases.UNFUSED, optim_cases.PLAIN, optim_cases.NON_PRIVATE]
    if bench.device.startswith("cuda"):
        contenders.insert(1, optim_cases.PHILOX)
    for contender in contenders:
        rows[contender] = Row(f"noise_adamw {name}", f"noise and AdamW, {name} parameters", shape, contender)
        try:
            reason = optim_cases.wrong(contender, dtype, bench.device)
        except native_bench.CannotBuild as failure:
            rows[contender].status, rows[contender].reason = CANNOT, str(failure)
            continue
        if reason:
            rows[contender].status, rows[contender].reason = WRONG, reason
        else:
            runners[contender] = Call(optim_cases.Update(contender, count, tensors, dtype, bench.device).run)
    taken = interleave(runners, rounds=3 if bench.quick else 25, seconds=8, measure=stopwatch(bench.device))
    # The sum is read and cleared, parameter and both moments are read and written.
    least = bench.ceilings.seconds(30.0 * count, count * (16.0 + 16.0 + 2 * dtype.itemsize))
    for contender, samples in taken.items():
        rows[contender].timed(samples).floor_share = round(least / samples.median, 4)
    compare_rows(rows.values(), base=optim_cases.PLAIN)
    bench.record("ops", rows.values(), taken)
    assert rows[optim_cases.PLAIN].status == OK


def test_normals(bench: Bench) -> None:
    """ChaCha20 beside torch's own generator: Philox on a GPU, a Mersenne twister on a CPU."""
    count = 4096 if bench.quick else 10**8 if bench.device.startswith("cuda") else 10**7
    torchs = "torch.randn"

    def ours() -> Tensor:
        return ops.chacha20_normal(
            count, key=bytes(32), nonce=bytes(12), device=bench.device, dtype=torch.float32
        )

    contenders = {"dpkernels": ours, torchs: lambda: torch.randn(count, device=bench.device)}
    rows = {}
    for name, function in contenders.items():
        rows[name] = Row("chacha20_normal", "standard normals, float32", {"n": count}, name)
        deviation = float(function().double().std())
        if abs(deviation - 1) > 5 / math.sqrt(2 * count):
            rows[name].status, rows[name].reason = WRONG, f"their deviation is {deviation}"
    runners = {name: Call(function) for name, function in contenders.items() if rows[name].status == OK}
    taken = interleave(runners, rounds=3 if bench.quick else 25, seconds=4, measure=stopwatch(bench.device))
    least = bench.ceilings.seconds(20.0 * count, 4.0 * count)
    for name, samples in taken.items():
        rows[name].timed(samples).floor_share = round(least / samples.median, 4)
    compare_rows(rows.values(), base=torchs)
    bench.record("ops", rows.values(), taken)
    assert rows[torchs].status == OK


def test_noise_sums(bench: Bench) -> None:
    """Noise, grid and division of finished sums, beside torch's own generator without a grid."""
    count, tensors = (4096, 3) if bench.quick else SIZES[1]
    sums = [torch.zeros(count // tensors, dtype=torch.float64, device=bench.device) for _ in range(tensors)]
    nonces = [i.to_bytes(12, "little") for i in range(tensors)]
    torchs = "torch.normal, add, divide"

    def ours() -> None:
        ops.noise_sums(sums, key=bytes(32), nonces=nonces, noise_scale=1.0, grid=2.0**-12, divisor=8.0)

    def theirs() -> None:
        for total in sums:
            total.add_(torch.normal(0.0, 1.0, total.shape, dtype=total.dtype, device=bench.device)).div_(8.0)

    contenders = {"dpkernels": ours, torchs: theirs}
    rows = {}
    for name, function in contenders.items():
        shape = {"n": count, "tensors": tensors}
        rows[name] = Row("noise_sums", "noise on float64 sums", shape, name)
        for total in sums:
            total.zero_()
        function()
        deviation = 8.0 * float(torch.cat(sums).std())
        if abs(deviation - 1) > 5 / math.sqrt(2 * count):
            rows[name].status, rows[name].reason = WRONG, f"their deviation is {deviation}"
    runners = {name: Call(function) for name, function in contenders.items() if rows[name].status == OK}
    taken = interleave(runners, rounds=3 if bench.quick else 25, seconds=4, measure=stopwatch(bench.device))
    least = bench.ceilings.seconds(20.0 * count, 16.0 * count)
    for name, samples in taken.items():
        rows[name].timed(samples).floor_share = round(least / samples.median, 4)
    compare_rows(rows.values(), base=torchs)
    bench.record("ops", rows.values(), taken)
    assert rows[torchs].status == OK


def _copies(bench: Bench, entries: int) -> int:
    """How many argument sets outgrow the GPU's second-level cache twice over."""
    cache = torch.cuda.get_device_properties(bench.device).L2_cache_size
    return max(2, math.ceil(2 * cache / (entries * bench.dtype.itemsize)))


def _run(bench: Bench, case: OpCase) -> None:
    rows = {name: Row(case.op, case.op, case.shape, name) for name in case.contenders}
    for name, function in case.contenders.items():
        _check(rows[name], function, case, TOLERANCE[bench.dtype])
    runners = {
        name: Call(function, case.sets)
        for name, function in case.contenders.items()
        if rows[name].status == OK
    }
    taken = interleave(runners, rounds=3 if bench.quick else 25, seconds=0.8, measure=stopwatch(bench.device))
    least = bench.ceilings.seconds(case.flops, case.moved)
    for name, samples in taken.items():
        rows[name].timed(samples).floor_share = round(least / samples.median, 4)
    compare_rows(rows.values(), base=PLAIN)
    bench.record("ops", rows.values(), taken)
    assert rows[PLAIN].status == OK


def _check(row: Row, function: object, case: OpCase, limit: float) -> None:
    try:
        given = function(*case.sets[0])  # type: ignore[operator]
    except (KeyError, RuntimeError, ValueError, NotImplementedError) as error:
        row.status, row.reason = CANNOT, f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if isinstance(error, KeyError):
            row.reason = "it has no sampler for this layer"
        return
    pairs = list(zip(given if isinstance(given, tuple) else [given], case.exact, strict=True))
    error = max(_error(value, truth) for value, truth in pairs)
    row.error = float(f"{error:.1e}")
    below = row.contender.startswith("dpkernels") and case.op.endswith("norm_sq")
    if not error <= limit:
        row.status, row.reason = WRONG, f"off by {error:.1e} (limit {limit:.0e})"
    elif below and any(bool((value.double() < _unrounded(truth)).any()) for value, truth in pairs):
        row.status, row.reason = WRONG, "a norm below the exact one"


def _unrounded(truth: Tensor) -> Tensor:
    """The reference rounds up to float32: a correct norm may be one step below it."""
    return truth.double() * (1 - 2.0**-22)


def _error(given: Tensor, truth: Tensor) -> float:
    return float((given.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-300))
