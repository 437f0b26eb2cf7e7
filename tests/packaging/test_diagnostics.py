"""`python -m dpkernels`: versions, libraries, the backend of every op, and for what is amiss its reason and fix."""

import importlib.metadata
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import dpkernels
from dpkernels import __main__
from dpkernels.backends import native, registry

Shown = Callable[[], str]
MEND = "install a C++ compiler and reinstall with DPKERNELS_BUILD=cpu"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shown:
    """What is printed, in one line."""
    monkeypatch.delenv(registry.ENVIRONMENT_VARIABLE, raising=False)

    def show() -> str:
        __main__.main()
        return " ".join(capsys.readouterr().out.split())

    return show


@pytest.fixture
def library_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty folder in place of dpkernels/lib."""
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    native.library.cache_clear()
    yield tmp_path
    native.library.cache_clear()


@pytest.mark.slow
def test_as_a_program_it_shows_versions_libraries_and_each_op() -> None:
    done = subprocess.run([sys.executable, "-m", "dpkernels"], capture_output=True, text=True, check=True)
    text = " ".join(done.stdout.split())
    assert f"dpkernels {dpkernels.__version__} python {platform.python_version()} torch " in text
    assert f"torch {importlib.metadata.version('torch')} " in text
    for device in ("cpu", "cuda"):
        library = native.library(device)
        state = (
            f"version {dpkernels.__version__}, ABI {native.ABI_VERSION}"
            if library.handle
            else f"none: {library.reason}"
        )
        assert f"lib/libdpkernels_{device}.so {state}" in text
        for row in registry.explain((device,)):
            assert re.search(rf"\b{row.op} {device} {row.backend}\b", text)
            assert row.reason in text
    assert {row.op for row in registry.explain(("cpu",))} == set(registry.ops())


def test_the_instruction_set_is_shown(shown: Shown) -> None:
    if native.unavailable_reason("cpu"):
        pytest.skip(native.unavailable_reason("cpu"))
    before = native.isa()
    try:
        native.set_isa("baseline")
        assert ", instruction set baseline" in shown()
    finally:
        native.set_isa(before)


@pytest.mark.parametrize(
    ("cuda", "found", "said"),
    [
        (None, False, "gpu none: this torch is built without CUDA; everything runs on the CPU"),
        ("13.0", False, "gpu none: torch's CUDA 13.0 finds no GPU or driver; everything runs on the CPU"),
        ("13.0", True, "gpu NVIDIA X1 Native libraries"),
    ],
)
def test_whether_there_is_a_gpu_is_said(
    shown: Shown, monkeypatch: pytest.MonkeyPatch, cuda: str | None, found: bool, said: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA X1")
    assert said in shown()


def test_notes_number_the_reasons(shown: Shown, library_folder: Path) -> None:
    text = shown()
    for row in registry.explain():
        number = re.search(rf"\b{row.op} {row.device} {row.backend} \((\d+)\)", text)
        assert number, row
        assert f"({number[1]}) {row.reason}" in text


def test_a_forced_backend_is_named_with_the_mend(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Backends (DPKERNELS_BACKEND=auto) op" in shown()
    monkeypatch.setenv("DPKERNELS_BACKEND", "torch")
    text = shown()
    assert "Backends (DPKERNELS_BACKEND=torch forces this; unset it to use native code" in text
    assert "linear_norm_sq cpu torch" in text
    assert re.search(
        r"chacha20_normal cpu reference \((\d)\) .* \(\1\) torch_ops has no chacha20_normal", text
    )


def test_a_wrong_backend_is_refused_with_the_mend(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPKERNELS_BACKEND", "fast")
    text = shown()
    assert "given 'fast'; set it to one of auto, native, triton, torch, reference, or unset it" in text
    assert f"dpkernels {dpkernels.__version__}" in text  # the rest is shown all the same


def test_an_absent_library_is_named_with_the_mend(shown: Shown, library_folder: Path) -> None:
    text = shown()
    reason = f"libdpkernels_cpu.so is not in this installation; {MEND}"
    assert f"lib/libdpkernels_cpu.so none: {reason}" in text
    assert "libdpkernels_cuda.so is not in this installation; put nvcc on the PATH and reinstall" in text
    assert f"(1) {reason}" in text
    assert "linear_norm_sq cpu torch (1)" in text


def test_native_forced_without_a_library_says_that_nothing_serves(
    shown: Shown, library_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DPKERNELS_BACKEND", "native")
    text = shown()
    number = re.search(r"linear_norm_sq cpu none \((\d+)\)", text)
    assert number
    reason = "linear_norm_sq on cpu: no implementation (libdpkernels_cpu.so is not in this"
    assert f"({number[1]}) {reason}" in text
    assert "unset DPKERNELS_BACKEND" in text


def test_a_library_that_does_not_load_is_named_with_the_mend(shown: Shown, library_folder: Path) -> None:
    (library_folder / "libdpkernels_cpu.so").write_text("no library")
    text = shown()
    assert re.search(
        rf"libdpkernels_cpu\.so does not load \([^;]*libdpkernels_cpu\.so: [^;]+\); {re.escape(MEND)}", text
    )


def test_a_library_of_another_abi_is_named_with_the_mend(
    shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native.unavailable_reason("cpu"):
        pytest.skip(native.unavailable_reason("cpu"))
    right = native.ABI_VERSION
    monkeypatch.setattr(native, "ABI_VERSION", 99)
    native.library.cache_clear()
    try:
        assert f"libdpkernels_cpu.so has ABI version {right}, this Python code needs 99; {MEND}" in shown()
    finally:
        native.library.cache_clear()


def test_without_torch_it_says_how_to_get_it(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    text = shown()
    assert "torch not installed" in text
    assert "Backends none: torch is not installed; fix: pip install torch" in text
