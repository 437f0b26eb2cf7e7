"""Every model type of speech recognisers in transformers is supported by rule, or refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.auto import modeling_auto as auto

from asr_finetune.config.schema import ConfigError, MethodConfig
from asr_finetune.models.inputs import noise, stacked_frames
from asr_finetune.models.kinds import EXCEPTIONS, KINDS
from asr_finetune.models.longform import transcribe_long
from asr_finetune.models.methods import left_out
from asr_finetune.models.recognizer import SETTINGS
from asr_finetune.models.seq2seq import Seq2SeqRecognizer
from dpkernels import ops
from dpkernels.privacy.step.clipping import total_norm_sq
from experiments.full_size import run as full_size
from tests.asr_finetune import families, small_models, tones
from tests.asr_finetune.families import EQUAL_LENGTHS_ONLY, FAMILIES, method_of
from tests.asr_finetune.models.test_methods import prepared, private_step, trained
from tests.asr_finetune.models.test_models import gradient, relative_difference

CTC = [name for name in FAMILIES if name not in (*families.SEQ2SEQ, *families.TRANSDUCERS)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with tones.one_thread():
        yield


def test_every_model_type_is_supported_and_tried_or_refused_with_a_reason() -> None:
    """A new type of a new transformers needs a line here, and in docs/recognisers.md."""
    listed = {*auto.MODEL_FOR_CTC_MAPPING_NAMES, *auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES}
    listed |= {*auto.MODEL_FOR_RNNT_MAPPING_NAMES, *auto.MODEL_FOR_TDT_MAPPING_NAMES}
    supported = {model_type for kind in KINDS for model_type in kind.model_types()}
    assert supported | EXCEPTIONS.keys() == listed
    assert not supported & EXCEPTIONS.keys()
    variants = {
        "parakeet_ctc",
        "wav2vec2",
        "wav2vec2-bert",
        "wav2vec2-conformer",
        "whisper",
    }  # small_models.py
    assert supported == (FAMILIES.keys() - {"hubert-group", "mms"}) | variants
    page = Path("docs/recognisers.md").read_text()
    assert [name for name in listed if f"`{name}`" not in page] == []


@pytest.mark.parametrize("model_type", ["dia", "voxtral", "canary", "speecht5"])
def test_an_exception_says_why_and_what_to_use(model_type: str, tmp_path: Path) -> None:
    transformers.AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    reason = EXCEPTIONS[model_type]
    with pytest.raises(ConfigError, match=f"is a {model_type} model: {reason}. Supported are ctc: .*hubert"):
        small_models.load(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_effect_of_padding_is_measured(folders: dict[str, Path], family: str) -> None:
    recognizer = small_models.load(folders[family])
    assert bool(recognizer.equal_lengths_only) == (family in EQUAL_LENGTHS_ONLY)
    assert bool(recognizer.unused_layers) == (family == "wavlm")


def automatic_class(family: str) -> str:
    if family in families.TRANSDUCERS:
        return "AutoModelForTDT" if family == "parakeet_tdt" else "AutoModelForRNNT"
    return "AutoModelForSpeechSeq2Seq" if family in families.SEQ2SEQ else "AutoModelForCTC"


@pytest.mark.thinned(9)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_private_step_loads_in_plain_transformers(
    folders: dict[str, Path], tmp_path: Path, family: str
) -> None:
    recognizer = prepared(folders[family], method_of(family))
    batch, _ = small_models.batch_and_singles(recognizer)
    with torch.no_grad():
        before = small_models.logits(recognizer, batch)
    private_step(recognizer)
    with torch.no_grad():
        expected = small_models.logits(recognizer, batch)
    assert not torch.equal(expected, before)
    recognizer.save(tmp_path)
    own = small_models.load(tmp_path)
    assert own.transcribe(batch) == recognizer.transcribe(batch)
    automatic = getattr(transformers, automatic_class(family))
    if method_of(family) == "lora":
        plain = automatic.from_pretrained(folders[family])
        own.model = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    else:
        own.model = automatic.from_pretrained(tmp_path)
    assert "Ghost" not in repr(own.model)
    torch.testing.assert_close(small_models.logits(own, batch), expected)
    assert (
        transformers.AutoProcessor.from_pretrained(tmp_path)
        .tokenizer.decode(recognizer.token_ids("low"), group_tokens=False)
        .strip()
        == "low"
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_clipped_sums_are_those_of_one_utterance_after_another(folders: dict[str, Path], family: str) -> None:
    """In float64: Σᵢ gᵢ·min(1, C/‖gᵢ‖) over all that is trained, with the middle one of three utterances clipped."""
    recognizer = prepared(folders[family], method_of(family))
    small_models.randomised(recognizer.model)
    recognizer.model.double()
    batch, singles = small_models.batch_and_singles(recognizer)
    records = full_size.private(recognizer, batch)
    norms_sq = total_norm_sq(records, len(singles), torch.device("cpu"))
    norms_sq = norms_sq.detach()
    bound = 0.9 * float(norms_sq.sqrt().median())
    factors = ops.clip_factors(norms_sq, bound)
    parameters = [p for p in recognizer.model.parameters() if p.requires_grad]
    found = {p: torch.zeros(p.shape, dtype=torch.float64) for p in parameters}
    for record in records:
        record.add_weighted_sum(factors, found)
    expected = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    for single, norm_sq in zip(singles, norms_sq.tolist(), strict=True):
        (loss,) = recognizer.loss_per_example(recognizer.model, single)
        own = gradient(recognizer, loss)
        exact = float(own.norm())
        assert exact <= norm_sq**0.5 <= 1.001 * exact
        expected += own * min(1.0, bound / exact)
    assert relative_difference(torch.cat([value.flatten() for value in found.values()]), expected) < 1e-3
    weighted = sum(
        gradient(recognizer, recognizer.loss_per_example(recognizer.model, single)[0]) * float(factor)
        for single, factor in zip(singles, factors, strict=True)
    )
    assert relative_difference(torch.cat([value.flatten() for value in found.values()]), weighted) < 1e-8


@pytest.mark.parametrize("family", ["hubert", "speech_to_text"])
def test_lengths_that_are_not_those_of_the_output_are_refused(
    folders: dict[str, Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind: Any = type(small_models.load(folders[family]).base)
    stated = kind._get_feat_extract_output_lengths
    monkeypatch.setattr(kind, "_get_feat_extract_output_lengths", lambda *args: stated(*args) - 1)
    with pytest.raises(
        ConfigError, match=rf"{kind.__name__} gives \d+ frames, and states \d+ for this length"
    ):
        small_models.load(folders[family])


def test_lora_on_layers_that_are_not_called_is_refused(folders: dict[str, Path]) -> None:
    """WavLM's attention reads the weights of its linear layers itself."""
    recognizer = prepared(folders["wavlm"], "lora")
    names = {name.partition(".lora_")[0].rpartition(".")[2] for name in trained(recognizer)}
    assert names == {"intermediate_dense", "output_dense"}
    with pytest.raises(ConfigError, match=r"method\.targets=\['q_proj'\]: wavlm.*q_proj is not called"):
        prepared(folders["wavlm"], "lora", targets=["q_proj"])


