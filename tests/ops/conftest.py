"""The backends that the ops' tests run on."""

import pytest
import torch

from dpkernels.backends import native, registry

BACKENDS = ("reference", "torch", "native")


def _use(name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    if name == "native":
        reason = native.unavailable_reason("cpu", "linear")
        if reason:
            pytest.skip(reason)
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, name)
    return name


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test once on every backend that this installation has."""
    return _use(request.param, monkeypatch)


@pytest.fixture(params=BACKENDS[1:])
def bounded_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same without the reference, whose float64 has no bound added: it is what the bounds are about."""
    return _use(request.param, monkeypatch)


@pytest.fixture
def torch_backend(monkeypatch: pytest.MonkeyPatch) -> str:
    """The torch composition only: where faults are planted, by replacing one of its helpers."""
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "torch")
    return "torch"


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(20260101)
