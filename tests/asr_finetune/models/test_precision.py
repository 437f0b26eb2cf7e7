"""Mixed precision: what is trained is float32, the rest and the products are bfloat16, and privacy is as without."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader

from asr_finetune.config.schema import MethodConfig
from asr_finetune.console import Reporter
from asr_finetune.data.corpus import Corpus
from asr_finetune.models.loading import Recognizer
from asr_finetune.models.methods import apply_method
from asr_finetune.training.dataset import SpeechDataset
from asr_finetune.training.setup import self_check
from dpkernels import PrivacyEngine, ops
from dpkernels.nn import LoRARecord, add_weighted_sums
from dpkernels.privacy import SelfCheckError
from dpkernels.privacy.self_check.probing import private_backward
from dpkernels.privacy.step.clipping import total_norm_sq
from tests.asr_finetune import small_models
from tests.slow import covering, slow_unless

KINDS = ("full", "lora", "dp_rp", "bitfit", "head")
FAMILIES = ("parakeet", "wav2vec2-bert", "wav2vec2", "whisper")
EVERY = [(family, kind) for family in FAMILIES for kind in KINDS]
# Wav2Vec2, and Wav2Vec2-BERT with LoRA, are rough: in bfloat16 torch's own gradients are half rounding.
TAME = [
    (family, kind)
    for family, kind in EVERY
    if family in ("parakeet", "whisper") or (family == "wav2vec2-bert" and kind in ("full", "bitfit", "head"))
]
COVERING = covering(FAMILIES, KINDS, together=1)
TAME_QUICK = [("parakeet", "lora"), ("parakeet", "dp_rp"), ("wav2vec2-bert", "full"), ("whisper", "bitfit")]
TAME_QUICK += [("whisper", "head")]
RECORDINGS = [(6400, " low"), (9600, " high low"), (12160, " low low high"), (8000, " high")]
HALF = torch.bfloat16


def prepared(folder: Path, kind: str, dtype: str = "bfloat16") -> Recognizer:
    recognizer = small_models.load(folder, dtype=dtype)
    small_models.same_start(lambda: apply_method(recognizer, MethodConfig(kind=kind, rank=2)))  # type: ignore[arg-type]
    for name, parameter in recognizer.model.named_parameters():
        if "lora_B" in name:  # zeros as they come: A would have no gradient
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    return recognizer


def one_by_one(recognizer: Recognizer) -> dict[str, Tensor]:
    """Σ of the utterances' gradients through torch's own layers, each alone and so without padding; float64."""
    _, singles = small_models.batch_and_singles(recognizer)
    trained = {name: p for name, p in recognizer.model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in trained.items()}
    for single in singles:
        losses = recognizer.loss_per_example(recognizer.model, single)
        for name, part in zip(
            trained, torch.autograd.grad(losses.sum(), list(trained.values())), strict=True
        ):
            total[name] += part
    return total


def privately(recognizer: Recognizer) -> dict[str, Tensor]:
    """The same from a private step on all of them together, with a bound that clips none and no noise; float64."""
    batch, _ = small_models.batch_and_singles(recognizer)
    with closing(PrivacyEngine()) as engine, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="noise_multiplier=0")
        _, optimizer, loader = made_private(engine, recognizer, noise_multiplier=0.0, max_grad_norm=1e6)
        recognizer.model.eval()
        optimizer.keep_gradients = True
        for _ in next(iter(loader)):
            optimizer.backward(recognizer.loss_per_example(recognizer.model, batch))
        optimizer.step()
    trained = {name: p for name, p in recognizer.model.named_parameters() if p.requires_grad}
    return {
        name: p.grad.double() * len(small_models.SAMPLES) for name, p in trained.items() if p.grad is not None
    }


def distance(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """‖found − exact‖ / ‖exact‖ over all parameters."""
    assert found.keys() == exact.keys()
    off = sum(float((found[name].cpu() - exact[name].cpu()).square().sum()) for name in exact)
    return math.sqrt(off / sum(float(exact[name].square().sum()) for name in exact))


def made_private(engine: PrivacyEngine, recognizer: Recognizer, **options: Any) -> Any:
    model = recognizer.model.train()
    items = small_models.items(recognizer)
    return engine.make_private(
        module=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4),
        data_loader=DataLoader(items, batch_size=len(items), collate_fn=recognizer.collate),  # type: ignore[arg-type]
        **{"noise_multiplier": 1.0, "max_grad_norm": 1.0, **options},
    )


@pytest.mark.thinned(5)
@pytest.mark.parametrize(("family", "kind"), EVERY)
def test_what_is_trained_is_float32_and_the_rest_is_half(
    folders: dict[str, Path], family: str, kind: str
) -> None:
    recognizer = prepared(folders[family], kind)
    norms = {
        f"{name}." for name, module in recognizer.model.named_modules() if isinstance(module, nn.BatchNorm1d)
    }
    for name, parameter in recognizer.model.named_parameters():
        whole = parameter.requires_grad or name.startswith(tuple(norms)) or ".lora_" in name
        assert parameter.dtype == (torch.float32 if whole else HALF), name


@pytest.mark.thinned(4)
@pytest.mark.parametrize(("family", "kind"), COVERING)
def test_each_utterances_gradient_is_what_autograd_says(
    folders: dict[str, Path], family: str, kind: str
) -> None:
    """The private sums against one-by-one gradients through torch's own layers, padding included, as `train` asks."""
    recognizer = prepared(folders[family], kind)
    batch, singles = small_models.batch_and_singles(recognizer)
    before = {name: p.data for name, p in recognizer.model.named_parameters()}
    with closing(PrivacyEngine()) as engine:
        made_private(engine, recognizer)
        with recognizer.in_float32():
            report = engine.self_check(recognizer.loss_per_example, batch, singles=singles)
    assert recognizer.dtype == HALF
    assert all(
        p.dtype == before[n].dtype and torch.equal(p, before[n])
        for n, p in recognizer.model.named_parameters()
    )
    assert {item.parameter for item in report.differences} == {
        name for name, p in recognizer.model.named_parameters() if p.requires_grad
    }


