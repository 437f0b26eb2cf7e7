"""Native CPU kernels against the float64 reference: values, signed bias, independence, what is not read."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from dpkernels import reference
from dpkernels.backends import native

if native.unavailable_reason("cpu"):
    pytest.skip(native.unavailable_reason("cpu"), allow_module_level=True)
from dpkernels.backends import native_ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
VOCABULARY = 7

# How far a norm's upper bound may lie above the exact square. Training types: 4κuS/‖G‖ with κ <= 73 and
# S/‖G‖ ~ √T for random inputs, T <= 600; Gram may use 1 % of the square. Float64: the rounding to float32.
ABOVE = {torch.float32: 5e-3, torch.bfloat16: 5e-3, torch.float16: 5e-3, torch.float64: 1.3e-7}
GRAM_ABOVE = 1.5e-2
# A weighted sum's distance from the exact one, relative to its norm (float32 products, float64 across).
SUM_OFF = {torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6, torch.float64: 1e-14}

# B, T, d, p: one frame, less and more than a tile, no multiple of one, above a chunk (64) and a block (512),
# nothing.
SIZES = [
    (3, 1, 1, 1),
    (1, 1, 3, 5),
    (2, 50, 144, 33),
    (2, 65, 32, 129),
    (1, 600, 40, 33),
    (2, 0, 4, 5),
    (0, 3, 4, 5),
    (2, 3, 0, 5),
]


@dataclass(frozen=True)
class Call:
    """One op: its float inputs, what else it takes, and the sizes of its sum's outputs."""

    name: str
    inputs: tuple[Tensor, ...]
    outs: tuple[tuple[int, ...], ...]
    ids: Tensor | None = None
    options: tuple[tuple[str, Any], ...] = ()
    sum_options: tuple[tuple[str, Any], ...] = ()
    takes_lengths: bool = True

    def arguments(self) -> tuple[Tensor, ...]:
        return self.inputs if self.ids is None else (self.ids, *self.inputs)

    def norms(self, module: Any, **extra: Any) -> tuple[Tensor, ...]:
        result = getattr(module, f"{self.name}_norm_sq")(*self.arguments(), **dict(self.options), **extra)
        return result if isinstance(result, tuple) else (result,)

    def sums(
        self, module: Any, factors: Tensor, dtype: torch.dtype = torch.float64, **extra: Any
    ) -> tuple[Tensor, ...]:
        outs = tuple(torch.ones(size, dtype=dtype) for size in self.outs)
        options = dict(self.sum_options)
        getattr(module, f"{self.name}_weighted_sum")(*self.arguments(), factors, *outs, **options, **extra)
        return outs

    def sample(self, i: int) -> "Call":
        ids = None if self.ids is None else self.ids[i : i + 1]
        inputs = tuple(t[i : i + 1].clone() for t in self.inputs)
        return Call(self.name, inputs, self.outs, ids, self.options, self.sum_options, self.takes_lengths)


def randn(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*size).to(dtype)


