"""clip_and_noise: every layer's weighted sum in one call, and noise as its epilogue."""

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dpkernels import ops
from dpkernels.backends import native, registry, torch_ops
from dpkernels.backends.native_ops import grouped as native_grouped
from dpkernels.backends.native_ops import linear as native_linear
from dpkernels.backends.torch_ops import linear as torch_linear
from dpkernels.backends.triton_ops import grouped as triton_grouped
from tests.ops.cases import Case, as_lists, make, served
from tests.ops.test_total_norm import total as total_norm
from tests.slow import in_turns

KEY = bytes(range(32))
BATCH = 3


def many(rounds: int = 2, **sizes: Any) -> list[Case]:
    """Layers of every kind, in turns."""
    return [make(family, BATCH, 7 + i, **sizes) for i in range(rounds) for family in served()]


def grouped(cases: list[Case], outs: list[Tensor], factors: Tensor, **options: Any) -> None:
    given = as_lists(cases, norms=False) | options
    ops.clip_and_noise(factors=factors.to(outs[0].device), outs=outs, **given)


def separate(cases: list[Case], factors: Tensor, start: float = 0.0) -> list[Tensor]:
    factors = factors.to(cases[0].tensors["g"].device)
    return [out for case in cases for out in case.sums(factors, start=start)]


def empty(cases: list[Case], start: float = 0.0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.full(shape, start, dtype=dtype) for case in cases for shape in case.out_shapes]


FACTORS = torch.tensor([0.3, 0.0, 1.0])


def check_same_as_one_by_one() -> None:
    cases = many()
    cases[0].tensors["x"][1] = torch.nan  # its factor is 0
    outs = empty(cases, start=0.5)
    grouped(cases, outs, FACTORS)
    for ours, alone in zip(outs, separate(cases, FACTORS, start=0.5), strict=True):
        assert torch.equal(ours, alone)


@pytest.fixture
def always_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's grouped launch also for layers that are too few to fill a GPU."""
    monkeypatch.setattr(triton_grouped, "_FEWEST_PROGRAMS", 0)


def test_same_bits_as_layer_by_layer(backend: str) -> None:
    check_same_as_one_by_one()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "out"),
    in_turns([torch.float32, torch.float16, torch.bfloat16], [torch.float64, torch.float32]),
    ids=str,
)
def test_one_launch_for_many_layers(
    triton_backend: str, always_grouped: None, dtype: torch.dtype, out: torch.dtype
) -> None:
    """The order of the float64 additions is another than layer by layer; float32 sums are rounded once."""
    cases = many(dtype=dtype)
    shapes = ((70, 32, 48, 8), (5, 30, 70, 3), (40, 64, 64, 40))
    cases += [make("lora", BATCH, *sizes, rank=rank, dtype=dtype) for *sizes, rank in shapes]
    cases += [make("linear", BATCH, 9, 77, 5, dtype=dtype), make("linear", BATCH, 9, 5, 77, dtype=dtype)]
    cases += [make("bias", BATCH, 1, p=n, dtype=dtype) for n in (3, 1100)]
    cases[0].tensors["x"][1] = torch.nan  # its factor is 0
    outs = empty(cases, start=0.5, dtype=out)
    grouped(cases, outs, FACTORS)
    off = 1e-12 if out == torch.float64 else 1e-6
    for ours, alone in zip(outs, separate(cases, FACTORS, start=0.5), strict=True):
        assert float((ours.double() - alone).norm()) <= off * (1 + float(alone.norm()))


