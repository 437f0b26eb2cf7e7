"""noise_adamw and noise_sgd: noise followed by torch's optimizer, in one pass; the same bits wherever they are made."""

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from dpkernels import ops
from dpkernels.backends import native, registry, triton_ops
from tests.ops import conftest
from tests.ops.tolerances import FUSED_GRADIENT, FUSED_OFF
from tests.slow import covering

KEY = bytes(range(32))
# Odd sizes, empty, several dimensions, more than one piece of a thread (8192 entries).
SHAPES = ((1,), (0,), (7, 9), (128,), (3, 5, 11), (20_011,), (8192,))
NOISE = {"noise_scale": 1.7, "grid": 2.0**-12, "divisor": 12.0}

ADAM: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1},
    "AdamW without decay": {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.0},
    "Adam": {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.05, "coupled": True},
    "Adam, maximize": {
        "lr": 1e-2,
        "betas": (0.0, 0.5),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "coupled": True,
        "maximize": True,
    },
}
SGD: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1},
    "SGD with momentum": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "SGD, dampening": {"lr": 0.1, "momentum": 0.8, "dampening": 0.3},
    "SGD, nesterov": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
}
OPTIMIZERS = {**ADAM, **SGD}


# On a CPU Triton leaves these ops to torch: the same functions again.
OF_THEIR_OWN = conftest.BACKENDS if conftest.TRITON_DEVICE == "cuda" else conftest.BACKENDS[:-1]


@pytest.fixture(params=OF_THEIR_OWN)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield from conftest.use(request.param, request, monkeypatch)


def test_triton_has_no_fused_step() -> None:
    assert not any(hasattr(triton_ops, op) for op in ("noise_adamw", "noise_sgd"))


def nonces(step: int, purpose: int = 1) -> list[bytes]:
    return [bytes([purpose, step]) + i.to_bytes(10, "little") for i in range(len(SHAPES))]


def drawn(generator: torch.Generator, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Normals of a CPU's generator, so the same on every device, on the test's."""
    normals = torch.randn(shape, generator=generator, dtype=dtype, device="cpu")
    return normals.to(torch.get_default_device())


@dataclass
class State:
    """The tensors of one optimizer."""

    name: str
    dtype: torch.dtype = torch.float32
    params: list[Tensor] = field(init=False)
    sums: list[Tensor] = field(init=False)
    firsts: list[Tensor] = field(init=False)
    seconds: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.params = [drawn(generator, shape).to(self.dtype) for shape in SHAPES]
        self.sums = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
        self.firsts = [torch.zeros(shape) for shape in SHAPES]
        self.seconds = [torch.zeros(shape) for shape in SHAPES]

    def fill(self, step: int) -> None:
        generator = torch.Generator().manual_seed(100 + step)
        for total in self.sums:
            total.copy_(drawn(generator, total.shape, torch.float64) * 5)

    def step(self, step: int, **options: Any) -> None:
        """Fill the sums and take a fused step."""
        self.fill(step)
        given = dict(OPTIMIZERS[self.name])
        common = {
            "key": KEY,
            "nonces": nonces(step),
            **NOISE,
            "maximize": given.pop("maximize", False),
            **options,
        }
        steps = [float(step)] * len(SHAPES)
        if self.name in ADAM:
            coupled = given.pop("coupled", False)
            given["beta1"], given["beta2"] = given.pop("betas")
            ops.noise_adamw(
                self.params,
                self.sums,
                self.firsts,
                self.seconds,
                steps,
                decoupled=not coupled,
                **given,
                **common,
            )
        else:
            buffers = self.firsts if given.get("momentum") else []
            ops.noise_sgd(self.params, self.sums, buffers, steps, **given, **common)

    def everything(self) -> list[Tensor]:
        return [*self.params, *self.firsts, *self.seconds, *self.sums]


@functools.cache
def normals_of(backend: str | None, count: int, nonce: bytes, device: torch.device) -> Tensor:
    """What the backend's own op draws, once for all optimizers."""
    return ops.chacha20_normal(count, key=KEY, nonce=nonce, device=device)


def gradient(total: Tensor, nonce: bytes) -> Tensor:
    """Today's noise, by hand: float64."""
    backend = os.environ.get(registry.ENVIRONMENT_VARIABLE)
    z = normals_of(backend, total.numel(), nonce, total.device).view(total.shape)
    noised = total + NOISE["noise_scale"] * z
    return (noised / NOISE["grid"]).round() * NOISE["grid"] / NOISE["divisor"]


def of_torch(name: str, params: list[Tensor], dtype: torch.dtype, steps: int) -> list[Tensor]:
    """The parameters after noise and torch's own optimizer, computed in `dtype`."""
    options = dict(OPTIMIZERS[name])
    coupled = options.pop("coupled", False)
    kind = torch.optim.SGD if name in SGD else torch.optim.Adam if coupled else torch.optim.AdamW
    mine = [torch.nn.Parameter(p.to(dtype)) for p in params]
    optimizer = kind(mine, **options)
    same = State(name)
    for step in range(1, steps + 1):
        same.fill(step)
        for parameter, total, nonce in zip(mine, same.sums, nonces(step), strict=True):
            parameter.grad = gradient(total, nonce).float().to(dtype)
        optimizer.step()
    return [p.detach() for p in mine]


@pytest.mark.thinned(15)
@pytest.mark.parametrize(
    ("name", "dtype"), covering(OPTIMIZERS, [torch.float64, torch.float32], together=1), ids=str
)
def test_equals_noise_then_torchs_optimizer(name: str, dtype: torch.dtype, backend: str) -> None:
    state = State(name)
    start = [p.clone() for p in state.params]
    for step in (1, 2, 3):
        state.step(step)
    for ours, theirs in zip(state.params, of_torch(name, start, dtype, 3), strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), **FUSED_OFF)
    assert not any(total.any() for total in state.sums)


