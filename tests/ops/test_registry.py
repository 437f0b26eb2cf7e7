"""Which backend serves an op: the order, the variable that forces one, and the reasons."""

import logging

import pytest
import torch

from dpkernels import ops
from dpkernels.backends import native, registry, torch_ops
from dpkernels.backends.native_ops import linear as native_linear
from dpkernels.backends.triton_ops import availability


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_chosen", {})
    monkeypatch.delenv(registry.ENVIRONMENT_VARIABLE, raising=False)


def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "unavailable_reason", lambda device, family="": "no library here")


def test_the_variable_forces_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, module in (("torch", "backends.torch_ops.bias"), ("Reference", "reference.bias")):
        monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, value)
        assert registry.implementation("bias_norm_sq", "cpu").__module__ == f"dpkernels.{module}"


def test_another_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(ValueError, match="DPKERNELS_BACKEND: given 'fast'"):
        ops.bias_norm_sq(torch.zeros(1, 1, 1))


def test_an_unknown_op_is_refused() -> None:
    with pytest.raises(ValueError, match="op: given 'linear'"):
        registry.implementation("linear", "cpu")


def test_native_forced_but_absent_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    without_native(monkeypatch)
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "native")
    with pytest.raises(RuntimeError, match=r"bias_norm_sq on cpu.*no library here.*unset DPKERNELS_BACKEND"):
        registry.implementation("bias_norm_sq", "cpu")


def test_a_fallback_is_logged_once_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_native(monkeypatch)
    with caplog.at_level(logging.WARNING, logger="dpkernels"):
        for _ in range(3):
            assert registry.implementation("clip_factors", "cpu") is torch_ops.clip_factors
    assert [record.getMessage() for record in caplog.records] == [
        "clip_factors on cpu uses torch: no library here"
    ]


def test_a_norm_and_its_sum_come_from_one_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm's bound is about that backend's sum."""
    if native.unavailable_reason("cpu", "linear"):
        pytest.skip("needs the native library")
    monkeypatch.delattr(native_linear, "linear_weighted_sum")
    rows = {row.op: row for row in registry.explain(("cpu",))}
    assert rows["linear_norm_sq"].backend == rows["linear_weighted_sum"].backend == "torch"
    assert rows["linear_norm_sq"].reason == "native_ops has no linear_weighted_sum"
    assert rows["bias_norm_sq"].backend == "native"


def on_a_gpu_machine(monkeypatch: pytest.MonkeyPatch, reason: str = "") -> None:
    monkeypatch.setattr(availability, "unavailable_reason", lambda device: reason)


def test_triton_serves_cuda_before_torch_and_never_the_cpu_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu_machine(monkeypatch)
    rows = {(row.op, row.device): row for row in registry.explain(("cpu", "cuda"))}
    for op in registry.families()["bias"]:
        assert rows[op, "cuda"].backend == "triton"
        assert rows[op, "cpu"].backend in ("native", "torch")
    assert rows["clip_factors", "cuda"].backend == "torch"
    assert "triton_ops has no clip_factors" in rows["clip_factors", "cuda"].reason


def test_a_missing_triton_is_a_logged_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(availability.importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING, logger="dpkernels"):
        assert registry.implementation("bias_norm_sq", "cuda") is torch_ops.bias_norm_sq
    assert "triton is not installed; pip install triton" in caplog.text
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "triton")
    with pytest.raises(RuntimeError, match=r"bias_norm_sq on cuda: triton is not installed.*unset DPKERNELS"):
        registry.implementation("bias_norm_sq", "cuda")


def test_triton_forced_leaves_what_it_has_no_kernels_for(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu_machine(monkeypatch)
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "triton")
    rows = {row.op: row.backend for row in registry.explain(("cuda",))}
    assert rows["bias_norm_sq"] == rows["bias_weighted_sum"] == "triton"
    assert rows["clip_factors"] == "torch"
    assert rows["chacha20_normal"] == "reference"


def test_explain_covers_every_op_and_gives_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    without_native(monkeypatch)
    on_a_gpu_machine(monkeypatch, "no triton here")
    rows = registry.explain(("cpu", "cuda"))
    assert [(row.op, row.device) for row in rows] == [
        (op, d) for d in ("cpu", "cuda") for op in registry.ops()
    ]
    assert all(row.reason for row in rows)
    assert {row.backend for row in rows} == {"torch", "reference"}


def test_every_op_is_in_one_family() -> None:
    served = [op for family in registry.families().values() for op in family]
    assert sorted({*served}) == sorted(registry.ops())
    assert registry.family("linear_weighted_sum") == ("linear_norm_sq", "linear_weighted_sum")
    assert registry.family("total_norm_sq") == ("total_norm_sq",)
