"""`train.checkpointing`: the same training, with less memory. The clipped sums of whole models are in
`test_strategies.py`, what is alive in `test_memory_plan.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from asr_finetune.config.schema import Config, ConfigError, TrainConfig
from asr_finetune.console import Reporter
from asr_finetune.models.loading import Recognizer
from asr_finetune.planning.dry_run import check_run
from asr_finetune.training.run import train
from asr_finetune.training.setup import prepare_blocks
from dpkernels.blocks import checkpoint_blocks, has_checkpointing
from tests.asr_finetune import small_models, tones
from tests.asr_finetune.training.test_strategies import STRATEGIES, prepared, summed
from tests.slow import covering


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with tones.one_thread():
        yield


def with_dropout(recognizer: Recognizer) -> Recognizer:
    for module in recognizer.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
        for name in ("dropout", "activation_dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.3)
    return recognizer


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("family", "strategy"), covering(["parakeet", "whisper"], STRATEGIES, together=1))
def test_the_masks_of_dropout_are_those_of_the_forward(
    folders: dict[str, Path], family: str, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpkernels.privacy.engine.SecretSeeds", lambda: torch.manual_seed(7) and None)
    plain = summed(with_dropout(prepared(folders[family], "lora")), strategy, checkpointed=False)
    again = summed(with_dropout(prepared(folders[family], "lora")), strategy, checkpointed=True)
    still = summed(prepared(folders[family], "lora"), strategy, checkpointed=False)
    assert any(not torch.allclose(plain[name], still[name], rtol=1e-2) for name in plain)
    for name, value in plain.items():
        assert torch.equal(again[name], value), name


@pytest.mark.thinned(4)
@pytest.mark.parametrize("family", sorted(small_models.FAMILIES))
def test_blocks_are_recomputed_in_training_only(folders: dict[str, Path], family: str) -> None:
    recognizer = prepared(folders[family], "lora")
    items = small_models.items(recognizer, small_models.SAMPLES[:1])
    batch = recognizer.collate(items)
    before = recognizer.transcribe(batch)
    checkpoint_blocks(recognizer.model)
    calls: Counter[str] = Counter()
    for name, module in recognizer.model.named_modules():
        if name.endswith(("self_attn", "attention")):
            module.register_forward_pre_hook(lambda _module, _arguments, name=name: calls.update([name]))
    recognizer.loss_per_example(recognizer.model.train(), batch).sum().backward()
    assert set(calls.values()) == {2}
    calls.clear()
    recognizer.loss_per_example(recognizer.model.eval(), batch).sum().backward()
    assert set(calls.values()) == {1}
    recognizer.model.train()
    assert recognizer.transcribe(batch) == before


def test_a_model_without_blocks_is_refused_by_the_key(folders: dict[str, Path]) -> None:
    recognizer = prepared(folders["parakeet"], "lora")
    recognizer.base.supports_gradient_checkpointing = False
    assert not has_checkpointing(recognizer.model)
    with pytest.raises(
        ConfigError, match=r"train.checkpointing=true: ParakeetForCTC has no .* set it to false"
    ):
        prepare_blocks(TrainConfig(checkpointing=True), recognizer, Reporter(False))
    prepare_blocks(TrainConfig(), recognizer, Reporter(False))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("checkpointing")
    tones.write_manifest(made, 16)
    tones.write_model(made / "model")
    return made


def settings(folder: Path, **changes: Any) -> Config:
    values = {"privacy__epsilon": None, "privacy__noise_multiplier": 1.0, "method__kind": "lora"}
    return Config.from_dict(tones.settings(folder, **{**values, **changes}))


@pytest.mark.slow
@pytest.mark.parametrize("private", [True, False])
def test_a_run_turns_it_on_before_the_self_check(
    folder: Path, private: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    recomputing: list[bool] = []

    def look(run: Any) -> None:
        recomputing.append(
            any(getattr(m, "gradient_checkpointing", False) for m in run.recognizer.model.modules())
        )

    monkeypatch.setattr("asr_finetune.training.run.run_steps", look)
    for checkpointing in (False, True):
        output = str(folder / f"run-{private}-{checkpointing}")
        train(
            settings(folder, train__checkpointing=checkpointing, privacy__enabled=private, output=output),
            progress=False,
        )
    assert recomputing == [False, True]


@pytest.mark.slow
def test_a_dry_run_predicts_with_it(folder: Path) -> None:
    found: dict[bool, str] = {}
    for checkpointing in (False, True):
        config = settings(folder, train__checkpointing=checkpointing, output=str(folder / "dry"))
        checks = check_run(config, progress=False)
        assert all(check.passed for check in checks), checks
        found[checkpointing] = next(check.found for check in checks if check.what == "memory")
    assert ", checkpointing" in found[True]
    assert ", checkpointing" not in found[False]
    assert found[True].replace(", checkpointing", "") != found[False]


def trained(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_a_whole_run_saves_what_it_saves_without(folder: Path) -> None:
    outputs = []
    for checkpointing in (False, True):
        output = folder / f"whole-{checkpointing}"
        train(
            settings(
                folder,
                train__checkpointing=checkpointing,
                train__steps=2,
                privacy__enabled=False,
                output=str(output),
            ),
            progress=False,
        )
        outputs.append(output)
    first, second = (trained(output) for output in outputs)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value)
    config = "adapter_config.json"
    assert (outputs[0] / "adapter" / config).read_text() == (outputs[1] / "adapter" / config).read_text()
