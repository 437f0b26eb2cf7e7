"""A part of a night's cases, and that the fuzzer notices the faults it is for."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dpkernels import checkpoint
from dpkernels.backends import native, native_ops
from dpkernels.backends.native_ops import bias, calls, depthwise_conv1d, layer_norm, linear, optim
from dpkernels.privacy.accounting import ledger
from tests.fuzz import __main__ as command
from tests.fuzz import kernels, layers, readers
from tests.fuzz.draw import Draw
from tests.fuzz.memory import Guarded, strided
from tests.fuzz.run import Fuzzer, Journal, Kind

WITHOUT_NATIVE = pytest.mark.skipif(
    bool(native.unavailable_reason("cpu", "linear")), reason=native.unavailable_reason("cpu", "linear")
)
CASES = {"layers": 60, "clip": 15, "noise": 10, "step": 10, "transducer": 6, "refused": 40}
CASES |= {"ledger": 40, "forged": 30, "checkpoint": 20, "listing": 40}


def failures(kind: Kind, cases: int, seed: int = 1) -> Iterator[str]:
    """What the first cases of one kind find."""
    fuzzer = Fuzzer([kind], seed)
    return (str(failure) for case in range(cases) if (failure := fuzzer.run(case)))


@pytest.mark.thinned(3)
@WITHOUT_NATIVE
@pytest.mark.parametrize("kind", kernels.KINDS, ids=lambda kind: kind[0])
def test_native_code(kind: Kind) -> None:
    assert list(failures(kind, CASES[kind[0]])) == []


@pytest.mark.parametrize("kind", readers.KINDS, ids=lambda kind: kind[0])
def test_readers(kind: Kind) -> None:
    assert list(failures(kind, CASES[kind[0]])) == []


# ---- what it notices


def under(original: Callable[..., Any]) -> Callable[..., Any]:
    """A norm without its bound, and a little less."""
    return lambda *args, **options: original(*args, **options) * (1 - 1e-4)


def beyond(original: Callable[..., Any]) -> Callable[..., Any]:
    """A norm that is written four bytes too far."""

    def norms(*args: Any, **options: Any) -> torch.Tensor:
        out = original(*args, **options)
        wide = out.as_strided((len(out) + 1,), (1,))
        wide[-1] = 1.0
        return out

    return norms


def threaded(original: Callable[..., Any]) -> Callable[..., Any]:
    """Another last bit with two threads."""

    def norms(*args: Any, **options: Any) -> torch.Tensor:
        out = original(*args, **options)
        return out if native.threads() == 1 else out.nextafter(torch.tensor(torch.inf))

    return norms


def finite(original: Callable[..., Any]) -> Callable[..., Any]:
    """A NaN that becomes a number."""
    return lambda *args, **options: original(*args, **options).nan_to_num()


@WITHOUT_NATIVE
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (under, r"sample \d+: √|sample \d+ adds"),
        (beyond, "memory next to an output"),
        (threaded, "two threads give other bits"),
        (finite, "a gradient that is not finite"),
    ],
)
def test_a_faulty_norm_is_noticed(fault: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (bias, layer_norm, linear, depthwise_conv1d):
        name = f"{module.__name__.rpartition('.')[2]}_norm_sq"
        monkeypatch.setattr(module, name, fault(getattr(module, name)))
    assert any(re.search(message, line) for line in failures(("layers", layers.check, 1), 60))


@WITHOUT_NATIVE
def test_a_read_beyond_an_input_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs lie among NaNs: a stride that is off by one reads some."""
    original = calls.view

    def askew(tensor: Any) -> Any:
        given = original(tensor)
        given.stride[1] += 1
        return given

    monkeypatch.setattr(bias, "view", askew)
    monkeypatch.setattr(linear, "view", askew)
    assert any(failures(("layers", layers.check, 1), 60))


@WITHOUT_NATIVE
def test_an_accepted_length_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (bias, layer_norm, linear):
        original = module.dense
        clamped = lambda lengths, original=original: (  # noqa: E731
            original(None if lengths is None else lengths.clamp(0, 0))
        )
        monkeypatch.setattr(module, "dense", clamped)
    assert any("accepts wrong lengths" in line for line in failures(("refused", kernels.refused, 1), 60))


@WITHOUT_NATIVE
def test_a_wrong_step_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = optim.noise_adamw

    def other(*args: Any) -> None:
        original(*args)
        for first in args[2]:
            first.mul_(1.01)

    monkeypatch.setattr(optim, "noise_adamw", other)
    assert any("entries differ" in line for line in failures(("step", kernels.step, 1), 30))


