"""No Triton kernel's integer arithmetic leaves its type's range: elsewhere the interpreter does not look at that."""

from collections.abc import Iterator

import pytest
import torch

from dpkernels.backends.triton_ops import availability
from tests.ops.cases import FAMILIES, WITH_LENGTHS, make
from tests.ops.conftest import TRITON_DEVICE
from tests.ops.test_grouped import FACTORS, empty, grouped, many
from tests.ops.test_total_norm import total
from tests.ops.transducer import TDT
from tests.ops.transducer import make as make_utterances

if availability.unavailable_reason(TRITON_DEVICE):
    pytest.skip(availability.unavailable_reason(TRITON_DEVICE), allow_module_level=True)
if TRITON_DEVICE == "cuda":
    pytest.skip("the interpreter looks for overflow; a GPU does not", allow_module_level=True)
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterError

from tests import interpreter

pytestmark = pytest.mark.usefixtures("triton_backend")


@pytest.fixture(autouse=True)
def _overflow_checked(triton_backend: str) -> Iterator[None]:
    with interpreter.overflow_checked():
        yield


@triton.jit
def square(number, out):
    tl.store(out, number * number)


def test_an_overflow_is_noticed_here_and_only_here() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    square[(1,)](46340, out)
    assert int(out) == 46340**2
    with pytest.raises(InterpreterError, match="int32 overflow"):
        square[(1,)](46341, out)
    interpreter.check_overflow(False)
    square[(1,)](46341, out)
    assert int(out) == 46341**2 - 2**32


@pytest.mark.thinned(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_norms_and_sums(family: str) -> None:
    """Several tiles each way, a part of one, and samples of unlike lengths."""
    lengths = torch.tensor([139, 65]) if family in WITH_LENGTHS else None
    case = make(family, 2, 139, 33, 17, lengths=lengths)
    case.norms()
    case.sums(torch.tensor([0.5, 1.0]))


def test_many_layers_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpkernels.backends.triton_ops.grouped._FEWEST_PROGRAMS", 0)
    cases = many(1)
    total(cases)
    grouped(cases, empty(cases), FACTORS)


def test_a_transducers_loss() -> None:
    batch = make_utterances(TDT, frames=(9, 4), labels=(2, 3))
    for tensor in batch.states:
        tensor.requires_grad_()
    batch.loss().sum().backward()
    assert batch.encoder.grad is not None
