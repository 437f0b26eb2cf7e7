"""Smoke test of an installed dpkernels, for `make dist`: `python smoke.py` in the environment to be tested.

The native library loads, takes the ops and agrees with PyTorch; a private step runs and spends a budget. The program
needs dpkernels, torch and nothing else, and no compiler. Exit status 0 and a last line "smoke: passed" if all is well.
"""

import shutil
import subprocess
import sys

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import dpkernels
from dpkernels import ops
from dpkernels.backends import native, registry


def check_no_compiler() -> None:
    """Raise if this environment has a compiler: the test would not show that none is needed."""
    found = [tool for tool in ("cc", "gcc", "c++", "g++", "clang++", "cmake", "nvcc") if shutil.which(tool)]
    if found:
        raise SystemExit(
            f"smoke: the PATH has {', '.join(found)}; fix: run with PATH=the environment's bin folder"
        )


def check_native() -> None:
    """Raise unless the wheel's library serves the ops on the CPU, and `python -m dpkernels` says so."""
    reason = native.unavailable_reason("cpu")
    if reason:
        raise SystemExit(f"smoke: the native library does not load: {reason}")
    printed = subprocess.run(
        [sys.executable, "-m", "dpkernels"], check=True, capture_output=True, text=True
    ).stdout
    rows = [line.split() for line in printed.splitlines()]
    if ["linear_norm_sq", "cpu", "native"] not in [row[:3] for row in rows]:
        raise SystemExit(f"smoke: `python -m dpkernels` does not say native for linear_norm_sq:\n{printed}")


def check_values() -> None:
    """Raise unless each instruction set that this CPU has gives the norms of float64."""
    x, g = torch.randn(3, 7, 33), torch.randn(3, 7, 17)
    exact = torch.einsum("btp,btd->bpd", g.double(), x.double()).flatten(1).square().sum(1)
    best = native.isa()
    for isa in ("baseline", "avx2", "avx512"):
        native.set_isa(isa)
        torch.testing.assert_close(ops.linear_norm_sq(x, g).double(), exact, rtol=1e-4, atol=0)
        if isa == best:
            break
    native.set_isa("")


def check_private_step() -> float:
    """Train two private steps; return the spent ε, or raise if the parameters did not change."""
    data = TensorDataset(torch.randn(256, 8), torch.randint(0, 3, (256,)))
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    engine = dpkernels.PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-2),
        data_loader=DataLoader(data, batch_size=32),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    before = [parameter.detach().clone() for parameter in model.parameters()]

    def losses_of(model: torch.nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
        return cross_entropy(model(batch[0]), batch[1], reduction="none")

    engine.self_check(losses_of, data[:8])
    for logical_batch, _ in zip(loader, range(2), strict=False):
        for batch in logical_batch:
            optimizer.backward(losses_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()
    if any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)):
        raise SystemExit("smoke: a private step changed nothing")
    return engine.get_epsilon(delta=1e-5)


if __name__ == "__main__":
    check_no_compiler()
    if registry.forced() != "auto":
        raise SystemExit("smoke: DPKERNELS_BACKEND is set; fix: unset it")
    check_native()
    check_values()
    epsilon = check_private_step()
    print(
        f"dpkernels {dpkernels.__version__}, torch {torch.__version__}, {native.isa()}, epsilon {epsilon:.2f}"
    )
    print("smoke: passed")
