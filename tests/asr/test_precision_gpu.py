"""On a GPU, under CUDA's autocast: norms bound what is added, records go into one launch, frozen norms stay half."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch

from dpkernels import PrivacyEngine
from dpkernels.nn import LoRARecord, Record
from tests.asr import small_models
from tests.asr.test_precision import HALF, KINDS, made_private, prepared

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["parakeet", "wav2vec2-bert", "whisper"])
def test_gradients_are_the_utterances_own(folders: dict[str, Path], family: str, kind: str) -> None:
    recognizer = prepared(folders[family], kind)
    recognizer.model.to("cuda")
    batch, singles = small_models.batch_and_singles(recognizer)
    with closing(PrivacyEngine()) as engine:
        made_private(engine, recognizer)
        with recognizer.in_float32():
            exact = engine.self_check(recognizer.loss_per_example, batch, singles=singles)
        rounded = engine.self_check(recognizer.loss_per_example, batch, singles=singles, tolerance=0.2)
    assert max(exact.norm_shortfall, rounded.norm_shortfall) <= 1


def test_one_launch_takes_the_adapters(folders: dict[str, Path]) -> None:
    recognizer = prepared(folders["parakeet"], "lora")
    recognizer.model.to("cuda")
    records: list[Record] = []
    with closing(PrivacyEngine()) as engine:
        _, optimizer, _ = made_private(engine, recognizer)
        optimizer.tape.open(3, sink=records.append)
        batch, _ = small_models.batch_and_singles(recognizer)
        recognizer.loss_per_example(recognizer.model, batch).sum().backward()
        records += optimizer.tape.close()
    adapters = [record for record in records if isinstance(record, LoRARecord)]
    assert adapters
    assert {record.x.dtype for record in adapters} == {HALF}
    assert all(record.share() is not None for record in adapters)