@pytest.mark.parametrize("name", ["AdamW", "SGD with momentum"])
def test_the_released_gradient_is_that_of_noise_alone(name: str, backend: str) -> None:
    state = State(name)
    state.fill(1)
    expected = [gradient(total, nonce).float() for total, nonce in zip(state.sums, nonces(1), strict=True)]
    found = [torch.empty(shape) for shape in SHAPES]
    state.step(1, grads=found)
    for ours, exact in zip(found, expected, strict=True):
        # The same bits of the same normals; the reference's own differ in the last place of a float64.
        off = (ours != exact).float().mean() if ours.numel() else 0
        assert off <= FUSED_GRADIENT


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_noise_nothing_is_drawn_and_nothing_rounded(name: str, backend: str) -> None:
    state = State(name)
    found = [torch.empty(shape) for shape in SHAPES]
    state.step(1, grads=found, noise_scale=0.0, grid=0.0, nonces=[])
    same = State(name)
    same.fill(1)
    for ours, total in zip(found, same.sums, strict=True):
        torch.testing.assert_close(ours, (total / 12).float(), rtol=2**-23, atol=0)


def test_native_and_torch_make_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.library("cpu").handle is None:
        pytest.skip(native.library("cpu").reason)
    found = []
    for backend in ("native", "torch"):
        monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, backend)
        grads = [torch.empty(shape) for shape in SHAPES]
        State("AdamW").step(1, grads=grads)
        found.append(grads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.fixture
def restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    native.set_isa("")


@pytest.mark.thinned(5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "SGD, nesterov"])
def test_same_bits_for_every_instruction_set_and_thread_count(
    name: str, dtype: torch.dtype, restored: None
) -> None:
    if native.library("cpu").handle is None:
        pytest.skip(native.library("cpu").reason)
    sets = ("baseline", "avx2", "avx512")
    found = []
    for isa in sets[: sets.index(native.isa()) + 1]:
        native.set_isa(isa)
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            state = State(name, dtype)
            grads = [torch.empty(shape, dtype=dtype) for shape in SHAPES]
            for step in (1, 2):
                state.step(step, grads=grads, rounding_nonces=nonces(step, 4))
            found.append([*state.everything(), *grads])
    assert len(found) >= 3
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_sum_that_rounds_to_zero_keeps_its_sign(restored: None) -> None:
    """Below half of the grid: instruction sets without a rounding instruction have it of additions."""
    if native.library("cpu").handle is None:
        pytest.skip(native.library("cpu").reason)
    sets, found = ("baseline", "avx2", "avx512"), []
    for isa in sets[: sets.index(native.isa()) + 1]:
        native.set_isa(isa)
        sums = torch.tensor([-1e-9, -0.0, 0.0, 1e-9, -0.25, -0.5, -1.5], dtype=torch.float64)
        ops.noise_sums([sums], key=KEY, nonces=[], noise_scale=0.0, grid=1.0, divisor=2.0)
        found.append(sums)
    wanted = torch.tensor([-0.0, -0.0, 0.0, 0.0, -0.0, -0.0, -1.0], dtype=torch.float64)
    for sums in found:
        assert torch.equal(sums, wanted)
        assert torch.equal(sums.signbit(), wanted.signbit())


