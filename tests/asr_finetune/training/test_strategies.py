"""Every strategy on a recogniser: the clipped sums of its whole model and of adapters, with and without checkpointing
as Hugging Face does it, and training that runs out of memory."""

from __future__ import annotations

import copy
import json
import warnings
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from asr_finetune.config.schema import Config, MethodConfig
from asr_finetune.models.loading import Recognizer
from asr_finetune.models.methods import apply_method
from asr_finetune.training import loop
from asr_finetune.training.run import train
from dpkernels import PrivacyEngine, privacy
from dpkernels.blocks import checkpoint_blocks
from dpkernels.memory import MemoryEstimator
from dpkernels.nn import Tape
from dpkernels.nn.recording.row_check import _Weighted
from dpkernels.privacy import read_ledger
from tests.asr_finetune import small_models, tones
from tests.privacy.strategy_models import distance, gradients_one_by_one
from tests.slow import covering, slow_cases

STRATEGIES = ("bookkeeping", "mixed", "two_pass", "per_layer")
BOUND = 1.0


def prepared(folder: Path, kind: str) -> Recognizer:
    recognizer = small_models.load(folder)
    small_models.same_start(lambda: apply_method(recognizer, MethodConfig(kind=kind, rank=2)))
    for name, parameter in recognizer.model.named_parameters():
        if "lora_B" in name:  # zeros at first, which would hide A's gradient
            torch.manual_seed(len(name))
            nn.init.normal_(parameter, std=0.3)
    return recognizer


def clipped(recognizer: Recognizer, strategy: str) -> dict[str, Tensor]:
    """Σ_i of the one-by-one gradients, clipped: all together, or by parameter and LoRA pair, in float64."""
    made = small_models.items(recognizer)
    singles = [
        {k: v.double() if v.is_floating_point() else v for k, v in recognizer.collate([item]).items()}
        for item in made
    ]
    rows = gradients_one_by_one(recognizer.model.eval(), recognizer.loss_per_example, singles)
    names = list(rows[0])
    groups = [names]
    if strategy == "per_layer":
        groups = [[n, n.replace("lora_A", "lora_B")] for n in names if "lora_A" in n]
        groups += [[n] for n in names if "lora_" not in n]
    total = {name: torch.zeros_like(part) for name, part in rows[0].items()}
    for row in rows:
        for group in groups:
            norm = float(torch.cat([row[name].flatten() for name in group]).norm())
            bound = BOUND * (len(group) / len(names)) ** 0.5
            for name in group:
                total[name] += row[name] * min(1.0, bound / max(norm, 1e-30))
    return total


def summed(recognizer: Recognizer, strategy: str, *, checkpointed: bool) -> dict[str, Tensor]:
    """What one private step without noise sums up over the utterances, in micro-batches of two."""
    model: Any = recognizer.model
    if checkpointed:
        checkpoint_blocks(model)
    model.train()
    items: Any = small_models.items(recognizer)
    with closing(PrivacyEngine()) as engine, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="noise_multiplier=0")
        _, optimizer, loader = engine.make_private(
            module=model,
            optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0),
            data_loader=DataLoader(items, batch_size=len(items), collate_fn=recognizer.collate),
            noise_multiplier=0.0,
            max_grad_norm=BOUND,
            strategy=strategy,
            physical_batch_size=2,
        )
        optimizer.keep_gradients = True
        calls = _count_calls(model)
        for batch in next(iter(loader)):
            optimizer.backward(recognizer.loss_per_example(model, batch))
        # Of every block: eight forwards that ask for batch axes; for two micro-batches the forward, and a recomputation
        # for every backward; for the first of them, the row check's (the second has one utterance).
        backwards = 2 if strategy == "two_pass" else 1
        assert set(calls.values()) == {8 + 2 * (1 + backwards * checkpointed) + checkpointed}
        optimizer.step()
        assert optimizer.last_step.clip_rate > 0
    return {n: p.grad.double() * len(items) for n, p in model.named_parameters() if p.requires_grad}


def _count_calls(model: nn.Module) -> Counter[str]:
    """How often the attention of each of the encoder's blocks was called."""
    calls: Counter[str] = Counter()
    for name, module in model.named_modules():
        if name.endswith("self_attn") and "encoder.layers" in name:
            module.register_forward_pre_hook(lambda _module, _arguments, name=name: calls.update([name]))
    return calls


@pytest.mark.thinned(15)
@pytest.mark.parametrize(
    ("family", "strategy", "kind", "blocks"),
    covering(
        ["parakeet", "wav2vec2-bert", "whisper"], STRATEGIES, ["lora", "full"], ["plain", "checkpointed"]
    ),
)
def test_a_recognisers_clipped_sum_is_that_of_one_by_one_gradients(
    folders: dict[str, Path], family: str, strategy: str, kind: str, blocks: str
) -> None:
    recognizer = prepared(folders[family], kind)
    expected = clipped(copy.copy(recognizer), strategy)
    assert distance(summed(recognizer, strategy, checkpointed=blocks == "checkpointed"), expected) < 5e-4