@pytest.mark.thinned(4)
@pytest.mark.parametrize(("family", "kind"), COVERING)
def test_the_private_sum_is_the_gradient_in_float32(folders: dict[str, Path], family: str, kind: str) -> None:
    exact = one_by_one(prepared(folders[family], kind, "float32"))
    assert distance(privately(prepared(folders[family], kind, "float32")), exact) < 1e-4


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("family", "kind"), slow_unless(lambda *case: case in TAME_QUICK, TAME))
def test_and_near_it_under_autocast(folders: dict[str, Path], family: str, kind: str) -> None:
    """Where these small random models are no worse than a few per cent in bfloat16; padding included."""
    exact = one_by_one(prepared(folders[family], kind, "float32"))
    assert 0 < distance(privately(prepared(folders[family], kind)), exact) < 0.12


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("family", "kind"), COVERING)
def test_no_utterance_adds_more_than_its_norm_says_under_autocast(
    folders: dict[str, Path], family: str, kind: str
) -> None:
    recognizer = prepared(folders[family], kind)
    batch, _ = small_models.batch_and_singles(recognizer)
    trained = [p for p in recognizer.model.parameters() if p.requires_grad]
    with closing(PrivacyEngine()) as engine:
        _, optimizer, _ = made_private(engine, recognizer)
        losses = recognizer.loss_per_example(recognizer.model, batch)
        records = private_backward(optimizer.tape, losses)
    norm_sq = total_norm_sq(records, len(losses), losses.device).detach()
    for clip, factors in ((None, torch.ones(len(losses))), (0.1, ops.clip_factors(norm_sq, 0.1))):
        for sample in range(len(losses)):
            sums = {p: torch.zeros_like(p, dtype=torch.float64) for p in trained}
            alone = torch.zeros_like(factors)
            alone[sample] = factors[sample]
            add_weighted_sums(records, alone, sums)
            adds = math.sqrt(sum(float(part.square().sum()) for part in sums.values()))
            assert 0 < adds <= (float(norm_sq[sample].sqrt()) if clip is None else clip)


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("family", "kind"), COVERING)
def test_what_an_utterance_adds_does_not_know_the_rest_of_its_batch_under_autocast(
    folders: dict[str, Path], family: str, kind: str
) -> None:
    recognizer = prepared(folders[family], kind)
    batch, _ = small_models.batch_and_singles(recognizer)
    with closing(PrivacyEngine()) as engine:
        made_private(engine, recognizer)
        engine.check_batch_independence(recognizer.loss_per_example, batch)