@pytest.mark.parametrize("family", ["linear", "lora", "bias"])
def test_a_family_that_torch_serves_is_left_to_it_norm_and_sum_alike(
    triton_backend: str, always_grouped: None, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """As where Triton has no kernels for it: the bound of a grouped norm is not on what torch adds."""
    case = make(family, BATCH, 1, 40, 8)
    device, called = case.tensors["g"].device.type, []
    for op in (f"{family}_norm_sq", f"{family}_weighted_sum"):

        def by_torch(*arguments: Any, op: str = op, **options: Any) -> Any:
            called.append(op)
            return getattr(torch_ops, op)(*arguments, **options)

        chosen = (registry.OpBackend(op, device, "torch", "for this test"), by_torch)
        monkeypatch.setitem(registry._chosen, (op, device, "triton"), chosen)
    total_norm([case])
    grouped([case], empty([case]), FACTORS)
    assert called == [f"{family}_norm_sq", f"{family}_weighted_sum"]


def test_catches_a_grouped_sum_of_the_wrong_factors(
    triton_backend: str, always_grouped: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = triton_grouped._group_sums
    monkeypatch.setattr(triton_grouped, "_group_sums", lambda group, factors: real(group, factors.flip(0)))
    with pytest.raises(AssertionError):
        test_one_launch_for_many_layers(triton_backend, None, torch.float32, torch.float64)


def test_accumulates_over_micro_batches(backend: str) -> None:
    first, second = many(1), many(1)
    outs = empty(first)
    grouped(first, outs, FACTORS)
    grouped(second, outs, FACTORS.flip(0))
    pairs = zip(separate(first, FACTORS), separate(second, FACTORS.flip(0)), strict=True)
    for ours, (a, b) in zip(outs, pairs, strict=True):
        torch.testing.assert_close(ours, a + b, rtol=1e-12, atol=1e-12)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.thinned(3)
def test_a_layer_that_is_worth_all_threads(backend: str, threads: None) -> None:
    if backend == "reference":
        pytest.skip("the size is the native code's affair, and the reference takes long over it")
    torch.set_num_threads(2)
    size = (80, 144, 80) if backend == "triton" else (80, 640, 520)  # a few tiles each way: interpreted
    cases = [make("linear", BATCH, *size), *many(1)]
    outs = empty(cases)
    grouped(cases, outs, FACTORS)
    for ours, alone in zip(outs, separate(cases, FACTORS), strict=True):
        assert torch.equal(ours, alone)


def test_float32_outs(backend: str) -> None:
    cases = many(1)
    outs = empty(cases, dtype=torch.float32)
    grouped(cases, outs, FACTORS)
    for ours, exact in zip(outs, separate(cases, FACTORS), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


def test_same_bits_for_every_thread_count(threads: None) -> None:
    cases, found = many(5), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        outs = empty(cases)
        grouped(cases, outs, FACTORS, **noise(outs))
        found.append(outs)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_family_of_another_backend_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.library("cpu").handle is None:
        pytest.skip(native.library("cpu").reason)
    monkeypatch.setattr(registry, "_chosen", {})
    monkeypatch.delattr(native_linear, "linear_norm_sq")
    called = []
    real = torch_linear.linear_weighted_sum

    def counted(*args: Any, **options: Any) -> None:
        called.append(1)
        real(*args, **options)

    monkeypatch.setattr(torch_linear, "linear_weighted_sum", counted)
    check_same_as_one_by_one()
    assert len(called) == 4  # two layers, grouped and alone


# ---- noise


def noise(outs: list[Tensor], **changes: Any) -> dict[str, Any]:
    nonces = [i.to_bytes(12, "little") for i in range(len(outs))]
    return {"key": KEY, "nonces": nonces, "noise_scale": 1.5, "grid": 2.0**-12, "divisor": 6.0} | changes


@pytest.mark.thinned(3)
def test_the_epilogue_noises_and_divides(backend: str) -> None:
    cases = many(1)
    outs = empty(cases)
    grouped(cases, outs, FACTORS, **noise(outs))
    for i, (ours, total) in enumerate(zip(outs, separate(cases, FACTORS), strict=True)):
        nonce = i.to_bytes(12, "little")
        z = ops.chacha20_normal(total.numel(), key=KEY, nonce=nonce, device=total.device).view(total.shape)
        exact = ((total + 1.5 * z) / 2.0**-12).round() * 2.0**-12 / 6.0
        torch.testing.assert_close(ours, exact, rtol=1e-15, atol=1e-15)
        assert float((ours - total / 6).abs().min()) > 0


def test_the_epilogue_without_noise_divides_only(backend: str) -> None:
    cases = many(1)
    outs = empty(cases)
    grouped(cases, outs, FACTORS, **noise(outs, noise_scale=0.0, grid=0.0))
    for ours, total in zip(outs, separate(cases, FACTORS), strict=True):
        torch.testing.assert_close(ours, total / 6, rtol=1e-15, atol=0)


def test_the_gradient_is_that_of_the_fused_step() -> None:
    cases = many(1)
    outs = empty(cases)
    grouped(cases, outs, FACTORS, **noise(outs))
    sums, grads = separate(cases, FACTORS), [torch.empty(out.shape) for out in outs]
    params = [torch.zeros(out.shape) for out in outs]
    ops.noise_sgd(params, sums, [], [1.0] * len(outs), lr=1.0, grads=grads, **noise(outs))
    assert all(torch.equal(g, out.float()) for g, out in zip(grads, outs, strict=True))


# ---- refusals, and a planted fault


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"kinds": ["linear", "conv3d"]}, ValueError, "kinds: given 'conv3d'"),
        ({"xs": [torch.zeros(2, 3, 4)]}, ValueError, "xs: expected 2, one a layer; given 1"),
        ({"hs": [torch.zeros(1)]}, ValueError, "hs: expected 0, one a lora layer; given 1"),
        ({"outs": [torch.zeros(5, 4).double()]}, ValueError, "outs: expected 2, one a parameter"),
        (
            {"outs": [torch.zeros(4, 5).double().T, torch.zeros(5).double()]},
            ValueError,
            r"outs\[0\]: expected a cont",
        ),
        (
            {"outs": [torch.zeros(5, 4).double(), torch.zeros(5)]},
            TypeError,
            r"outs\[1\]: expected torch.float64",
        ),
        ({"factors": torch.ones(3)}, ValueError, r"xs\[0\]: expected a batch of 3"),
        ({"key": KEY, "nonces": [bytes(12)]}, ValueError, "nonces: expected 2"),
        ({"key": KEY, "nonces": [bytes(12)] * 2, "noise_scale": 1.0}, ValueError, "distinct nonces"),
    ],
)
def test_refuses(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {
        "xs": [torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)],
        "gs": [torch.zeros(2, 3, 5), torch.zeros(2, 3, 5)],
        "kinds": ["linear", "bias"],
        "factors": torch.ones(2),
        "outs": [torch.zeros(5, 4).double(), torch.zeros(5).double()],
    }
    with pytest.raises(error, match=message) as caught:
        ops.clip_and_noise(**{**given, **changes})
    assert ";" in str(caught.value)