# --- what is alive at the highest point, by a rehearsal with fake tensors


def rehearsed(recognizer: Recognizer, strategy: str) -> int:
    """Bytes of a micro-batch of 8 utterances of 4 s beyond weights and sums."""

    def losses(model: nn.Module, size: int) -> Tensor:
        mask = torch.ones(size, 400, dtype=torch.int64)
        return (
            model(input_features=torch.empty(size, 400, 16), attention_mask=mask).logits.square().mean((1, 2))
        )

    with MemoryEstimator(recognizer.model, strategy=strategy, target="cpu") as stage:
        return stage.peak(losses, 8).micro_batch


# Quick: test_checkpointing_holds_less of test_memory_plan.py, and what tests/privacy/step/test_strategies.py measures.
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_checkpointing_saves_memory_only_where_records_are_streamed(
    folders: dict[str, Path], kind: str
) -> None:
    recognizer = prepared(folders["parakeet"], kind)
    recognizer.model.train()
    plain = {strategy: rehearsed(recognizer, strategy) for strategy in STRATEGIES}
    checkpoint_blocks(recognizer.model)
    saved = {strategy: rehearsed(recognizer, strategy) for strategy in STRATEGIES}
    for strategy in ("two_pass", "per_layer"):
        assert saved[strategy] < 0.7 * plain[strategy]
        assert saved[strategy] < 0.75 * saved["bookkeeping"]
    if kind == "full":  # what was recomputed is kept
        assert saved["bookkeeping"] > 0.8 * plain["bookkeeping"]


# --- training that runs out of memory

STEPS = 3


def run_of(folder: Path, name: str, strategy: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    """The folder of a run with a fixed key, and what was said."""
    said: list[str] = []
    real = PrivacyEngine.__init__

    def with_key(self: PrivacyEngine, **arguments: Any) -> None:
        real(self, **{**arguments, "noise_key": bytes(range(32))})

    with monkeypatch.context() as patched, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="noise_key")
        patched.setattr(PrivacyEngine, "__init__", with_key)
        patched.setattr("asr_finetune.console.Reporter.say", lambda self, line, *a, **k: said.append(line))
        config = {
            "method__kind": "full",
            "privacy__epsilon": None,
            "privacy__noise_multiplier": 1.0,
            "privacy__strategy": strategy,
            "train__steps": STEPS,
            "train__physical_batch_size": 4,
            "output": str(folder / name),
        }
        train(Config.from_dict(tones.settings(folder, **config)))
    return folder / name, said


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["per_layer", *slow_cases("bookkeeping", "two_pass")])
def test_training_goes_on_in_halves_when_memory_is_short(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory within the backward of every micro-batch of more than two utterances: the same parameters."""
    tones.write_manifest(tmp_path, 16)
    with tones.one_thread():
        tones.write_model(tmp_path / "model")
        whole, said = run_of(tmp_path, "whole", strategy, monkeypatch)
        assert not [line for line in said if "out of memory" in line]
        original, training, raised = Tape.add, False, 0

        def back_propagate(*arguments: Any, **options: Any) -> list[Tensor]:
            nonlocal training
            training = True  # past the self-check, which tries three utterances
            return privacy.back_propagate(*arguments, **options)

        def add(tape: Tape, record: Any) -> None:
            nonlocal raised
            # A layer far from the loss: those before it are in the sums already where records are streamed.
            # The row check's own backward comes before anything is summed.
            summed = not isinstance(tape.inspector, _Weighted)
            if training and summed and record.batch_size > 2 and record.layer.endswith("self_attn.q_proj"):
                raised += 1
                raise torch.OutOfMemoryError("CUDA out of memory")
            original(tape, record)

        with monkeypatch.context() as patched:
            patched.setattr(Tape, "add", add)
            patched.setattr(loop, "back_propagate", back_propagate)
            parts, said = run_of(tmp_path, "parts", strategy, monkeypatch)
    halved = [line for line in said if "out of memory" in line]
    assert raised == len(halved) > 0
    assert all(line.startswith("NOT PRIVATE") for line in halved)
    assert all(("from the start" in line) == (strategy == "per_layer") for line in halved)
    first, second = (_trained(path) for path in (whole, parts))
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(
            second[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    for path in (whole, parts):
        (ledger,) = path.rglob("ledger*.jsonl")
        assert read_ledger(ledger).steps == STEPS
        assert sum(json.loads(line)["examples"] for line in next(path.rglob("history*.jsonl")).open()) > 0


def _trained(run: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    (weights,) = run.rglob("model.safetensors")
    return load_file(weights)
