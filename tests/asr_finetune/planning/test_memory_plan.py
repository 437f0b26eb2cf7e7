"""What a private step is predicted to take, against what the same step takes; and what a GPU's memory allows."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from asr_finetune.cli import app
from asr_finetune.config.schema import Config, MethodConfig
from asr_finetune.models.loading import tiny_parakeet
from asr_finetune.models.methods import apply_method
from asr_finetune.models.recognizer import Recognizer
from asr_finetune.planning.memory import Fit, MemoryPlan, losses_of, plan_memory, strategies
from asr_finetune.planning.tables import memory_table
from asr_finetune.planning.workload import Speech
from dpkernels import PrivacyEngine
from dpkernels.blocks import checkpoint_blocks
from dpkernels.memory import LiveMemory, Losses, MemoryEstimator, Peak, Target
from tests.asr_finetune import small_models, tones
from tests.slow import covering, slow_cases

FAMILIES = ["parakeet", "parakeet_tdt", "wav2vec2-bert", "wav2vec2", "whisper"]
SPEECH = Speech(mean=0.8, longest=1.0, labels_per_second=4.0)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with tones.one_thread():
        yield


def measured(recognizer: Recognizer, item: dict[str, torch.Tensor], size: int, strategy: str) -> int:
    """Live bytes at the peak of the second of two real micro-batches, after a step: sums and Adam's state are there."""
    model = recognizer.model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with LiveMemory() as memory:
        for tensor in (*model.parameters(), *model.buffers()):
            memory.count(tensor)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, optimizer, _ = PrivacyEngine().make_private(
                module=model,
                optimizer=torch.optim.AdamW(trained),
                data_loader=DataLoader(range(size), batch_size=size),  # type: ignore[arg-type]
                noise_multiplier=0.0,
                max_grad_norm=1.0,
                strategy=strategy,
            )
        for last in (False, True):
            memory.restart()
            batch = recognizer.collate([item] * size)
            optimizer.backward(recognizer.loss_per_example(model, batch))
            if not last:
                optimizer.step()
        return memory.peak


def prepared(folder: Path, kind: Any) -> Recognizer:
    recognizer = small_models.load(folder)
    apply_method(recognizer, MethodConfig(kind=kind, rank=2))
    return recognizer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "strategy"),
    covering(FAMILIES, ["lora", "full"], strategies(), together=1),
)
def test_live_bytes_are_predicted(folders: dict[str, Path], name: str, kind: str, strategy: str) -> None:
    recognizer = prepared(folders[name], kind)
    item = SPEECH.item(recognizer, 1.0)
    with MemoryEstimator(recognizer.model, strategy=strategy, target="cpu") as stage:
        predicted = stage.peak(losses_of(recognizer, item), 3)
    assert predicted.total == pytest.approx(measured(recognizer, item, 3, strategy), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "strategy"), [("lora", "bookkeeping"), ("full", "two_pass")])
def test_live_bytes_with_checkpointing_are_predicted(
    folders: dict[str, Path], kind: str, strategy: str
) -> None:
    recognizer = prepared(folders["parakeet"], kind)
    item = SPEECH.item(recognizer, 4.0)
    with MemoryEstimator(recognizer.model, strategy=strategy, target="cpu", checkpointing=True) as stage:
        predicted = stage.peak(losses_of(recognizer, item), 4)
    checkpoint_blocks(recognizer.model)
    assert predicted.total == pytest.approx(measured(recognizer, item, 4, strategy), rel=0.1)


