"""One thread: the tensors here are so small that a second one only waits."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A tolerance that one draw in a thousand exceeds would fail one run in two."""
    torch.manual_seed(20260102)