def test_outs_that_overlap_are_refused() -> None:
    x, g, out = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), torch.zeros(6, 4).double()
    with pytest.raises(ValueError, match="two that overlap"):
        ops.clip_and_noise([x, x], [g, g], ["linear"] * 2, torch.ones(2), [out[:5], out[1:]])


def test_float32_outs_are_not_noised() -> None:
    cases = many(1)
    outs = empty(cases, dtype=torch.float32)
    with pytest.raises(TypeError, match="float64, because noise is added"):
        grouped(cases, outs, FACTORS, **noise(outs))


def test_ids_outside_a_table_are_refused() -> None:
    case = copy.deepcopy(make("embedding", BATCH))
    case.tensors["ids"][2, 0] = 99
    with pytest.raises(ValueError, match="ids"):
        grouped([case], empty([case]), torch.ones(BATCH))


def test_no_layers_is_nothing_to_do() -> None:
    ops.clip_and_noise([], [], [], torch.ones(2), [])


def test_a_planted_padding_that_joins_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.library("cpu").handle is None:
        pytest.skip(native.library("cpu").reason)
    count = itertools.count()
    real = native_grouped._row

    def swapped(layer: Any, kept: list[Tensor]) -> Any:
        if next(count) == 3:  # the padding's gradient joins
            layer = layer._replace(options={"padding_idx": -1})
        return real(layer, kept)

    monkeypatch.setattr(native_grouped, "_row", swapped)
    with pytest.raises(AssertionError):
        check_same_as_one_by_one()