def test_the_runs_self_check_asks_in_its_own_arithmetic_too(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recognizer = prepared(folders["whisper"], "head")
    forward = type(recognizer.base.model.encoder).forward

    def mixing(self: Any, *arguments: Any, **keywords: Any) -> Any:
        found = forward(self, *arguments, **keywords)
        states = found.last_hidden_state
        if torch.is_autocast_enabled("cpu"):
            found.last_hidden_state = states + 0.1 * states.mean(0)
        return found

    corpus = Corpus([small_models.recording(size, text) for size, text in RECORDINGS])
    dataset = SpeechDataset(corpus, recognizer, cache=True)
    assert dataset[0]["encoder_states"].dtype == HALF
    lengths = [recognizer.length(utterance) for utterance in corpus.utterances]
    with closing(PrivacyEngine()) as engine:
        made_private(engine, recognizer)
        self_check(engine, recognizer, dataset, lengths, 3, Reporter(False))
        monkeypatch.setattr(type(recognizer.base.model.encoder), "forward", mixing)
        uncached = SpeechDataset(corpus, recognizer, cache=False)
        with pytest.raises(SelfCheckError, match="with other examples beside it"):
            self_check(engine, recognizer, uncached, lengths, 3, Reporter(False))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_near_those_of_float32(folders: dict[str, Path], family: str) -> None:
    recognizer, whole = prepared(folders[family], "lora"), prepared(folders[family], "lora", "float32")
    batch, _ = small_models.batch_and_singles(recognizer)
    losses = recognizer.loss_per_example(recognizer.model, batch)
    assert losses.dtype == torch.float32
    # 8 bits: a relative step of 2⁻⁸, which a few layers in a row make a few per cent.
    torch.testing.assert_close(losses, whole.loss_per_example(whole.model, batch), rtol=0.1, atol=0.1)


def test_frozen_blocks_stay_in_the_half_type(folders: dict[str, Path]) -> None:
    """Between the first product and the output layer nothing falls back to float32: it would be copied, and kept."""
    recognizer = prepared(folders["parakeet"], "lora")
    seen: dict[str, torch.dtype] = {}
    for name, module in recognizer.base.encoder.layers.named_modules():
        module.register_forward_hook(
            lambda _m, _i, output, name=name: seen.update({name: _first(output).dtype})
        )
    batch, _ = small_models.batch_and_singles(recognizer)
    recognizer.loss_per_example(recognizer.model, batch)
    adapters = {name for name in seen if ".lora_" in name}
    assert {name: dtype for name, dtype in seen.items() if dtype is not HALF and name not in adapters} == {}


def _first(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


def adapter_records(recognizer: Recognizer) -> list[LoRARecord]:
    """What a private backward of three utterances records of the adapters."""
    batch, _ = small_models.batch_and_singles(recognizer)
    with closing(PrivacyEngine()) as engine:
        _, optimizer, _ = made_private(engine, recognizer)
        records = private_backward(optimizer.tape, recognizer.loss_per_example(recognizer.model, batch))
    return [record for record in records if isinstance(record, LoRARecord)]


def test_adapters_records_are_of_one_type_so_that_one_launch_takes_them(folders: dict[str, Path]) -> None:
    adapters = adapter_records(prepared(folders["parakeet"], "lora"))
    assert len(adapters) == 2 * (4 + 4)  # blocks × (attention + two feed-forwards of two)
    assert all(record.share() is not None for record in adapters)
    assert {record.x.dtype for record in adapters} == {HALF}


def test_an_update_below_the_half_types_step_is_not_lost(folders: dict[str, Path]) -> None:
    recognizer = prepared(folders["parakeet"], "bitfit")
    trained = [p for p in recognizer.model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.fill_(1.0)
    with closing(PrivacyEngine()) as engine:
        # steps of about 1e-4: an eightieth of bfloat16's at 1
        _, optimizer, loader = made_private(engine, recognizer)
        for micro_batches in loader:
            for micro_batch in micro_batches:
                optimizer.backward(recognizer.loss_per_example(recognizer.model, micro_batch))
            optimizer.step()
            break
    moved = torch.cat([(parameter.detach() - 1).abs().flatten() for parameter in trained])
    assert 0 < float(moved.max()) < 2.0**-9
    assert float((moved > 0).float().mean()) > 0.9


@pytest.mark.parametrize("family", ["parakeet", "whisper"])
def test_a_saved_model_is_float32_and_keeps_what_was_trained(
    folders: dict[str, Path], tmp_path: Path, family: str
) -> None:
    recognizer = prepared(folders[family], "bitfit")
    with torch.no_grad():
        for parameter in recognizer.model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    recognizer.save(tmp_path)
    kind = (
        transformers.AutoModelForCTC if family == "parakeet" else transformers.WhisperForConditionalGeneration
    )
    loaded = kind.from_pretrained(tmp_path)
    saved = dict(recognizer.base.named_parameters())
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert torch.equal(parameter, saved[name].float()), name


def test_a_loaded_recogniser_computes_without_tf32(folders: dict[str, Path]) -> None:
    """By the older switches, which a process may set without forgoing the newer ones."""
    backends = torch.backends
    backends.cudnn.allow_tf32 = backends.cuda.matmul.allow_tf32 = True
    try:
        assert backends.cuda.matmul.fp32_precision == "tf32"
        small_models.load(folders["parakeet"])
        places = backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul
        assert {place.fp32_precision for place in places} == {"ieee"}
    finally:
        backends.cudnn.allow_tf32 = backends.cuda.matmul.allow_tf32 = False


_TF32 = """
import sys, torch
from asr_finetune.config.schema import ModelConfig
from asr_finetune.models.loading import load_recognizer
if sys.argv[2] == "elsewhere":  # what places that say "none" follow; a notebook may have set it
    torch.backends.fp32_precision = "tf32"
load_recognizer(ModelConfig(sys.argv[1], device="cpu"))
b = torch.backends
places = (b.cudnn.conv, b.cudnn.rnn, b.cuda.matmul, b.mkldnn.conv, b.mkldnn.matmul)
assert {place.fp32_precision for place in places} == {"ieee"}
if sys.argv[2] != "elsewhere":
    with b.cudnn.flags(enabled=False):  # as transformers' own CTC loss has it: it reads the older switch
        assert not b.cuda.matmul.allow_tf32
"""


@pytest.mark.slow
@pytest.mark.parametrize("set_before", ["nowhere", "elsewhere"])
def test_a_loaded_recogniser_computes_without_tf32_from_the_start(
    folders: dict[str, Path], set_before: str
) -> None:
    """In a process of its own: the switches are the process's."""
    command = [sys.executable, "-W", "ignore", "-c", _TF32, str(folders["parakeet"]), set_before]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[3])