def test_noise_differs_between_tensors_and_is_standard_normal(backend: str) -> None:
    state = State("SGD")
    grads = [torch.empty(shape) for shape in SHAPES]
    state.fill(1)
    before = [total.clone() for total in state.sums]
    state.step(1, grads=grads)
    z = [(g.double() * 12 - b).flatten() / 1.7 for g, b in zip(grads, before, strict=True)]
    everything = torch.cat(z)
    assert abs(float(everything.square().mean()) - 1) < 5 * math.sqrt(2 / everything.numel())
    assert float((z[5][:8192] - z[6]).abs().min()) > 0


# ---- bfloat16 parameters


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", ["AdamW", "SGD with momentum"])
def test_bf16_parameters_have_float32_arithmetic(name: str, backend: str) -> None:
    half, wide = State(name, torch.bfloat16), State(name)
    wide.params = [p.float() for p in half.params]
    half.step(1)
    wide.step(1)
    for ours, exact in zip(half.params, wide.params, strict=True):
        torch.testing.assert_close(ours.float(), exact.bfloat16().float(), rtol=2**-7, atol=1e-30)
        share = (ours != exact.bfloat16()).float().mean() if ours.numel() else 0
        assert share <= FUSED_GRADIENT  # a tie may fall otherwise in the reference
    for ours, exact in zip(half.firsts, wide.firsts, strict=True):
        torch.testing.assert_close(ours, exact)


@pytest.mark.thinned(3)
def test_stochastic_rounding_is_to_a_neighbour_and_right_on_average(backend: str) -> None:
    count = 4000
    target = torch.linspace(1.0, 1.0 + 2**-7, count + 1)[:-1]  # between two neighbouring bfloat16
    param = target.bfloat16()
    # One SGD step from a parameter of 0 with lr 1 and gradient -target gives exactly the target.
    draws = []
    for draw in range(60):
        param = torch.zeros(count, dtype=torch.bfloat16)
        ops.noise_sgd(
            [param],
            [-target.double()],
            [],
            [1.0],
            key=KEY,
            nonces=[],
            noise_scale=0.0,
            divisor=1.0,
            lr=1.0,
            rounding_nonces=[bytes([4, draw]) + bytes(10)],
        )
        draws.append(param.double())
    stacked = torch.stack(draws)
    assert set(stacked.unique().tolist()) <= {1.0, 1.0 + 2**-7}
    share = (stacked - 1.0) * 2**7
    exact = (target.double() - 1) * 2**7
    deviation = (exact * (1 - exact) / 60).clamp_min(1e-4).sqrt()
    assert float(((share.mean(0) - exact) / deviation).square().mean()) < 1.1
    assert abs(float((share - exact).mean())) < 5 * 0.41 / math.sqrt(share.numel())
    assert float((share[0] - share[1]).abs().max()) > 0


def test_rounding_is_as_defined_bit_by_bit(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state, same = State("SGD", torch.bfloat16), State("SGD", torch.bfloat16)
    options = {"rounding_nonces": nonces(1, 4), "noise_scale": 0.0, "grid": 0.0, "nonces": []}
    state.step(1, **options)
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "reference")
    same.step(1, **options)
    # A threshold of 2⁻¹⁶ of a step may lie between the float32 and the float64 arithmetic.
    different = [
        (a != b).float().mean().item() for a, b in zip(state.params, same.params, strict=True) if a.numel()
    ]
    assert max(different) < 2e-2
    nearest = State("SGD", torch.bfloat16)
    nearest.step(1, **{**options, "rounding_nonces": []})
    assert (nearest.params[5] != same.params[5]).float().mean() > 0.1


