"""The CUDA kernels of the noise and the fused step, run lane by lane on the CPU, have the CPU kernels' bits.

tests/ops/test_gpu_noise.py is the same on a GPU.
"""

import ctypes
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from dpkernels import ops
from dpkernels.backends import native
from dpkernels.backends.native_ops import chacha20 as native_chacha20
from dpkernels.backends.native_ops import optim as native_optim
from tests.ops import emulated
from tests.ops.test_optim import KEY, NOISE, OPTIMIZERS, SHAPES, State, nonces
from tests.slow import slow_unless

QUICK = [
    ("AdamW", torch.float32),
    ("Adam, maximize", torch.bfloat16),
    ("SGD, nesterov", torch.float32),
    ("SGD, dampening", torch.bfloat16),
]
pytestmark = pytest.mark.skipif(
    native.library("cpu").handle is None, reason=native.library("cpu").reason or "the CPU library loads"
)


def run(op: str, _: torch.device, table: Any, noise: Any, options: Any) -> None:
    """native_optim._run by the emulated library."""
    kind = native_optim._Adam if op == "noise_adamw" else native_optim._Sgd
    kinds = [ctypes.POINTER(native_optim._Tensor), ctypes.c_int64, ctypes.POINTER(native_optim.Noise)]
    function = emulated.library().function(f"dpk_cuda_{op}", [*kinds, ctypes.POINTER(kind), ctypes.c_void_p])
    function(table, len(table), noise, options, None)


def both(step: Any) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """What `step` makes by the CPU library and by the emulated one."""
    expected = step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_optim, "_run", run)
        return expected, step()


def assert_same(expected: Sequence[Tensor], found: Sequence[Tensor]) -> None:
    for one, other in zip(expected, found, strict=True):
        kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[one.element_size()]
        assert torch.equal(one.view(kind), other.view(kind))


@pytest.mark.parametrize("shift", [0, 4])
@pytest.mark.parametrize("blocks", [1, 127, 300])
def test_keystream(blocks: int, shift: int) -> None:
    memory = torch.zeros(64 * blocks + 16, dtype=torch.uint8)
    out = memory[shift : 64 * blocks + shift]
    name = "dpk_cuda_chacha20_keystream"
    function = emulated.library().function(name, native_chacha20._ARGUMENTS[name])
    function(KEY, 3, bytes(12), blocks, out.data_ptr(), None)
    assert torch.equal(out, native_chacha20.chacha20_keystream(KEY, 3, bytes(12), blocks))
    assert not memory[64 * blocks + shift :].any()


@pytest.mark.thinned(10)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("count", [1, 7, 8, 3001])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_normals(count: int, dtype: torch.dtype, shift: int) -> None:
    memory = torch.zeros(count + 16, dtype=dtype)
    out = memory[shift : count + shift]
    name = "dpk_cuda_chacha20_normal"
    function = emulated.library().function(name, native_chacha20._ARGUMENTS[name])
    function(KEY, 5, bytes(12), count, native.element_type(dtype), out.data_ptr(), None)
    expected = native_chacha20.chacha20_normal(count, key=KEY, nonce=bytes(12), counter=5, dtype=dtype)
    assert_same([expected], [out])
    assert not memory[count + shift :].any()


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("name", "dtype"),
    slow_unless(
        lambda name, dtype: (name, dtype) in QUICK, product(OPTIMIZERS, [torch.float32, torch.bfloat16])
    ),
    ids=str,
)
def test_fused_step(name: str, dtype: torch.dtype) -> None:
    def step() -> list[Tensor]:
        state = State(name, dtype)
        grads = [torch.empty(shape, dtype=dtype) for shape in SHAPES]
        state.step(1, grads=grads)
        state.step(2, rounding_nonces=nonces(2, 4))
        return [*state.everything(), *grads]

    assert_same(*both(step))


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    "options",
    [{"noise_scale": 0.0, "nonces": []}, {"grid": 0.0}, {"noise_scale": 0.0, "grid": 0.0, "nonces": []}],
)
def test_without_noise_or_grid(options: dict[str, Any]) -> None:
    def step() -> list[Tensor]:
        state = State("AdamW")
        state.step(1, **options)
        return state.everything()

    assert_same(*both(step))


def test_buffers_at_odd_addresses() -> None:
    def step() -> list[Tensor]:
        memory = [torch.randn(2051, generator=torch.Generator().manual_seed(i)) for i in range(4)]
        params, firsts, seconds = ([whole[2:]] for whole in (memory[0], memory[1], memory[2].abs_()))
        sums = [torch.ones(2050, dtype=torch.float64)[1:]]
        hyper = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
        ops.noise_adamw(params, sums, firsts, seconds, [2.0], key=KEY, nonces=[bytes(12)], **hyper, **NOISE)
        return [*memory[:3], *sums]

    assert_same(*both(step))


@pytest.mark.slow
def test_more_tensors_than_one_launch_holds() -> None:
    def step() -> list[Tensor]:
        counts = [(37 * i) % 100 for i in range(300)]
        params = [torch.zeros(count) for count in counts]
        sums = [torch.zeros(count, dtype=torch.float64) for count in counts]
        streams = [i.to_bytes(12, "little") for i in range(len(counts))]
        ops.noise_sgd(params, sums, [], [1.0] * len(counts), key=KEY, nonces=streams, lr=1.0, **NOISE)
        return params

    assert_same(*both(step))
