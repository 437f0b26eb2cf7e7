"""The bytes that are alive while code runs, counted with real and with fake tensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asr_finetune.planning.live_memory import LiveMemory, Target, cuda_size, hollow, rehearsal


def test_a_storage_counts_once_and_until_it_is_freed() -> None:
    with LiveMemory() as memory:
        x = torch.zeros(100)
        view = x.view(10, 10).t()
        assert memory.live == 400
        y = x + 1
        assert (memory.live, memory.peak) == (800, 800)
        del x
        assert memory.live == 800  # the view holds it
        del view, y
        assert (memory.live, memory.peak) == (0, 800)
        memory.restart()
        assert memory.peak == 0


def test_what_was_there_before_counts_only_when_asked() -> None:
    weight = torch.zeros(50)
    with LiveMemory() as memory:
        view = weight.view(5, 10)
        assert memory.live == 0
        memory.count(weight)
        memory.count(view)
        assert memory.live == 200


def test_sizes_are_rounded_as_the_allocator_rounds_them() -> None:
    with LiveMemory(cuda_size) as memory:
        tensors = [torch.zeros(1), torch.zeros(128), torch.zeros(129)]
        assert memory.live == 512 + 512 + 1024
        del tensors
    mib = 2**20
    assert cuda_size(9 * mib + 1) == 9 * mib + 512
    assert cuda_size(11 * mib) == 12 * mib  # 1 MiB is left of the segment: not cut off
    assert cuda_size(11 * mib - 512) == 11 * mib - 512  # more is


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        scratch = grad.new_zeros(10_000)  # 40 kB, for a moment
        return grad * 2 + scratch[0]


def test_it_sees_into_a_backward_and_into_autograd_functions() -> None:
    x = torch.zeros(10, requires_grad=True)
    with LiveMemory() as memory:
        y = _Doubled.apply(x).sum()
        before = memory.peak
        y.backward()
        assert memory.peak >= before + 40_000
        assert memory.live < 1000


def _step(model: nn.Module, x: Tensor) -> None:
    model(x).square().sum().backward()


def test_a_rehearsal_counts_what_the_real_run_counts() -> None:
    model = nn.Sequential(nn.Conv1d(8, 16, 3), nn.GELU(), nn.LayerNorm(30), nn.Flatten(), nn.Linear(480, 7))
    with LiveMemory() as real:
        _step(model, torch.zeros(4, 8, 32))
    model.zero_grad()
    with rehearsal("cpu"):
        copy = hollow(model)
        with LiveMemory() as fake:
            _step(copy, torch.zeros(4, 8, 32))
    assert fake.peak == real.peak > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_hollow_model_holds_nothing_and_leaves_the_model_alone() -> None:
    with torch.device("meta"):
        model = nn.Linear(10, 10)
    model.table = torch.zeros(3)  # neither parameter nor buffer
    model.bias.requires_grad_(False)
    with rehearsal("cpu"):
        copy = hollow(model)
        assert copy.weight.shape == (10, 10)
        assert copy.weight.requires_grad
        assert not copy.bias.requires_grad
        assert copy(torch.zeros(2, 10)).shape == (2, 10)
    assert model.weight.is_meta
    assert type(model.table) is Tensor


def test_fake_tensors_have_addresses_that_tell_them_apart() -> None:
    with rehearsal("cpu"):
        x, y = torch.zeros(8), torch.zeros(8)
        assert x.data_ptr() == x.view(2, 4).data_ptr() == x[1:].data_ptr() - 4
        assert not x.data_ptr() <= y.data_ptr() < x.data_ptr() + x.nbytes


def test_cuda_s_attention_keeps_no_scores_but_a_padded_mask() -> None:
    shape, scores = (2, 4, 30, 16), 2 * 4 * 30 * 30 * 4

    def peak(target: str, masked: bool) -> int:
        with rehearsal(target):  # type: ignore[arg-type]
            q = torch.zeros(shape, requires_grad=True)
            mask = torch.zeros(2, 4, 30, 30, requires_grad=True) if masked else None
            with LiveMemory() as memory:
                F.scaled_dot_product_attention(q, q, q, attn_mask=mask).sum().backward()
                return memory.peak

    assert peak("cuda", masked=False) < peak("cpu", masked=True)
    assert peak("cuda", masked=True) >= peak("cuda", masked=False) + scores * 32 // 30


def test_ctc_saves_its_forward_variables() -> None:
    frames, labels = 40, 7
    with rehearsal("cpu"), LiveMemory() as memory:
        log_probs = torch.zeros(frames, 3, 20, requires_grad=True)
        lengths = torch.full((3,), frames), torch.full((3,), labels)
        before = memory.live
        losses = F.ctc_loss(log_probs, torch.zeros(3, labels, dtype=torch.int64), *lengths, reduction="none")
        saved = 3 * frames * (2 * labels + 1) * 4
        assert memory.live - before >= saved
        losses.sum().backward()
        assert log_probs.grad is not None
        assert log_probs.grad.shape == log_probs.shape


@pytest.mark.parametrize(("target", "dtype"), [("cuda", torch.float32), ("cpu", torch.bfloat16)])
def test_autocast_takes_a_softmax_in_float32_on_cuda_only(target: Target, dtype: torch.dtype) -> None:
    with rehearsal(target), torch.autocast("cpu", torch.bfloat16):
        x = torch.empty(4, 8, dtype=torch.bfloat16)
        assert {x.softmax(-1).dtype, F.layer_norm(x, (8,)).dtype} == {dtype}
    with rehearsal(target):
        assert torch.empty(4, 8, dtype=torch.bfloat16).softmax(-1).dtype == torch.bfloat16


@pytest.mark.parametrize(("target", "kept"), [("cuda", 1), ("cpu", 4)])
def test_dropout_keeps_a_byte_an_entry_on_cuda(target: Target, kept: int) -> None:
    with rehearsal(target), LiveMemory() as memory:
        x = torch.empty(1000, requires_grad=True)
        before = memory.live
        y = nn.Dropout(0.1)(x)
        assert memory.live - before == 4 * 1000 + kept * 1000
        assert F.dropout(y, 0.1, training=False) is not None
        y.sum().backward()
        assert x.grad is not None
