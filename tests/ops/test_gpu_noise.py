"""On a GPU: the cipher, the normals and the fused step have the CPU's bits."""

import pytest
import torch

from dpkernels import ops
from dpkernels.backends.native_ops import chacha20 as native_chacha20
from dpkernels.backends.native_ops import optim as native_optim
from tests.ops.test_optim import KEY, NOISE, OPTIMIZERS, SHAPES, State, nonces

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("blocks", [1, 127, 128, 5000])
def test_same_keystream(blocks: int) -> None:
    streams = [
        native_chacha20.chacha20_keystream(KEY, 3, bytes(12), blocks, device=d) for d in ("cpu", "cuda")
    ]
    assert torch.equal(streams[0], streams[1].cpu())


@pytest.mark.parametrize("count", [1, 7, 1024, 1_000_003])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_same_normals(count: int, dtype: torch.dtype) -> None:
    drawn = [
        native_chacha20.chacha20_normal(count, key=KEY, nonce=bytes(12), device=d, dtype=dtype)
        for d in ("cpu", "cuda")
    ]
    assert torch.equal(drawn[0], drawn[1].cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_same_fused_step(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(
        native_optim, "_run", lambda *a, real=native_optim._run: (called.append(a[1].type), real(*a))
    )
    states = []
    for device in ("cpu", "cuda"):
        state = State(name, dtype)
        for tensors in (state.params, state.sums, state.firsts, state.seconds):
            tensors[:] = [t.to(device) for t in tensors]
        for step in (1, 2):
            state.step(step, rounding_nonces=nonces(step, 4))
        states.append(state)
    assert called == ["cpu", "cpu", "cuda", "cuda"]
    for ours, theirs in zip(states[1].everything(), states[0].everything(), strict=True):
        assert torch.equal(ours.cpu(), theirs)


def test_more_tensors_than_one_launch_holds() -> None:
    found = []
    for device in ("cpu", "cuda"):
        count = 300
        params = [torch.zeros(37 + i, device=device) for i in range(count)]
        sums = [torch.zeros(37 + i, dtype=torch.float64, device=device) for i in range(count)]
        streams = [i.to_bytes(12, "little") for i in range(count)]
        ops.noise_sgd(params, sums, [], [1.0] * count, key=KEY, nonces=streams, lr=1.0, **NOISE)
        found.append([p.cpu() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert len(SHAPES) < 128
