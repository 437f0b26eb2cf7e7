"""fastDP, Amazon's library of book-keeping (arXiv 2210.00038), from a folder that the user names.

It is on no package index: clone github.com/awslabs/fast-differential-privacy, and give its folder by
`pytest --benchmark --benchmark-fastdp=FOLDER` (or in the environment, under the name `VARIABLE`). Used as in its
README, with the clipping function that all contenders have ("Abadi") and its default mode ("MixOpt").
"""

from __future__ import annotations

import importlib
import io
import os
import subprocess
import sys
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from bench.cases.models import Batch, Case, forward
from bench.contenders.base import CannotRun, Contender, Settings

VARIABLE = "DPKERNELS_FASTDP"
PACKAGE = "fastDP"


def folder() -> Path | None:
    """The folder that the user named, or None."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else None


@cache
def package() -> Any:
    """The package in the folder, or the reason why it cannot be imported. The first call imports it."""
    where = folder()
    if where is None or not (where / PACKAGE / "__init__.py").is_file():
        return f"{where} has no package {PACKAGE}: name the folder that holds the repository's README"
    sys.path.insert(0, str(where.resolve()))
    try:
        with redirect_stdout(io.StringIO()):
            return importlib.import_module(PACKAGE)
    except (ImportError, AttributeError) as error:  # of a library that it needs, or needs in another version
        return f"{PACKAGE} of {where} cannot be imported: {error}"
    finally:
        sys.path.pop(0)


def version() -> str | None:
    """Its version and the commit of its folder; None if no folder is named."""
    where = folder()
    if where is None:
        return None
    found = getattr(package(), "__version__", "not imported")
    done = subprocess.run(
        ["git", "-C", str(where), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return f"{found}, {done.stdout.strip()}" if done.returncode == 0 else str(found)


class BookKeeping(Contender):
    """Norms in the backward; when it reaches the first layer, the clipped sums from the tensors that were kept."""

    def __init__(self, case: Case, model: nn.Module, batch: Batch, settings: Settings) -> None:
        super().__init__(case, model, batch, settings)
        found = package()
        if isinstance(found, str):
            raise CannotRun(found)
        self.optimizer = self.new_optimizer()
        with redirect_stdout(io.StringIO()):
            engine = found.PrivacyEngine(
                model,
                batch_size=self.size,
                sample_size=self.size,
                epochs=1,
                noise_multiplier=settings.noise,
                max_grad_norm=settings.clip,
                clipping_fn="Abadi",
            )
            engine.attach(self.optimizer)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.case.losses(forward(self.model, self.batch), self.batch["labels"]).mean().backward()
        with redirect_stdout(io.StringIO()):  # it names parameters that it has no rule for
            self.optimizer.step()
