"""`train.compile_frozen`: a recogniser's compiled blocks, its clipped sums, and what is refused by the key."""

from __future__ import annotations

import copy
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from asr_finetune.config.schema import ConfigError, MethodConfig, TrainConfig
from asr_finetune.console import Reporter
from asr_finetune.models.loading import Recognizer
from asr_finetune.models.methods import apply_method
from asr_finetune.planning.memory import losses_of
from asr_finetune.training import setup
from asr_finetune.training.setup import prepare_blocks
from dpkernels import PrivacyEngine
from dpkernels.blocks import checkpoint_blocks, compile_frozen_blocks, frozen_blocks
from dpkernels.memory import MemoryEstimator
from dpkernels.nn import detach
from tests.asr_finetune import small_models
from tests.privacy.strategy_models import distance
from tests.test_blocks import _fresh, counting, private, sums

__all__ = ["_fresh"]  # of every test here


def prepared(folder: Path, **method: Any) -> Recognizer:
    recognizer = small_models.load(folder)
    small_models.same_start(lambda: apply_method(recognizer, MethodConfig(rank=2, **method)))
    for name, parameter in recognizer.model.named_parameters():
        if "lora_B" in name:
            torch.manual_seed(len(name))
            nn.init.normal_(parameter, std=0.3)
    return recognizer


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("family", "method", "expected"),
    [
        ("whisper", {"kind": "lora", "layers": "decoder"}, {"WhisperEncoder": 1}),
        ("whisper", {"kind": "lora"}, {}),
        (
            "parakeet",
            {"kind": "lora"},
            {"ParakeetEncoderSubsamplingConv2D": 1, "ParakeetEncoderConvolutionModule": 2},
        ),
        ("parakeet", {"kind": "full"}, {}),
        ("parakeet", {"kind": "head"}, {"ParakeetEncoder": 1}),
    ],
)
def test_blocks_are_the_largest_that_are_frozen(
    folders: dict[str, Path], family: str, method: dict[str, Any], expected: dict[str, int]
) -> None:
    model = prepared(folders[family], **method).model
    found = [type(block).__name__ for _, block in frozen_blocks(model)]
    assert {name: found.count(name) for name in found} == expected
    for name, block in frozen_blocks(model):
        assert model.get_submodule(name) is block


@pytest.mark.slow  # quick, on a small network: tests/test_blocks.py
@pytest.mark.parametrize(
    ("family", "method", "strategy", "checkpointed", "by"),
    [
        ("parakeet", {"kind": "lora"}, "bookkeeping", False, "eager"),
        ("parakeet", {"kind": "lora"}, "two_pass", True, "aot_eager"),
        ("whisper", {"kind": "lora", "layers": "decoder"}, "bookkeeping", False, "aot_eager"),
    ],
)
def test_a_recognisers_clipped_sums_and_self_check(
    folders: dict[str, Path], family: str, method: dict[str, Any], strategy: str, checkpointed: bool, by: str
) -> None:
    backend, graphs, runs = counting(by)
    plain, compiled = prepared(folders[family], **method), prepared(folders[family], **method)
    if checkpointed:
        checkpoint_blocks(compiled.model)
    names = [*compiled.model.state_dict()]
    assert compile_frozen_blocks(compiled.model, backend=backend)
    assert [*compiled.model.state_dict()] == names
    batch, singles = small_models.batch_and_singles(compiled)
    with closing(PrivacyEngine()) as engine:
        private(engine, compiled.model)
        engine.self_check(compiled.loss_per_example, batch, singles=singles)
    detach(compiled.model)
    before = len(runs)
    found = sums(compiled.model, compiled.loss_per_example, [batch, singles[0]], strategy)
    assert distance(found, sums(plain.model, plain.loss_per_example, [batch, singles[0]], strategy)) < 1e-5
    assert len(runs) > before
    assert graphs
    assert compiled.transcribe(batch) == plain.transcribe(batch)


def test_checkpoints_within_a_compiled_block_are_taken_off(folders: dict[str, Path]) -> None:
    model: Any = prepared(folders["whisper"], kind="lora", layers="decoder").model
    checkpoint_blocks(model)
    compile_frozen_blocks(model, backend="eager")
    on = {name for name, m in model.named_modules() if getattr(m, "gradient_checkpointing", False)}
    assert on
    assert all(".decoder" in name for name in on)


@pytest.mark.slow
def test_a_copy_and_a_rehearsal_are_not_compiled(folders: dict[str, Path]) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("compiled")

    recognizer = prepared(folders["parakeet"], kind="lora")
    item = small_models.items(recognizer)[0]
    with MemoryEstimator(recognizer.model) as stage:
        expected = stage.peak(losses_of(recognizer, item), 2)
    kinds = [type(module) for module in recognizer.model.modules()]
    compile_frozen_blocks(recognizer.model, backend=refuse)
    assert [type(module) for module in recognizer.model.modules()] == kinds
    with MemoryEstimator(recognizer.model) as stage:
        assert stage.peak(losses_of(recognizer, item), 2) == expected
    copied = copy.deepcopy(recognizer.model)
    recognizer.loss_per_example(copied, recognizer.collate([item]))


def test_nothing_to_compile_is_refused_by_the_key(folders: dict[str, Path]) -> None:
    recognizer = prepared(folders["parakeet"], kind="full")
    with pytest.raises(ConfigError, match=r"train.compile_frozen=true: every block .* set it to false"):
        prepare_blocks(TrainConfig(compile_frozen=True), recognizer, Reporter(False))


def test_a_machine_that_cannot_compile_is_told_the_key(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "compile_frozen_blocks", partial(compile_frozen_blocks, backend="nonsense"))
    with pytest.raises(ConfigError, match=r"train.compile_frozen=true: .*'nonsense'.* set it to false"):
        prepare_blocks(
            TrainConfig(compile_frozen=True), prepared(folders["parakeet"], kind="lora"), Reporter(False)
        )
