"""Libraries' warnings that a user can do nothing about are not shown, and no others are hidden."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from asr_finetune.config.schema import ModelConfig
from asr_finetune.models.loading import load_with_adapter
from asr_finetune.models.quiet import without_warnings
from tests.asr_finetune import small_models
from tests.asr_finetune.models.test_methods import prepared

LOG = logging.getLogger("transformers")


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What transformers' own handler would show."""
    lines: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Kept(logging.WARNING)
    LOG.addHandler(handler)
    transformers.utils.logging.warning_once.cache_clear()  # else a line is shown for its first cause only
    yield lines
    LOG.removeHandler(handler)


@pytest.mark.filterwarnings("error")
def test_adapters_and_transcripts_are_made_in_silence(
    folders: Any, tmp_path: Path, logged: list[str]
) -> None:
    recognizer = prepared(folders["whisper"], "lora")
    recognizer.save(tmp_path / "adapter")
    recognizer = load_with_adapter(ModelConfig(str(folders["whisper"]), device="cpu"), tmp_path / "adapter")
    batch, _ = small_models.batch_and_singles(recognizer)
    recognizer.transcribe(batch)
    assert logged == []


def test_other_warnings_are_shown(logged: list[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with without_warnings("of this (kind)"):
            for text in ("a warning of this (kind)", "a warning of another kind"):
                warnings.warn(text, FutureWarning, stacklevel=1)
                LOG.warning(text)
        LOG.warning("later, of this (kind)")
        warnings.warn("later, of this (kind)", FutureWarning, stacklevel=1)
    assert logged == ["a warning of another kind", "later, of this (kind)"]
    assert [str(warning.message) for warning in caught] == logged