@pytest.mark.parametrize("method", ["full", "bitfit"])
def test_what_is_not_trained_is_named(folders: dict[str, Path], method: str) -> None:
    recognizer = prepared(folders["wavlm"], method)
    lines = left_out(recognizer, MethodConfig(kind=method))
    named = [line.partition(":")[0].partition(" (")[0] for line in lines]
    assert named == ["wavlm.encoder.pos_conv_embed.conv", "wavlm.encoder.layers.*.attention"]
    for name, module in recognizer.base.named_modules():
        if re.sub(r"[.]\d+[.]", ".*.", name) in named:
            assert not any(parameter.requires_grad for parameter in module.parameters()), name
    assert left_out(recognizer, MethodConfig(kind="lora")) == []


def test_what_an_output_layer_inside_the_encoder_forbids(folders: dict[str, Path]) -> None:
    folder = folders["granite_speech5_ctc"]
    with pytest.raises(
        ConfigError, match=r"model\.new_head: the encoder of GraniteSpeech5ForCTC reads its own"
    ):
        small_models.load(folder, new_head=True, vocabulary="characters")
    with pytest.raises(ConfigError, match=r"method\.kind=lora: PEFT adds no adapters to .*set it to bitfit"):
        prepared(folder, "lora")


def test_the_blank_has_a_name_of_its_own(folders: dict[str, Path]) -> None:
    """OmniASR's padding is another class than its blank."""
    recognizer: Any = small_models.load(folders["omniasr_ctc"])
    config = recognizer.base.config
    assert recognizer.blank == config.blank_token_id != config.pad_token_id
    new: Any = small_models.load(folders["omniasr_ctc"], new_head=True, vocabulary="characters")
    assert new.blank == new.base.config.blank_token_id == new.tokenizer.pad_token_id


