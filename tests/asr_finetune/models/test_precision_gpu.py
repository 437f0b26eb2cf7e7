"""On a GPU, under CUDA's autocast: the gradients are the utterances' own, and records go into one launch."""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version

from asr_finetune.models.recognizer import Recognizer
from dpkernels import PrivacyEngine
from tests.asr_finetune import small_models
from tests.asr_finetune.models.test_precision import (
    HALF,
    KINDS,
    TAME,
    adapter_records,
    distance,
    made_private,
    one_by_one,
    prepared,
    privately,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
of_parakeet = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="before transformers 5.23 Parakeet's features need librosa",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", [pytest.param("parakeet", marks=of_parakeet), "wav2vec2-bert", "whisper"])
def test_gradients_are_the_utterances_own(folders: dict[str, Path], family: str, kind: str) -> None:
    def there(dtype: str) -> Recognizer:
        recognizer = prepared(folders[family], kind, dtype)
        recognizer.model.to("cuda")
        return recognizer

    exact = one_by_one(prepared(folders[family], kind, "float32"))
    assert distance(privately(there("float32")), exact) < 1e-3
    half = there("bfloat16")
    if (family, kind) in TAME:
        assert 0 < distance(privately(there("bfloat16")), exact) < 0.12
    batch, singles = small_models.batch_and_singles(half)
    with closing(PrivacyEngine()) as engine:
        made_private(engine, half)
        report = engine.self_check(half.loss_per_example, batch, singles=singles, tolerance=math.inf)
    assert report.norm_shortfall <= 1


@pytest.mark.parametrize("family", [pytest.param("parakeet", marks=of_parakeet), "wav2vec2-bert"])
def test_one_launch_takes_the_adapters(folders: dict[str, Path], family: str) -> None:
    recognizer = prepared(folders[family], "lora")
    recognizer.model.to("cuda")
    adapters = adapter_records(recognizer)
    assert adapters
    assert all(record.share() is not None for record in adapters)
    assert {record.x.dtype for record in adapters} == {HALF}