def test_infinity_and_nan_stay_what_they_are(backend: str) -> None:
    for value in (math.inf, -math.inf, math.nan):
        param = torch.tensor([value, 1.0], dtype=torch.bfloat16)
        ops.noise_sgd(
            [param], [torch.zeros(2, dtype=torch.float64)], [], [1.0], key=KEY, nonces=[], noise_scale=0.0, divisor=1.0,
            lr=0.1, rounding_nonces=[b"\4" + bytes(11)],
        )  # fmt: skip
        assert param[0] == value or (math.isnan(value) and param[0].isnan())
        assert param[1] == 1


# ---- refusals


def arguments(**changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "params": [torch.zeros(3), torch.zeros(2, 2)],
        "sums": [torch.zeros(3, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)],
        "exp_avgs": [torch.zeros(3), torch.zeros(2, 2)],
        "exp_avg_sqs": [torch.zeros(3), torch.zeros(2, 2)],
        "steps": [1.0, 1.0],
        "key": KEY,
        "nonces": [bytes(12), bytes(11) + b"\1"],
        "noise_scale": 1.0,
        "divisor": 4.0,
        "lr": 0.1,
        "beta1": 0.9,
        "beta2": 0.99,
        "eps": 1e-8,
    }
    return given | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sums": [torch.zeros(3, dtype=torch.float64)]}, ValueError, "sums: expected 2"),
        ({"sums": [torch.zeros(3), torch.zeros(2, 2)]}, TypeError, r"sums\[0\]: expected torch.float64"),
        (
            {"params": [torch.zeros(3).double(), torch.zeros(2, 2)]},
            TypeError,
            r"params\[0\]: expected float32",
        ),
        ({"params": [torch.zeros(3).half(), torch.zeros(2, 2)]}, TypeError, r"params\[0\]: expected float32"),
        (
            {"params": [torch.zeros(3), torch.zeros(4, 2)[::2]]},
            ValueError,
            r"params\[1\]: expected a contiguous",
        ),
        ({"exp_avgs": [torch.zeros(3), torch.zeros(4)]}, ValueError, r"exp_avgs\[1\]: expected params\[1\]"),
        ({"exp_avgs": [torch.zeros(3), torch.zeros(2, 2).bfloat16()]}, TypeError, r"exp_avgs\[1\]: expected"),
        ({"steps": [1.0, 0.0]}, ValueError, "steps: expected numbers"),
        ({"key": bytes(16)}, ValueError, "^key: expected 32 bytes; given 16"),
        ({"key": "k" * 32}, TypeError, "key: expected bytes"),
        ({"nonces": [bytes(12)]}, ValueError, "nonces: expected 2"),
        ({"nonces": [bytes(12), bytes(8)]}, ValueError, r"^nonces\[1\]: expected 12 bytes"),
        ({"nonces": ["n" * 12, bytes(12)]}, TypeError, r"^nonces\[0\]: expected bytes; given str"),
        ({"nonces": [bytes(12), bytes(12)]}, ValueError, "distinct nonces"),
        (
            {"rounding_nonces": [bytes(8), b"\2" * 12]},
            ValueError,
            r"^rounding_nonces\[0\]: expected 12 .* given 8",
        ),
        (
            {"rounding_nonces": [b"\2" * 12, 7]},
            TypeError,
            r"^rounding_nonces\[1\]: expected bytes; given int",
        ),
        ({"rounding_nonces": [bytes(12), b"\2" * 12]}, ValueError, "distinct nonces"),
        ({"rounding_nonces": [b"\2" * 12]}, ValueError, "rounding_nonces: expected 2"),
        ({"noise_scale": -1.0}, ValueError, "noise_scale: expected"),
        ({"noise_scale": math.nan}, ValueError, "noise_scale: expected"),
        ({"grid": 0.3}, ValueError, "grid: expected a power of two"),
        ({"divisor": 0.0}, ValueError, "divisor: expected"),
        ({"beta1": 1.0}, ValueError, "beta1: expected"),
        ({"lr": math.inf}, ValueError, "lr: expected"),
        ({"grads": [torch.zeros(3)]}, ValueError, "grads: expected 2"),
        ({"grads": [torch.zeros(3).bfloat16(), torch.zeros(2, 2)]}, TypeError, r"grads\[0\]: expected"),
        ({"params": [torch.zeros(3), torch.zeros(2, 2, device="meta")]}, ValueError, "device"),
    ],
)
def test_refuses(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given = arguments(**changes)
    with pytest.raises(error, match=message) as caught:
        ops.noise_adamw(**given)
    assert ";" in str(caught.value)
    assert KEY.hex() not in str(caught.value)


def test_momentum_and_buffers_go_together() -> None:
    given = arguments(momentum_buffers=[torch.zeros(3), torch.zeros(2, 2)])
    for name in ("exp_avgs", "exp_avg_sqs", "beta1", "beta2", "eps"):
        del given[name]
    with pytest.raises(ValueError, match="momentum is 0"):
        ops.noise_sgd(**given)
    with pytest.raises(ValueError, match="momentum_buffers: expected 2"):
        ops.noise_sgd(**{**given, "momentum_buffers": [], "momentum": 0.9})


def test_no_tensors_is_nothing_to_do() -> None:
    ops.noise_adamw(**arguments(params=[], sums=[], exp_avgs=[], exp_avg_sqs=[], steps=[], nonces=[]))


def test_autograd_notices_that_parameters_changed() -> None:
    given = arguments()
    weight = torch.nn.Parameter(given["params"][0])
    kept = (weight.square()).sum()
    with torch.no_grad():
        ops.noise_adamw(**{**given, "params": [weight, given["params"][1]]})
    with pytest.raises(RuntimeError, match="inplace"):
        kept.backward()


# ---- planted faults in what the backends share: each is seen


def broken(name: str, change: Callable[[dict[str, Any]], None]) -> Callable[..., None]:
    """The torch composition, called with a changed argument."""
    import inspect

    from dpkernels.backends.torch_ops import optim as torch_optim

    function = getattr(torch_optim, name)

    def call(*args: Any) -> None:
        bound = inspect.signature(function).bind(*args)
        change(bound.arguments)
        function(*bound.args)

    return call


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.update(noise_scale=0.0),
        lambda a: a.update(noise_scale=a["noise_scale"] / a["divisor"]),
        lambda a: a.update(divisor=1.0),
        lambda a: a.update(nonces=a["nonces"][:12].repeat(len(a["params"]))),
        lambda a: a.update(steps=[1.0] * len(a["params"])),
        lambda a: a.update(decoupled=not a["decoupled"]),
    ],
    ids=[
        "no noise",
        "noise on the mean",
        "no division",
        "one stream for all",
        "no bias correction",
        "coupled",
    ],
)
def test_planted_faults_are_caught(change: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        registry,
        "implementation",
        lambda op, device, real=registry.implementation: (
            broken(op, change) if op == "noise_adamw" else real(op, device)
        ),
    )
    with pytest.raises(AssertionError):
        test_equals_noise_then_torchs_optimizer("AdamW", torch.float64, "torch")


