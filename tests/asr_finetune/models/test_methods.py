from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch.utils.data import DataLoader

from asr_finetune.config.schema import ConfigError, MethodConfig, ModelConfig
from asr_finetune.models.loading import Recognizer, load_with_adapter
from asr_finetune.models.methods import apply_method
from asr_finetune.models.recognizer import trained_parameters
from dpkernels import PrivacyEngine
from tests.asr_finetune import small_models
from tests.slow import covering, slow_unless

ATTENTION = {
    "parakeet": ("q_proj", "k_proj", "v_proj", "o_proj", "linear1", "linear2"),
    "whisper": ("q_proj", "v_proj"),
    "wav2vec2": ("q_proj", "k_proj", "v_proj", "out_proj", "intermediate_dense", "output_dense"),
    "wav2vec2-group": ("q_proj", "k_proj", "v_proj", "out_proj", "intermediate_dense", "output_dense"),
}
CONFORMER = ("linear_q", "linear_k", "linear_v", "linear_out", "intermediate_dense", "output_dense")
HEADS = {
    "parakeet": "ctc_head.",
    "whisper": "model.decoder.embed_tokens.",
}  # Whisper's head is its token table
# Whisper's sinusoids; the embedding of masks that are off; Wav2Vec2's positions, whose weight norm has no rule.
FROZEN = ("model.encoder.embed_positions.", ".masked_spec_embed", ".pos_conv_embed.")


def frozen(name: str) -> bool:
    return any(part in name for part in FROZEN)


def is_bias(name: str) -> bool:
    """Of a linear or convolution layer: norms are named so in all the families."""
    return name.endswith(".bias") and "norm" not in name and not frozen(name)


def adapted(name: str, family: str) -> bool:
    layer = name.partition(".lora_")[0].rpartition(".")[2]
    return layer in ATTENTION.get(family, CONFORMER)


EXPECTED: dict[str, Callable[[str, str], bool]] = {
    "full": lambda name, family: not frozen(name),
    "lora": lambda name, family: ".lora_" in name and adapted(name, family),
    "dp_rp": lambda name, family: ".lora_B." in name and adapted(name, family),
    "bitfit": lambda name, family: is_bias(name),
    "head": lambda name, family: name.startswith(HEADS.get(family, "lm_head.")),
}


ADAPTERS_QUICK = [("parakeet", "lora"), ("wav2vec2-bert", "dp_rp"), ("whisper", "lora")]


def prepared(folder: Path, kind: str, **options: Any) -> Recognizer:
    names = ("new_head", "vocabulary", "window_seconds", "language", "task", "target_lang")
    loading = {key: options.pop(key) for key in names if key in options}
    recognizer = small_models.load(folder, **loading)
    small_models.same_start(lambda: apply_method(recognizer, MethodConfig(kind=kind, rank=2, **options)))
    return recognizer


def trained(recognizer: Recognizer) -> set[str]:
    return {name for name, p in recognizer.model.named_parameters() if p.requires_grad}


def private_step(recognizer: Recognizer, lengths: tuple[int, ...] = small_models.SAMPLES) -> None:
    """One step with noise on utterances of these lengths; micro-batches of one where a model needs it."""
    items = small_models.items(recognizer, lengths)
    model = recognizer.model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loader: Any = DataLoader(items, batch_size=len(items), collate_fn=recognizer.collate)  # type: ignore[arg-type]
    with closing(PrivacyEngine()) as engine:
        _, private, batches = engine.make_private(
            module=model,
            optimizer=optimizer,
            data_loader=loader,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            physical_batch_size=1 if recognizer.equal_lengths_only else len(items),
        )
        for batch in next(iter(batches)):
            private.backward(recognizer.loss_per_example(model, batch))
        private.step()
        stats = private.last_step
        assert stats is not None
        assert (stats.examples, stats.non_finite) == (len(items), 0)
    model.eval()


@pytest.mark.thinned(4)
@pytest.mark.parametrize(("family", "kind"), covering(small_models.FAMILIES, EXPECTED, together=1))
def test_exactly_these_parameters_train_and_all_take_a_private_step(
    folders: dict[str, Path], family: str, kind: str
) -> None:
    recognizer = prepared(folders[family], kind)
    names = {name.removeprefix("base_model.model.") for name in trained(recognizer)}
    everything = {name.removeprefix("base_model.model.") for name, _ in recognizer.model.named_parameters()}
    assert names == {name for name in everything if EXPECTED[kind](name, family)}
    assert names
    before = {name: p.detach().clone() for name, p in recognizer.model.named_parameters()}
    private_step(recognizer)
    for name, parameter in recognizer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind"),
    slow_unless(
        lambda *case: case in ADAPTERS_QUICK, itertools.product(small_models.FAMILIES, ["lora", "dp_rp"])
    ),
)
def test_adapters_load_in_plain_peft(
    folders: dict[str, Path], family: str, kind: str, tmp_path: Path
) -> None:
    recognizer = prepared(folders[family], kind)
    batch, _ = small_models.batch_and_singles(recognizer)
    before = small_models.logits(recognizer, batch)
    private_step(recognizer)
    recognizer.save(tmp_path)
    expected = small_models.logits(recognizer, batch)
    assert not torch.equal(expected, before)
    base = type(recognizer.base).from_pretrained(folders[family])
    plain = small_models.load(folders[family])
    plain.model = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert "Ghost" not in repr(plain.model)
    torch.testing.assert_close(small_models.logits(plain, batch), expected)
    own = small_models.load(tmp_path)
    torch.testing.assert_close(small_models.logits(own, batch), expected)