def test_a_language_is_loaded_trained_saved_and_reported(folders: dict[str, Path], tmp_path: Path) -> None:
    base = folders["mms"]
    assert small_models.load(base).describe()["target_lang"] is None
    recognizer = prepared(base, "lora", target_lang="nld")
    assert recognizer.describe()["target_lang"] == "nld"
    assert recognizer.token_ids("é") != [recognizer.tokenizer.unk_token_id]
    weights = load_file(base / "adapter.nld.safetensors")
    state = recognizer.base.state_dict()
    assert recognizer.classes == len(weights["lm_head.weight"]) > small_models.load(base).classes
    assert all(
        torch.equal(state[f"wav2vec2.{key}" if key not in state else key], weights[key]) for key in weights
    )
    private_step(recognizer)
    recognizer.save(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / SETTINGS).read_text())["target_lang"] == "nld"
    batch, _ = small_models.batch_and_singles(recognizer)
    expected = small_models.logits(recognizer, batch)
    again = small_models.load(tmp_path / "adapter")
    torch.testing.assert_close(small_models.logits(again, batch), expected)
    merged = again.model.merge_and_unload()
    again.model = merged
    again.save(tmp_path / "merged")
    for options in ({}, {"target_lang": "nld"}):  # which the merged model holds, and has no file for
        loaded = small_models.load(tmp_path / "merged", **options)
        torch.testing.assert_close(small_models.logits(loaded, batch), expected, rtol=1e-4, atol=1e-4)
        assert loaded.token_ids("é") == recognizer.token_ids("é")
    plain = transformers.AutoModelForCTC.from_pretrained(
        base, target_lang="nld", ignore_mismatched_sizes=True
    )
    again.model = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    torch.testing.assert_close(small_models.logits(again, batch), expected)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("mms", {"target_lang": "fra"}, r"'fra': it cannot be loaded: .*Choose one of eng, nld"),
        (
            "mms",
            {"target_lang": "nld", "new_head": True, "vocabulary": "characters"},
            "has its own output layer",
        ),
        ("hubert", {"target_lang": "nld"}, "HubertForCTC has no adapter for each language"),
    ],
)
def test_languages_that_there_are_not(
    folders: dict[str, Path], family: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        small_models.load(folders[family], **options)


@pytest.mark.parametrize("family", families.SEQ2SEQ)
def test_a_decoder_reads_its_prompt_and_the_shifted_labels(folders: dict[str, Path], family: str) -> None:
    """As the model itself makes them of labels."""
    recognizer = small_models.load(folders[family])
    assert isinstance(recognizer, Seq2SeqRecognizer)
    labels = torch.stack([recognizer.encode_text("low"), recognizer.encode_text("hig")])
    seen: list[Tensor] = []
    recognizer.base.get_decoder().register_forward_pre_hook(
        lambda module, args, inputs: seen.append(inputs["input_ids"]), with_kwargs=True
    )
    item = recognizer.encode_audio(small_models.waves()[0])
    arguments = recognizer._arguments(recognizer.model, recognizer.collate([item, item]))
    with torch.no_grad():
        recognizer.base(**arguments, labels=labels)
    decoder, learnt = recognizer._teacher_forcing(labels)
    assert torch.equal(decoder, seen[0])
    assert torch.equal(learnt, labels)


@pytest.mark.parametrize("family", families.SEQ2SEQ)
def test_decoding_ends_with_the_text(folders: dict[str, Path], family: str) -> None:
    """A decoder that always says the same tokens and the end writes them, without its prompt."""
    recognizer = small_models.load(folders[family])
    assert isinstance(recognizer, Seq2SeqRecognizer)
    said = recognizer.encode_text("low").tolist()
    head = recognizer.base.get_output_embeddings()
    steps = iter(said)

    def say(module: Any, args: Any, logits: Tensor) -> Tensor:
        spoken = torch.full_like(logits, -1.0)
        spoken[..., next(steps)] = 1.0
        return spoken

    head.register_forward_hook(say)
    item = recognizer.encode_audio(small_models.waves()[0])
    assert recognizer.transcribe(recognizer.collate([item])) == ["low"]
    assert next(steps, None) is None


@pytest.mark.parametrize("seconds", [41.0, 40.01])
def test_a_long_recording_is_read_in_windows(folders: dict[str, Path], seconds: float) -> None:
    """What is left behind the last window is too short for a frame, or a segment of its own."""
    recognizer = small_models.load(folders["speech_to_text"])
    read: list[float] = []

    def hear(batch: dict[str, Any]) -> list[str]:
        read.append(len(batch["input_features"][0]))
        return [f"heard {len(read)}"]

    recognizer.transcribe = hear  # type: ignore[assignment, method-assign]
    done: list[float] = []
    segments = transcribe_long(recognizer, noise(round(seconds * small_models.RATE)), done.append)
    expected = [(0.0, 20.0, "heard 1"), (20.0, 40.0, "heard 2")]
    expected += [(40.0, 41.0, "heard 3")] if seconds == 41 else []
    assert [(part.start, part.end, part.text) for part in segments] == expected
    assert done == [20.0, 40.0, seconds]


@pytest.mark.parametrize("name", ["decoder_start_token_id", "eos_token_id"])
def test_a_decoder_without_a_start_or_an_end_is_refused(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    base: Any = small_models.load(folders["speech-encoder-decoder"])
    for config in (base.base.config, base.base.config.decoder, base.base.generation_config):
        setattr(config, name, None)
    base.save(tmp_path)
    with pytest.raises(ConfigError, match=rf"does not set {name}, without which no text begins or ends"):
        small_models.load(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"new_head": True, "vocabulary": "characters"}, "are for CTC models"),
        ({"window_seconds": 1.0}, r"model\.window_seconds=1 is for Whisper; a moonshine model"),
        ({"language": "de"}, r"model\.language=de, model\.task=None: they are for Whisper"),
        ({"target_lang": "nld"}, r"model\.target_lang='nld' is for CTC models with an adapter"),
    ],
)
def test_options_of_other_kinds_are_refused(
    folders: dict[str, Path], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        small_models.load(folders["moonshine"], **options)


def test_the_frames_that_a_row_of_features_stacks() -> None:
    """SpecAugment masks the same bands in each of them."""
    assert stacked_frames(transformers.ParakeetFeatureExtractor()) == 1
    assert stacked_frames(transformers.SeamlessM4TFeatureExtractor(stride=2)) == 2
    granite_speech: Any = SimpleNamespace(frame_stacking=2, delta_expansion=2)
    assert stacked_frames(granite_speech) == 4
