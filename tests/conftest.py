"""What every test runs under.

Before anything imports triton: without a GPU its kernels are interpreted on the CPU, and so tested everywhere. Workers
of `pytest -n` take one thread each, or all would wait for one another; tests of threads choose their number themselves.
Every test begins from one seed, in whatever order and process it runs: torch seeds itself at random at start-up, and a
test whose weights came of that failed in one run of twelve.
"""

import importlib.util
import os
import random
from typing import Any

import numpy as np
import pytest
import torch


def _patch_once_a_launch() -> None:
    """Let the interpreter prepare `triton.language` once a launch and module, as it was then left.

    It does so again at every call of a function from a kernel, which changes nothing and is half of its time.
    """
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_once(fn: Any) -> Any:
        module = id(fn.__globals__)
        if module in patched:
            return None
        patched.add(module)
        return patch(fn)

    def launch_afresh(self: Any, *arguments: Any, **keywords: Any) -> Any:
        patched.clear()
        try:
            return launch(self, *arguments, **keywords)
        finally:
            patched.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_afresh


if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ["TRITON_INTERPRET"] == "1" and importlib.util.find_spec("triton") is not None:
        _patch_once_a_launch()


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