@pytest.mark.thinned(4)
@pytest.mark.parametrize(("family", "kind"), covering(["parakeet", "wav2vec2-bert"], EXPECTED, together=1))
def test_an_old_head_trains_with_any_method_where_asked(
    folders: dict[str, Path], family: str, kind: str, tmp_path: Path
) -> None:
    """After a warm start: the output layer is not new any more, and still has much to learn."""
    recognizer = prepared(folders[family], kind, train_head=True)
    old = {name for name in trained(prepared(folders[family], kind)) if "head." not in name}
    assert {name for name in trained(recognizer) if "head." not in name} == old
    heads = [p for name, p in recognizer.model.named_parameters() if "head." in name and p.requires_grad]
    assert sorted(p.dim() for p in heads) in ([1, 2], [1, 3])  # weight and bias, once each
    private_step(recognizer)
    recognizer.save(tmp_path)
    batch, _ = small_models.batch_and_singles(recognizer)
    loaded = small_models.load(tmp_path)
    torch.testing.assert_close(small_models.logits(loaded, batch), small_models.logits(recognizer, batch))


@pytest.mark.thinned(4)
@pytest.mark.parametrize(("family", "kind"), covering(["parakeet", "wav2vec2-bert"], EXPECTED, together=1))
def test_a_new_head_trains_with_any_method_and_is_saved(
    folders: dict[str, Path], family: str, kind: str, tmp_path: Path
) -> None:
    recognizer = prepared(folders[family], kind, new_head=True, vocabulary="characters")
    old = {name for name in trained(prepared(folders[family], kind)) if "head." not in name}
    new = {name for name in trained(recognizer) if "head." not in name}
    assert new == old
    heads = [p for name, p in recognizer.model.named_parameters() if "head." in name and p.requires_grad]
    assert sorted(p.dim() for p in heads) in ([1, 2], [1, 3])  # weight and bias, once each
    start = [p.detach().clone() for p in heads]
    private_step(recognizer, (16000, 19200, 24000))  # room for letters at 80 ms a frame
    assert not any(torch.equal(p, first) for p, first in zip(heads, start, strict=True))
    recognizer.save(tmp_path)
    batch, _ = small_models.batch_and_singles(recognizer)
    loaded = small_models.load(tmp_path)
    expected = small_models.logits(recognizer, batch)
    torch.testing.assert_close(small_models.logits(loaded, batch), expected)


POINTWISE = ["pointwise_conv1", "pointwise_conv2"]
ODD = ["relative_k_proj", "linear_q", "feature_projection.projection"]


@pytest.mark.parametrize(
    ("targets", "family", "kind"),
    covering(
        [(*POINTWISE,), (*POINTWISE, *ODD)], ["parakeet", "wav2vec2-bert"], ["lora", "dp_rp"], together=1
    ),
)
def test_lora_on_any_choice_of_linear_layers_and_pointwise_convolutions(
    folders: dict[str, Path], family: str, kind: str, targets: tuple[str, ...], tmp_path: Path
) -> None:
    recognizer = prepared(folders[family], kind, targets=[*targets])
    layers = {name.partition(".lora_")[0].rpartition(".")[2] for name in trained(recognizer)}
    named = [name for name, _ in recognizer.base.named_modules() if name.endswith(targets)]
    assert layers == {name.rpartition(".")[2] for name in named}
    assert ("lora_A" in "".join(trained(recognizer))) == (kind == "lora")
    before = {name: p.detach().clone() for name, p in recognizer.model.named_parameters()}
    private_step(recognizer)
    for name, parameter in recognizer.model.named_parameters():
        # B starts at 0: A's first gradient is exactly 0, and what moves it is the noise.
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    recognizer.save(tmp_path)
    batch, _ = small_models.batch_and_singles(recognizer)
    base = type(recognizer.base).from_pretrained(folders[family])
    plain = small_models.load(folders[family])
    plain.model = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(small_models.logits(plain, batch), small_models.logits(recognizer, batch))


