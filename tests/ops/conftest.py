"""The backends that the ops' tests run on.

Triton kernels run on the GPU where there is one (then these tests are marked `gpu`), and in Triton's interpreter on
the CPU otherwise: `tests/conftest.py` asks for it before anything imports triton.
"""

from collections.abc import Iterator

import pytest
import torch

from dpkernels.backends import native, registry
from dpkernels.backends.triton_ops import availability
from tests.ops.cases import served

TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = pytest.param("triton", marks=pytest.mark.gpu) if TRITON_DEVICE == "cuda" else "triton"
BACKENDS = ("reference", "torch", "native", TRITON)


def use(name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """For a fixture: the backend, tensors on its device; skips where there is none, or no kernel of the family."""
    device = TRITON_DEVICE if name == "triton" else "cpu"
    reason = native.unavailable_reason("cpu", "linear") if name == "native" else ""
    if name == "triton":
        reason = availability.unavailable_reason(device)
    if reason:
        pytest.skip(reason)
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, name)
    family = request.node.callspec.params.get("family")
    if family is not None and family not in served():
        pytest.skip(f"{name} has no kernel of {family}")
    with torch.device(device):
        yield name


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test once on every backend that this installation has, making its tensors on that one's device."""
    yield from use(request.param, request, monkeypatch)


@pytest.fixture(params=BACKENDS[1:])
def bounded_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The same without the reference, whose float64 has no bound added: it is what the bounds are about."""
    yield from use(request.param, request, monkeypatch)


@pytest.fixture(params=[TRITON])
def triton_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The Triton kernels only."""
    yield from use(request.param, request, monkeypatch)


@pytest.fixture
def torch_backend(monkeypatch: pytest.MonkeyPatch) -> str:
    """The torch composition only: where faults are planted, by replacing one of its helpers."""
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "torch")
    return "torch"


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(20260101)