@pytest.mark.slow
def test_a_rehearsal_leaves_the_model_as_it_is(folders: dict[str, Path]) -> None:
    recognizer = prepared(folders["parakeet"], "lora")
    before = {name: value.clone() for name, value in recognizer.model.state_dict().items()}
    kinds = [type(module) for module in recognizer.model.modules()]
    state = torch.get_rng_state()
    losses = losses_of(recognizer, SPEECH.item(recognizer, 1.0))
    with MemoryEstimator(recognizer.model) as stage:
        stage.peak(losses, 2)
    assert [type(module) for module in recognizer.model.modules()] == kinds
    assert all(torch.equal(before[name], value) for name, value in recognizer.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert type(torch.zeros(1)) is torch.Tensor


def parts(peak: Peak | None) -> tuple[int, int]:
    assert peak is not None
    return peak.size, peak.micro_batch


@pytest.fixture(scope="module")
def blocks() -> Recognizer:
    recognizer = tiny_parakeet(list(tones.WORDS), hidden=32, layers=1, heads=2, channels=8)
    apply_method(recognizer, MethodConfig(kind="lora", rank=2))
    return recognizer


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda", *slow_cases("cpu")])
def test_checkpointing_holds_less(target: Target) -> None:
    blocks = tiny_parakeet(list(tones.WORDS), hidden=32, layers=3, heads=2, channels=8)
    apply_method(blocks, MethodConfig(kind="lora", rank=2))
    losses = losses_of(blocks, SPEECH.item(blocks, 4.0))
    peaks = []
    for checkpointing in (False, True):
        with MemoryEstimator(
            blocks.model, strategy="mixed", target=target, checkpointing=checkpointing
        ) as stage:
            peaks.append(stage.peak(losses, 4))
    assert peaks[1].micro_batch < 0.8 * peaks[0].micro_batch
    assert (peaks[0].workspace > 0) == (target == "cuda")


@pytest.mark.slow  # quick, on a small network: tests/memory/test_estimator.py
def test_the_largest_micro_batch_is_the_largest(blocks: Recognizer) -> None:
    losses = losses_of(blocks, SPEECH.item(blocks, 1.0))
    with MemoryEstimator(blocks.model, target="cpu") as stage:
        for size in (1, 11):
            limit = stage.peak(losses, size).total
            found = stage.largest(losses, limit, 100)
            assert found is not None
            assert (found.size, found.total) == (size, limit)
            assert stage.peak(losses, size + 1).total > limit
            smaller = stage.largest(losses, limit - 1, 100)
            assert (0 if smaller is None else smaller.size) == size - 1
        assert stage.largest(losses, 10**12, 7).size == 7  # type: ignore[union-attr]


class Proportional:
    """A `MemoryEstimator` that takes no time: what a forward saves of one utterance, times the utterances."""

    def __init__(self, model: nn.Module, *, strategy: str, checkpointing: bool = False, **_: Any) -> None:
        self._model, self._share = model, 1.0 - 0.15 * strategies().index(strategy) - 0.3 * checkpointing

    def __enter__(self) -> Proportional:
        return self

    def __exit__(self, *_: object) -> None: ...

    def peak(self, losses: Losses, size: int) -> Peak:
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(torch, "empty", torch.ones)  # labels are computed with here
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                losses(self._model, 1)
        return Peak(size, 10_000, 0, 0, round(size * self._share * sum(saved.values())), 0)

    def largest(self, losses: Losses, limit: float, most: int) -> Peak | None:
        one = self.peak(losses, 1)
        size = min(most, int((limit - one.weights) // one.micro_batch))
        return self.peak(losses, size) if size > 0 else None


def by(estimator: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asr_finetune.planning.memory.MemoryEstimator", estimator)


estimators = pytest.mark.parametrize("estimator", [Proportional, *slow_cases(MemoryEstimator)])


def a_plan(blocks: Recognizer, folder: Path, memory: int, **options: Any) -> MemoryPlan:
    config = Config.from_dict(tones.settings(folder, train__batch_size=50))
    return plan_memory(config, blocks, memory, seconds=2.0, target="cpu", **options)


@estimators
def test_the_fastest_strategy_with_enough_is_chosen(
    blocks: Recognizer, tmp_path: Path, estimator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    by(estimator, monkeypatch)
    losses = losses_of(blocks, SPEECH.item(blocks, 2.0))
    with estimator(blocks.model, strategy="bookkeeping", target="cpu") as stage:
        eight = stage.peak(losses, 8).total
    roomy = a_plan(blocks, tmp_path, round(eight / 0.9) + 1)
    assert [fit.strategy for fit in roomy.fits] == strategies()
    assert roomy.chosen is roomy.fits[0]
    assert roomy.chosen.size == 8
    assert all(fit.peak.total <= 0.9 * roomy.memory for fit in roomy.fits if fit.peak is not None)
    sizes = [roomy.chosen.size, *(fit.size for fit in roomy.shorter)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 1
    assert [fit.seconds for fit in roomy.shorter] == [1.5, 1.0, 0.5]
    tight = a_plan(blocks, tmp_path, round(eight / 2))
    assert tight.chosen is not None
    assert tight.chosen.size == max(fit.size for fit in tight.fits)
    assert tight.chosen.size < 8
    nothing = a_plan(blocks, tmp_path, 1000)
    assert nothing.chosen is None
    assert memory_table(nothing).caption == "nothing fits"


def test_the_table_says_what_to_set() -> None:
    peak = Peak(size=12, weights=2**30, sums=0, optimizer=0, micro_batch=2**31, workspace=0)
    fit = Fit("mixed", True, 15.0, peak)
    table = memory_table(MemoryPlan(80 * 2**30, 0.9, [Fit("bookkeeping", True, 15.0, None), fit], fit, []))
    settings = "privacy.strategy=mixed train.physical_batch_size=12 train.checkpointing=true"
    assert settings in str(table.caption)
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["bookkeeping, checkpointing", "mixed, checkpointing"]
    assert cells[2] == ["none fits", "12"]
    assert cells[3] == ["", "3.00 GiB"]


@pytest.mark.slow
@estimators
def test_the_command_shows_it(tmp_path: Path, estimator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    by(estimator, monkeypatch)
    tones.write_model(tmp_path / "model")
    sizes = [
        "--examples",
        "1000",
        "--batch-size",
        "4",
        "--steps",
        "10",
        "--noise-multiplier",
        "1",
        "--delta",
        "1e-5",
    ]
    model = ["--model", str(tmp_path / "model"), "--method", "lora", "--seconds", "1", "--gpu-memory", "8"]
    shown = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, ["plan", *sizes, *model])
    assert shown.exit_code == 0, shown.output
    assert "largest micro-batch" in shown.output
    assert "train.physical_batch_size=4 train.checkpointing=false" in shown.output
    for strategy in strategies():
        assert f"{strategy}, checkpointing" in shown.output
    assert "time per utterance" not in shown.output