def test_an_adapter_on_a_trimmed_whisper_loads_with_its_window(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    recognizer = prepared(folders["whisper"], "lora", window_seconds=0.8)
    with torch.no_grad():
        for name, parameter in recognizer.model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
    recognizer.target_prefix = " low "
    recognizer.save(tmp_path)
    loaded = small_models.load(tmp_path)
    assert loaded.target_prefix == " low "
    batch, _ = small_models.batch_and_singles(loaded)
    assert batch["input_features"].shape[1] == 80
    assert torch.equal(small_models.logits(loaded, batch), small_models.logits(recognizer, batch))


def test_dp_rp_trains_half_of_what_lora_does(folders: dict[str, Path]) -> None:
    """On square layers; the other factor is not at zero, or nothing could be learnt."""
    options = {"targets": ["q_proj"]}
    lora, half = (prepared(folders["parakeet"], kind, **options) for kind in ("lora", "dp_rp"))
    assert trained_parameters(lora.model) == 2 * trained_parameters(half.model) == 2 * 2 * 16 * 2
    frozen_factors = [p for name, p in half.model.named_parameters() if "lora_A" in name]
    assert len(frozen_factors) == 2
    assert all(p.abs().min() > 0 and not p.requires_grad for p in frozen_factors)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kind", ["full", "lora", "bitfit"])
@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_one_half_of_whisper(folders: dict[str, Path], kind: str, half: str) -> None:
    names = trained(prepared(folders["whisper"], kind, layers=half))
    assert names
    assert all(f"model.{half}." in name for name in names)
    both = trained(prepared(folders["whisper"], kind))
    assert names == {name for name in both if f"model.{half}." in name}


def test_the_encoder_of_a_ctc_model_is_all_but_its_head(folders: dict[str, Path]) -> None:
    names = trained(prepared(folders["wav2vec2-bert"], "full", layers="encoder"))
    everything = trained(prepared(folders["wav2vec2-bert"], "full"))
    assert everything - names == {"lm_head.weight", "lm_head.bias"}


@pytest.mark.thinned(5)
@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        (
            "parakeet",
            {"kind": "lora", "targets": ["query"]},
            r"targets=\['query'\].*there: .*linear1.*q_proj",
        ),
        ("parakeet", {"kind": "lora", "targets": ["proj"]}, "no linear layer"),
        (
            "parakeet",
            {"kind": "lora", "targets": ["q_proj", "depthwise_conv"]},
            r"layers\.0\.conv\.depthwise_conv .*groups=16.*neither a linear layer nor a pointwise.*leave it out",
        ),
        ("parakeet", {"kind": "dp_rp", "targets": ["subsampling.layers.0"]}, "neither a linear layer nor"),
        ("parakeet", {"kind": "lora", "targets": ["ctc_head"]}, "ctc_head .*neither a linear layer nor"),
        (
            "wav2vec2-bert",
            {"kind": "lora", "targets": ["lm_head"], "new_head": True, "vocabulary": "characters"},
            "lm_head is the output layer, which is trained without LoRA",
        ),
        ("parakeet", {"kind": "full", "layers": "decoder"}, "a CTC model has no decoder"),
        ("whisper", {"kind": "lora", "train_head": True}, "token table"),
        ("whisper", {"kind": "dp_rp", "targets": ["linear_q"]}, "there: .*fc1.*q_proj"),
    ],
)
def test_wrong_layers_are_named(
    folders: dict[str, Path], family: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepared(folders[family], **options)


def test_a_method_is_applied_once(folders: dict[str, Path]) -> None:
    recognizer = prepared(folders["parakeet"], "lora")
    with pytest.raises(ConfigError, match="has an adapter already"):
        apply_method(recognizer, MethodConfig(kind="lora"))


def test_an_adapter_with_a_new_head_goes_on_the_model_it_is_given(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    recognizer = prepared(folders["parakeet"], "lora", new_head=True, vocabulary="characters")
    private_step(recognizer, (16000, 19200, 24000))
    recognizer.save(tmp_path)
    loaded = load_with_adapter(ModelConfig(str(folders["parakeet"]), device="cpu"), tmp_path)
    batch, _ = small_models.batch_and_singles(recognizer)
    torch.testing.assert_close(small_models.logits(loaded, batch), small_models.logits(recognizer, batch))
    assert torch.equal(loaded.encode_text("it's 5"), recognizer.encode_text("it's 5"))


def test_an_adapter_finds_its_base_from_anywhere(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = shutil.copytree(folders["parakeet"], tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    prepared(Path("base"), "lora").save(tmp_path / "adapter")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    small_models.load(tmp_path / "adapter")
    base.rename(tmp_path / "moved")
    with pytest.raises(
        ConfigError, match=r"base model .*base', which cannot be loaded.*--model BASE --adapter"
    ):
        small_models.load(tmp_path / "adapter")