def test_a_ledger_that_forgets_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hash that does not depend on the line."""
    monkeypatch.setattr(ledger, "_hash", lambda previous, body: "0" * 64)
    assert any("steps are read of" in line for line in failures(("ledger", readers.ledger, 1), 150))


@pytest.mark.slow  # of 2,500 cases three show it
def test_a_damaged_line_that_is_taken_for_a_torn_one_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_is_torn", ledger._begins_like_a_line)
    assert any("steps are read of" in line for line in failures(("ledger", readers.ledger, 1), 2500))


def test_a_checkpoint_without_its_checksums_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_checksum", lambda values: 0)
    assert any(failures(("checkpoint", readers.saved, 1), 60))


# ---- the fuzzer itself


def test_a_case_is_what_seed_and_number_say() -> None:
    def noted(draw: Draw) -> None:
        draw.note("size", draw.integer(0, 10**9))
        raise AssertionError("wrong")

    first, again, other = (Fuzzer([("a", noted, 1)], seed).run(7) for seed in (3, 3, 4))
    assert first == again != other
    assert "case 7 (a): AssertionError: wrong" in str(first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_layout_has_the_values_and_nan_elsewhere(dtype: torch.dtype) -> None:
    dense = torch.arange(24).reshape(2, 3, 4).to(dtype)
    made = strided(dense, [2, 0, 1], 2, [1, 0, 2], [True, False, True])
    offset, strides = made.data_ptr() - made.buffer.data_ptr(), made.stride()
    assert min(strides) < 0
    flat = made.buffer.tolist()
    start = offset // made.buffer.element_size()
    for i in range(2):
        for t in range(3):
            for j in range(4):
                assert flat[start + i * strides[0] + t * strides[1] + j * strides[2]] == float(dense[i, t, j])
    assert int(made.buffer.isnan().sum()) == len(flat) - dense.numel()


def test_a_write_next_to_an_output_is_noticed() -> None:
    guarded = Guarded()
    with guarded.outputs():
        made = torch.empty(3, dtype=torch.float32)
        zeros, full = torch.zeros((2, 2)), torch.full((2,), 7.0)
    assert not zeros.any()
    assert full.tolist() == [7.0, 7.0]
    made.as_strided((4,), (1,))[3] = 0.0
    with pytest.raises(AssertionError, match="memory next to an output was written to"):
        guarded.check()


def test_a_run_goes_on_behind_the_case_that_ended_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    assert journal.read() == (0, False)
    journal.path.write_text("17           running")  # as a crash leaves it
    assert journal.read() == (18, True)
    with contextlib.suppress(KeyboardInterrupt), journal.written() as note:
        note(20)
        raise KeyboardInterrupt
    assert journal.read() == (20, False)


def test_the_command_says_how_to_repeat_a_case(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def odd(draw: Draw) -> None:
        assert draw.note("value", draw.integer(0, 9)) < 5

    monkeypatch.setattr(command, "kinds", lambda only: [("odd", odd, 1)])
    monkeypatch.setattr(command, "JOURNALS", tmp_path)
    assert command.main(["--cases", "20", "--seed", "3"]) == 1
    said = capsys.readouterr().out
    assert "python -m tests.fuzz --only all --seed 3 --case" in said
    assert "20 cases (20 odd)" in said
    case = said.partition("--seed 3 --case")[2].split()[0]
    assert command.main(["--seed", "3", "--case", case]) == 1
    assert f"case {case} (odd)" in capsys.readouterr().out
    assert command.main(["--cases", "20", "--seed", "3", "--resume"]) == 0, "nothing is left to run"


def test_every_native_op_is_fuzzed() -> None:
    """What the C ABI has for the CPU occurs in the fuzzer's sources."""
    header = "".join(path.read_text() for path in (Path(__file__).parents[2] / "csrc").glob("*.h"))
    ops = {name.partition("(")[0] for name in header.split("dpk_cpu_")[1:]}
    ops = {name for name in ops if name.replace("_", "").isalnum() and hasattr(native_ops, name)}
    sources = "".join(Path(module.__file__ or "").read_text() for module in (layers, kernels))
    families = {f"{family}_{kind}" for family in layers.FAMILIES for kind in ("norm_sq", "weighted_sum")}
    assert {op for op in ops if op not in families and op not in sources} == set()