def calls(batch: int, frames: int, d: int, p: int, dtype: torch.dtype = torch.float32) -> Iterator[Call]:
    """Every op on random inputs of that size."""
    x, g = randn(batch, frames, d, dtype=dtype), randn(batch, frames, p, dtype=dtype)
    yield Call("linear", (x, g), ((p, d),), options=(("method", "direct"),))
    yield Call("linear", (x, g), ((p, d),), options=(("method", "gram"),))
    yield Call("bias", (g,), ((p,),))
    yield Call("layer_norm", (randn(batch, frames, p, dtype=dtype), g), ((p,),))
    for rank in (1, 8, 13):
        h, dh = randn(batch, frames, rank, dtype=dtype), randn(batch, frames, rank, dtype=dtype)
        scaling = (("scaling", 2.5),)
        yield Call("lora", (x, h, g, dh), ((rank, d), (p, rank)), options=scaling, sum_options=scaling)
    ids = torch.randint(0, VOCABULARY, (batch, frames))
    for padding in (None, 3):
        options = (("padding_idx", padding),)
        yield Call("embedding", (g,), ((VOCABULARY, p),), ids, options, options, takes_lengths=False)
    for taps, stride, padding, dilation in ((9, 1, 4, 1), (3, 2, 1, 2), (1, 3, 0, 1), (17, 1, 0, 3)):
        reach = frames + 2 * padding - dilation * (taps - 1) - 1
        gradient = randn(batch, d, max(0, reach // stride + 1), dtype=dtype)
        shape = (("stride", stride), ("padding", padding), ("dilation", dilation))
        yield Call(
            "depthwise_conv1d",
            (randn(batch, d, frames, dtype=dtype), gradient),
            ((d, 1, taps),),
            options=(("kernel_size", taps), *shape),
            sum_options=shape,
            takes_lengths=False,
        )


def check_norms(call: Call, given: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
    """Not below the reference (which is rounded up too), and not far above it."""
    dtype = call.inputs[0].dtype
    allowed = GRAM_ABOVE if ("method", "gram") in call.options and dtype != torch.float64 else ABOVE[dtype]
    for one, truth in zip(given, exact, strict=True):
        assert one.dtype == torch.float32
        assert (one >= truth).all(), f"{call.name} {call.options}: {one} below {truth}"
        assert (one.double() <= truth.double() * (1 + allowed) + 1e-30).all(), (
            f"{call.name}: {one} above {truth}"
        )


def check_sums(call: Call, given: tuple[Tensor, ...], exact: tuple[Tensor, ...], allowed: float) -> None:
    for one, truth in zip(given, exact, strict=True):
        size = (truth.double() - 1).norm() + 1e-30
        assert (one.double() - truth.double()).norm() <= allowed * size + 1e-15 * truth.numel(), call.name


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20)


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    try:
        native.set_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    native.set_isa("")


@pytest.mark.thinned(5)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_and_sums_match_the_reference(
    size: tuple[int, int, int, int], dtype: torch.dtype, instructions: str
) -> None:
    for call in calls(*size, dtype=dtype):
        check_norms(call, call.norms(native_ops), call.norms(reference))
        factors = torch.rand(size[0])
        check_sums(call, call.sums(native_ops, factors), call.sums(reference, factors), SUM_OFF[dtype])


def test_a_float32_output_is_rounded_once() -> None:
    for call in calls(3, 40, 21, 34):
        factors = torch.rand(3)
        given = call.sums(native_ops, factors, torch.float32)
        exact = call.sums(native_ops, factors)
        for one, truth in zip(given, exact, strict=True):
            torch.testing.assert_close(one, truth.float(), rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_change_no_bit(dtype: torch.dtype) -> None:
    def other_layout(t: Tensor) -> Tensor:
        wide = torch.full((t.shape[0] + 1, t.shape[1] + 2, 2 * t.shape[2]), math.nan, dtype=dtype)
        strided = wide[1:, 1:-1, ::2]
        strided.copy_(t)
        return strided

    for layout in (other_layout, lambda t: t.mT.contiguous().mT):
        for call in calls(2, 70, 36, 50, dtype):
            moved = Call(**{**vars(call), "inputs": tuple(layout(t) for t in call.inputs)})
            for a, b in zip(call.norms(native_ops), moved.norms(native_ops), strict=True):
                assert torch.equal(a, b), call.name
            factors = torch.rand(2)
            for a, b in zip(call.sums(native_ops, factors), moved.sums(native_ops, factors), strict=True):
                assert torch.equal(a, b), call.name


def test_expanded_inputs_and_non_contiguous_outputs() -> None:
    x, g = torch.randn(1, 9, 5).expand(3, 9, 5), torch.randn(3, 9, 1).expand(3, 9, 7)
    assert (native_ops.linear_norm_sq(x, g) >= reference.linear_norm_sq(x, g)).all()
    transposed, dense = torch.zeros(5, 7, dtype=torch.float64).T, torch.zeros(7, 5, dtype=torch.float64)
    native_ops.linear_weighted_sum(x, g, torch.ones(3), transposed)
    native_ops.linear_weighted_sum(x, g, torch.ones(3), dense)
    assert torch.equal(transposed, dense)
    assert dense.abs().sum() > 0


def test_frames_beyond_a_length_are_not_read() -> None:
    lengths = torch.tensor([0, 1, 63, 70, 40])
    for call in calls(5, 70, 20, 37):
        if not call.takes_lengths:
            continue
        cut = [t.clone() for t in call.inputs]
        poisoned = [t.clone() for t in call.inputs]
        for i, n in enumerate(lengths.tolist()):
            for zeros, nans in zip(cut, poisoned, strict=True):
                zeros[i, n:], nans[i, n:] = 0.0, math.nan
        cut_call = Call(**{**vars(call), "inputs": tuple(cut)})
        call = Call(**{**vars(call), "inputs": tuple(poisoned)})
        check_norms(call, call.norms(native_ops, lengths=lengths), cut_call.norms(reference))
        factors = torch.rand(5)
        given = call.sums(native_ops, factors, lengths=lengths)
        check_sums(call, given, cut_call.sums(reference, factors), SUM_OFF[torch.float32])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_input_makes_its_own_norm_non_finite(bad: float) -> None:
    for call in calls(3, 67, 34, 35):
        clean = call.norms(native_ops)
        for which, tensor in enumerate(call.inputs):
            if tensor.numel() == 0:
                continue
            for place in (0, -1):
                invalidated = [t.clone() for t in call.inputs]
                # A tap of every convolution above reads frame 3; g = 0 there must not hide a NaN in x.
                index = (1, place, 3) if call.name == "depthwise_conv1d" else (1, 2, place)
                if call.ids is not None:
                    call.ids[1, 2] = 0
                invalidated[which][index] = bad
                given = Call(**{**vars(call), "inputs": tuple(invalidated)}).norms(native_ops)
                touched = False
                for one, before in zip(given, clean, strict=True):
                    touched |= not bool(one[1].isfinite())
                    if call.ids is None:
                        assert torch.equal(one[[0, 2]], before[[0, 2]])
                assert touched, f"{call.name} input {which} at {index}"


def test_zero_gradients_do_not_hide_a_nan_in_x() -> None:
    x, g = torch.randn(2, 5, 3), torch.randn(2, 5, 4)
    x[0, 4, 1], g[0, 4] = math.nan, 0.0
    for method in ("direct", "gram"):
        assert not native_ops.linear_norm_sq(x, g, method=method)[0].isfinite()


def exact_square(x: Tensor, g: Tensor) -> Fraction:
    """‖gᵀx‖² of one sample without rounding."""
    xs, gs = (
        [[Fraction(v) for v in row] for row in x.tolist()],
        [[Fraction(v) for v in row] for row in g.tolist()],
    )
    return sum(
        (
            sum((a[m] * b[n] for a, b in zip(gs, xs, strict=True)), Fraction(0)) ** 2
            for m in range(g.shape[1])
            for n in range(x.shape[1])
        ),
        Fraction(0),
    )


def cancelling(frames: int) -> tuple[Tensor, Tensor]:
    """A sample whose products cancel to 10⁻⁶ of their size, as (x, g)."""
    half = frames // 2
    x, g = torch.randn(frames, 3), torch.randn(frames, 2)
    x[half:], g[half:] = x[:half], -g[:half] * (1 + 1e-6)
    return x, g


def linear_bound_holds(norm: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Norm is never below the exact square, on random and on cancelling samples."""
    samples = [cancelling(n) for n in (2, 40, 130)] + [
        (torch.randn(90, 3), torch.randn(90, 2)) for _ in range(5)
    ]
    return all(Fraction(float(norm(x[None], g[None])[0])) >= exact_square(x, g) for x, g in samples)


@pytest.mark.parametrize("method", ["auto", "gram", "direct"])
def test_never_below_the_exact_norm_also_when_terms_cancel(method: str) -> None:
    assert linear_bound_holds(lambda x, g: native_ops.linear_norm_sq(x, g, method=method))
    lora: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda x, g: native_ops.lora_norm_sq(x, g, x, g)[0],
        lambda x, g: native_ops.lora_norm_sq(g, x, g, x)[1],
    ]
    for norm in lora:
        assert linear_bound_holds(norm)


def test_the_check_catches_a_norm_without_its_bound() -> None:
    assert not linear_bound_holds(lambda x, g: (g.mT @ x).square().sum((1, 2)))


def test_streaming_layers_are_never_below_when_terms_cancel() -> None:
    for frames in (2, 100, 700):
        x, g = cancelling(frames)
        one = torch.ones_like(g)
        products = x[:, :2] * g
        bias = native_ops.bias_norm_sq(g[None])
        assert bias.double() >= g.double().sum(0).square().sum() * (1 - 1e-9)
        weight = native_ops.layer_norm_norm_sq(x[None, :, :2], g[None])
        assert weight.double() >= (x[:, :2].double() * g.double()).sum(0).square().sum() * (1 - 1e-9)
        ids = torch.zeros(1, frames, dtype=torch.int64)
        assert native_ops.embedding_norm_sq(ids, products[None]) >= reference.embedding_norm_sq(
            ids, products[None]
        )
        taps = native_ops.depthwise_conv1d_norm_sq(g.T[None], one.T[None], kernel_size=1)
        assert taps.double() >= g.double().sum(0).square().sum() * (1 - 1e-9)


def test_gram_gives_way_to_direct_where_its_bound_is_loose() -> None:
    x, g = (torch.stack(t) for t in zip(*[cancelling(60) for _ in range(3)], strict=True))
    gram, direct = (native_ops.linear_norm_sq(x, g, method=m) for m in ("gram", "direct"))
    assert torch.equal(gram, direct)


@pytest.mark.parametrize("scale", [1e-25, 1e-19, 1e-12, 1e12])
def test_tiny_and_huge_values(scale: float) -> None:
    """Squares of float32 values under- and overflow from about 1e±19 on."""
    for call in calls(2, 33, 34, 20):
        first, *rest = call.inputs
        scaled = Call(**{**vars(call), "inputs": (first * scale, *rest)})
        for one, truth in zip(scaled.norms(native_ops), scaled.norms(reference), strict=True):
            assert (one >= truth).all()
            assert (one.double() <= truth.double() * 1.02 + 1e-60).all() or scale < 1e-18


@pytest.mark.parametrize(
    ("x_size", "g_size"), [(1e-200, 1e200), (1e-170, 1e-3), (1e-3, 1e-200), (1e-300, 1e290)]
)
def test_float64_norms_whose_squares_underflow(x_size: float, g_size: float, instructions: str) -> None:
    """Squares below 2⁻¹⁰⁷⁴ are 0 in float64: their sums must not pass for sums of zeros."""
    for call in calls(2, 5, 6, 7, torch.float64):
        sizes = [x_size] * (len(call.inputs) - 1) + [g_size]
        if call.name == "lora":  # x, h, g, dh
            sizes = [x_size, x_size, g_size, g_size]
        scaled = Call(
            **{**vars(call), "inputs": tuple(t * s for t, s in zip(call.inputs, sizes, strict=True))}
        )
        outs = [torch.zeros(size, dtype=torch.float64) for size in call.outs]
        function = getattr(reference, f"{call.name}_weighted_sum")
        function(*scaled.arguments(), torch.tensor([1.0, 0.0]), *outs, **dict(call.sum_options))
        for norm, exact in zip(scaled.norms(native_ops), outs, strict=True):
            largest = float(exact.abs().max())  # whose square is a float64, or underflows
            below = float(norm[0]) ** 0.5 < largest * (1 - 1e-6)  # a NaN is not: such a sample is dropped
            assert not below, f"{call.name} {call.options}: {float(norm[0])} < {largest}²"


def test_sizes_of_a_convolution_beyond_64_bits_are_refused() -> None:
    x, g = torch.randn(2, 3, 9), torch.randn(2, 3, 7)
    for sizes in ({"padding": 2**62}, {"dilation": 2**62}, {"padding": 2**63 - 1, "dilation": 2**63 - 1}):
        with pytest.raises(ValueError, match=r"beyond 64 bits|frames of g"):
            native_ops.depthwise_conv1d_norm_sq(x, g, kernel_size=3, **sizes)
    nothing = native_ops.depthwise_conv1d_norm_sq(x, g[..., :0], kernel_size=2, dilation=2**62)
    assert nothing.tolist() == [0.0, 0.0]
    one = native_ops.depthwise_conv1d_norm_sq(x, g[..., :1], kernel_size=9, stride=2**62)
    assert torch.equal(one, native_ops.depthwise_conv1d_norm_sq(x, g[..., :1], kernel_size=9))


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = torch.rand(4)
    for call in calls(4, 120, 130, 200):
        results = []
        for threads in (1, 2, 5):
            monkeypatch.setattr(native, "threads", lambda n=threads: n)
            results.append((*call.norms(native_ops), *call.sums(native_ops, factors)))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), call.name


def test_a_norm_does_not_depend_on_the_rest_of_the_batch_or_padding() -> None:
    lengths = torch.tensor([70, 8, 130, 31])
    for call in calls(4, 130, 48, 70):
        extra = {"lengths": lengths} if call.takes_lengths else {}
        together = call.norms(native_ops, **extra)
        for i in range(4):
            own = call.sample(i)
            if call.takes_lengths:
                n = int(lengths[i])
                own = Call(**{**vars(own), "inputs": tuple(t[:, :n].clone() for t in own.inputs)})
            alone = own.norms(native_ops)
            assert all(torch.equal(a[i : i + 1], b) for a, b in zip(together, alone, strict=True)), call.name


@pytest.mark.parametrize("padded", ["g", "x", "between"])
def test_padding_changes_neither_form_nor_bound_of_a_linear_norm(padded: str) -> None:
    """20 frames of 32 → 32 are in Gram form, and 24 in direct form; 40 with 20 of padding are in Gram form, whichever
    operand it is whose padding is 0 (a caller may exchange them), and wherever the padding is."""
    x, g = torch.randn(2, 40, 32), torch.randn(2, 40, 32)
    padding = slice(10, 30) if padded == "between" else slice(20, None)
    (x if padded == "x" else g)[:, padding] = 0
    own = native_ops.linear_norm_sq(x, g)
    assert torch.equal(own, native_ops.linear_norm_sq(x, g, method="gram"))
    assert not torch.equal(own, native_ops.linear_norm_sq(x, g, method="direct"))
    kept = torch.ones(40, dtype=torch.bool)
    kept[padding] = False
    alone = native_ops.linear_norm_sq(x[:, kept], g[:, kept])
    torch.testing.assert_close(own, alone, rtol=2e-7 if padded != "between" else 1e-6, atol=0.0)


def test_padding_changes_no_bound_of_a_streaming_norm() -> None:
    """75 frames of which 55 are zeros have the norm of the 20, to the rounding to float32."""
    seen = set()
    for call in calls(2, 20, 16, 16):
        last = call.name == "depthwise_conv1d"
        if call.name == "linear" or (last and call.inputs[1].shape[2] != 20):
            continue
        pad = (0, 55) if last else (0, 0, 0, 55)
        inputs = tuple(torch.nn.functional.pad(t, pad) for t in call.inputs)
        ids = None if call.ids is None else torch.nn.functional.pad(call.ids, (0, 55))
        longer = replace(call, inputs=inputs, ids=ids).norms(native_ops)
        for given, wanted in zip(longer, call.norms(native_ops), strict=True):
            torch.testing.assert_close(given, wanted, rtol=3e-7, atol=0.0)
        seen.add(call.name)
    assert seen == {"bias", "layer_norm", "lora", "embedding", "depthwise_conv1d"}


@pytest.mark.parametrize("layout", ["frames first", "channels first"])
@pytest.mark.parametrize("name", ["auto", "gram", "direct", "bias", "layer_norm"])
def test_frames_that_add_nothing_change_no_bit(name: str, layout: str) -> None:
    """Before, between and after a sample's own frames, a row of zeros in g or x beside content in the other."""
    torch.manual_seed(5)
    x, g = torch.randn(2, 150, 200), torch.randn(2, 150, 200)
    if name == "bias":
        x = torch.zeros_like(g)
    longer = 290
    own = torch.randperm(longer)[:150].sort().values
    long_x, long_g = torch.randn(2, longer, 200), torch.randn(2, longer, 200)
    others = torch.ones(longer, dtype=torch.bool)
    others[own] = False
    in_g = others.clone() if name == "bias" else others & (torch.rand(longer) < 0.5)
    long_g[:, in_g], long_x[:, others & ~in_g] = 0.0, 0.0
    long_x[:, own], long_g[:, own] = x, g
    factors, results = torch.tensor([0.3, 0.7]), []
    for a, b in ((x, g), (long_x, long_g)):
        if layout == "channels first":
            a, b = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (a, b))
        if name == "bias":
            out = torch.zeros(200, dtype=torch.float64)
            norms = native_ops.bias_norm_sq(b)
            native_ops.bias_weighted_sum(b, factors, out)
        elif name == "layer_norm":
            out = torch.zeros(200, dtype=torch.float64)
            norms = native_ops.layer_norm_norm_sq(a, b)
            native_ops.layer_norm_weighted_sum(a, b, factors, out)
        else:
            out = torch.zeros(200, 200, dtype=torch.float64)
            norms = native_ops.linear_norm_sq(a, b, method=name)
            native_ops.linear_weighted_sum(a, b, factors, out)
        results.append((norms, out))
    (norms, out), (long_norms, long_out) = results
    assert torch.equal(norms, long_norms)
    assert torch.equal(out, long_out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_gradient_of_one_frame_is_read_in_place(dtype: torch.dtype) -> None:
    """By a path of its own, for long rows that lie in memory as they are: materialised gradients."""
    g = randn(3, 1, 10_007, dtype=dtype)
    g[1] *= 1e-15
    exact = g.double().square().sum((1, 2))
    norms = native_ops.bias_norm_sq(g)
    assert bool((norms.double() >= exact).all())
    torch.testing.assert_close(norms.double(), exact, rtol=3e-5, atol=0.0)
    padded = native_ops.bias_norm_sq(torch.cat([g, torch.zeros_like(g)], 1))
    torch.testing.assert_close(norms, padded, rtol=1.2e-7, atol=0.0)  # one rounding to float32

    factors = torch.tensor([0.5, 3.0, 0.0])
    for out in (torch.ones(10_007, dtype=torch.float64), torch.ones(20_014)[::2]):
        g[2] = torch.nan  # a sample of factor 0 is not read
        native_ops.bias_weighted_sum(g, factors, out)
        tolerance = SUM_OFF[torch.float64 if out.dtype == torch.float64 else torch.float32]
        torch.testing.assert_close(
            out.double(),
            1.0 + 0.5 * g[0, 0].double() + 3.0 * g[1, 0].double(),
            rtol=tolerance,
            atol=tolerance,
        )


def test_trailing_zero_gradients_change_no_bit_of_a_linear_norm() -> None:
    x, g = torch.randn(1, 90, 40), torch.randn(1, 90, 50)
    g[:, 41:] = 0.0
    for method in ("auto", "gram", "direct"):
        given = native_ops.linear_norm_sq(x, g, method=method)
        assert torch.equal(given, native_ops.linear_norm_sq(x[:, :41], g[:, :41], method=method))


def test_a_sample_of_factor_zero_is_not_read() -> None:
    factors = torch.tensor([0.5, 0.0, 1.0, 0.0])
    kept = torch.tensor([0, 2])
    for call in calls(4, 30, 20, 24):
        poisoned = [t.clone() for t in call.inputs]
        for tensor in poisoned:
            tensor[[1, 3]] = math.nan
        ids = None if call.ids is None else call.ids.clone()
        if ids is not None:
            ids[1, 0] = 10**12
        given = Call(**{**vars(call), "inputs": tuple(poisoned), "ids": ids}).sums(native_ops, factors)
        rest_ids = None if call.ids is None else call.ids[kept]
        rest = Call(**{**vars(call), "inputs": tuple(t[kept] for t in call.inputs), "ids": rest_ids})
        assert all(
            torch.equal(a, b) for a, b in zip(given, rest.sums(native_ops, factors[kept]), strict=True)
        ), call.name


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_what_a_sample_adds_is_within_the_clipping_norm(dtype: torch.dtype) -> None:
    """c_i‖Ĝ_i‖ ≤ C for the sum that is really materialised, over all of an op's parameters."""
    limit = 0.7
    for call in calls(6, 75, 24, 31, dtype):
        factors = native_ops.clip_factors(sum(n.double() for n in call.norms(native_ops)), limit)
        assert (factors < 1).all()
        for i in range(6):
            outs = tuple(torch.zeros(size, dtype=torch.float64) for size in call.outs)
            own = call.sample(i)
            function = getattr(native_ops, f"{call.name}_weighted_sum")
            function(*own.arguments(), factors[i : i + 1], *outs, **dict(call.sum_options))
            added = math.sqrt(sum(float(out.square().sum()) for out in outs))
            assert 0.95 * limit < added <= limit, f"{call.name}: {added}"


def within(factor: float, square: float, limit: float) -> bool:
    return Fraction(factor) ** 2 * Fraction(square) <= Fraction(limit) ** 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("limit", [1.0, 0.1, 3.7e-5, 1e30, 5e-324, 1.7e308])
def test_clip_factors_are_the_largest_that_hold_exactly(dtype: torch.dtype, limit: float) -> None:
    spread = torch.randn(300, dtype=torch.float64).mul(8).exp() * limit
    squares = spread.square().clamp(
        1e-300 if dtype == torch.float64 else 1e-38, 1e300 if dtype == torch.float64 else 3e38
    )
    factors = native_ops.clip_factors(squares.to(dtype), limit)
    for factor, square in zip(factors, squares.to(dtype).tolist(), strict=True):
        assert within(float(factor), square, limit)
        above = float(factor.nextafter(torch.tensor(math.inf)))
        assert float(factor) == 1.0 or not within(above, square, limit)


def test_clip_factors_of_unusable_norms_are_zero() -> None:
    norms = torch.tensor([math.nan, math.inf, -math.inf, -1.0, 0.0, -0.0, 1e-45])
    assert native_ops.clip_factors(norms, 1.0).tolist() == [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    assert native_ops.clip_factors(norms[:0], 1.0).shape == (0,)


def test_wrong_values_are_refused_with_the_reason() -> None:
    x, g = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    with pytest.raises(ValueError, match=r"lengths\[1\] is 4; it must be in 0..3"):
        native_ops.linear_norm_sq(x, g, lengths=torch.tensor([3, 4]))
    ids = torch.tensor([[0, 1, 9], [0, 0, 0]])
    with pytest.raises(ValueError, match=r"ids holds 9; the embedding has rows 0..6"):
        native_ops.embedding_weighted_sum(ids, g, torch.ones(2), torch.zeros(7, 5))
    with pytest.raises(ValueError, match="frames of g"):
        native_ops.depthwise_conv1d_norm_sq(x, torch.randn(2, 3, 9), kernel_size=3)
    with pytest.raises(ValueError, match="max_grad_norm is nan"):
        native_ops.clip_factors(torch.ones(1), math.nan)
