"""What every test runs under.

Before anything imports triton: without a GPU its kernels are interpreted on the CPU, and so tested everywhere. Workers
of `pytest -n` take one thread each, or all would wait for one another; tests of threads choose their number themselves.
Every test begins from one seed, in whatever order and process it runs: torch seeds itself at random at start-up, and a
test whose weights came of that failed in one run of twelve.
"""

import gc
import importlib
import importlib.util
import os
import random

import numpy as np
import pytest
import torch

from tests.slow import thin

if importlib.util.find_spec("setuptools") is not None:
    # torch's inductor asks for it, and it refuses to come after something that has imported distutils
    importlib.import_module("setuptools")
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ["TRITON_INTERPRET"] == "1" and importlib.util.find_spec("triton") is not None:
        from tests import interpreter

        interpreter.speed_up()


def pytest_collection_finish() -> None:
    """What is imported stays until the end: collections, which some tests ask for, need not walk it each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Else native extensions, which find their types alive at the end, report these as leaked."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


@pytest.hookimpl(tryfirst=True)  # before pytest deselects what is slow
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    thin(items)
