"""Every GPU kernel once on small shapes, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck --error-exitcode 1 python -m bench.gpu.sanitize
    compute-sanitizer --tool racecheck --error-exitcode 1 python -m bench.gpu.sanitize

Sizes do not fit tiles, lengths differ, and one layout is aligned and one is not; float32 and bfloat16.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from dpkernels import ops
from dpkernels.backends.triton_ops import grouped

BATCH, RANK = 3, 5


def norms_and_sums(dtype: torch.dtype, d: int, p: int, frames: int = 70) -> None:
    """All families of norms, with their weighted sums, alone and together."""

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device="cuda").to(dtype)

    def out(*sizes: int) -> Tensor:
        return torch.zeros(*sizes, device="cuda", dtype=torch.float64)

    x, g, h, dh = (normal(BATCH, frames, n) for n in (d, p, RANK, RANK))
    lengths = torch.tensor([frames, 0, 7], device="cuda")
    factors = torch.tensor([1.0, 0.0, 0.5], device="cuda")
    for lengths_or_none in (None, lengths):
        for method in ("gram", "direct", "auto"):
            ops.linear_norm_sq(x, g, lengths=lengths_or_none, method=method)
        ops.linear_weighted_sum(x, g, factors, out(p, d), lengths=lengths_or_none)
        ops.bias_norm_sq(g, lengths=lengths_or_none)
        ops.bias_weighted_sum(g, factors, out(p), lengths=lengths_or_none)
        ops.layer_norm_norm_sq(x, x, lengths=lengths_or_none)
        ops.layer_norm_weighted_sum(x, x, factors, out(d), lengths=lengths_or_none)
        ops.lora_norm_sq(x, h, g, dh, lengths=lengths_or_none)
        ops.lora_weighted_sum(x, h, g, dh, factors, out(RANK, d), out(p, RANK), lengths=lengths_or_none)
    ops.lora_gradients(x, h, g, dh)
    ids = torch.randint(0, 11, (BATCH, frames), device="cuda")
    ops.embedding_norm_sq(ids, g, padding_idx=1)
    ops.embedding_weighted_sum(ids, g, factors, out(11, p), padding_idx=1)
    c, e = normal(BATCH, d, frames), normal(BATCH, d, frames)
    ops.depthwise_conv1d_norm_sq(c, e, kernel_size=9, padding=4)
    ops.depthwise_conv1d_weighted_sum(c, e, factors, out(d, 1, 9), padding=4)
    vector = normal(BATCH, 1, p)
    layers = ([x, x, vector], [g, g, vector], ["lora", "lora", "bias"])
    lora = {"hs": [h, h], "dhs": [dh, dh], "scalings": [0.5, 2.0]}
    ops.total_norm_sq(*layers, **lora)  # type: ignore[arg-type]
    outs = [out(*sizes) for sizes in ((RANK, d), (p, RANK), (RANK, d), (p, RANK), (p,))]
    ops.clip_and_noise(*layers, factors, outs, **lora)  # type: ignore[arg-type]


def transducers(dtype: torch.dtype) -> None:
    """The transducer loss as an RNN-T and as a TDT, with a label and lengths that are clamped."""
    encoder, predictor = (
        torch.randn(BATCH, n, 33, device="cuda").to(dtype).requires_grad_() for n in (21, 7)
    )
    targets = torch.randint(-3, 90, (BATCH, 6), device="cuda")
    lengths = (torch.tensor(n, device="cuda") for n in ([21, 0, 40], [6, 2, -1]))
    frame_lengths, target_lengths = lengths
    for durations in (None, (0, 1, 3)):
        weight = torch.randn(71 + len(durations or ()), 33, device="cuda").to(dtype).requires_grad_()
        losses = ops.transducer_loss(
            encoder,
            predictor,
            weight,
            None,
            targets,
            frame_lengths,
            target_lengths,
            blank=70,
            durations=durations,
        )
        torch.autograd.grad(losses, (encoder, predictor, weight), torch.ones_like(losses))


def fused_steps() -> None:
    """The cipher, normals, and both fused steps on tensors of awkward sizes."""
    key = bytes(range(32))
    ops.chacha20_keystream(key, 0, bytes(12), 130, device="cuda")
    ops.chacha20_normal(1001, key=key, nonce=bytes(12), device="cuda")
    for dtype in (torch.float32, torch.bfloat16):
        sizes = (1, 255, 256, 1025)
        params = [torch.randn(n, device="cuda").to(dtype) for n in sizes]
        sums = [torch.randn(n, device="cuda", dtype=torch.float64) for n in sizes]
        states = [[torch.zeros(n, device="cuda") for n in sizes] for _ in range(2)]
        nonces = [bytes([i]) + bytes(11) for i in range(len(sizes))]
        noise = {"key": key, "nonces": nonces, "noise_scale": 1.0, "grid": 2.0**-12, "divisor": 4.0}
        steps = [1.0] * len(sizes)
        adam = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
        ops.noise_adamw(params, sums, *states, steps, **noise, **adam)  # type: ignore[arg-type]
        ops.noise_sgd(params, sums, [], steps, **noise, lr=0.1)  # type: ignore[arg-type]


def main() -> int:
    """Run them; exit status 2 without a GPU."""
    if not torch.cuda.is_available():
        print("error: torch sees no CUDA device; run this on a machine with a GPU", file=sys.stderr)
        return 2
    grouped._FEWEST_PROGRAMS = 0
    for dtype in (torch.bfloat16, torch.float32):
        norms_and_sums(dtype, 33, 70)
        norms_and_sums(dtype, 64, 48)
        transducers(dtype)
    fused_steps()
    torch.cuda.synchronize()
    print("every kernel ran")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