def test_a_tensor_given_twice_is_refused() -> None:
    """A tied parameter listed twice would be noised and stepped on by two threads at once."""
    p, total = torch.ones(4), torch.zeros(4, dtype=torch.float64)
    other = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"params\[1\]: expected separate memory"):
        ops.noise_sgd(
            [p, p],
            [total, other],
            [],
            [1.0, 1.0],
            key=bytes(32),
            nonces=[bytes(12), bytes(11) + b"1"],
            noise_scale=1.0,
            divisor=1.0,
            lr=0.1,
        )


@pytest.mark.parametrize("grid", [2.0**-1074, 2.0**-1030])
def test_a_grid_without_an_inverse_is_refused(grid: float) -> None:
    """1/grid would be infinite, and every parameter NaN."""
    with pytest.raises(ValueError, match="grid: expected a grid near the noise's scale"):
        ops.noise_sgd(
            [torch.ones(4)],
            [torch.zeros(4, dtype=torch.float64)],
            [],
            [1.0],
            key=bytes(32),
            nonces=[bytes(12)],
            noise_scale=1.0,
            divisor=1.0,
            lr=0.1,
            grid=grid,
        )


def test_a_fresh_momentum_buffer_is_not_read(backend: str) -> None:
    """0 times what stands in it could be NaN."""
    p, buffer = torch.ones(4), torch.full((4,), torch.nan)
    ops.noise_sgd(
        [p],
        [torch.full((4,), 2.0, dtype=torch.float64)],
        [buffer],
        [1.0],
        key=bytes(32),
        nonces=[bytes(12)],
        noise_scale=0.0,
        divisor=1.0,
        lr=0.5,
        momentum=0.9,
    )
    assert torch.equal(buffer, torch.full((4,), 2.0))
    assert torch.equal(p, torch.zeros(4))
