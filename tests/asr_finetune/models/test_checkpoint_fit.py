"""Checkpoints whose weights are missing, or whose tokenizer does not fit the output layer, are refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from asr_finetune.config.schema import ConfigError, ModelConfig
from asr_finetune.models.loading import load_with_adapter
from tests.asr_finetune import small_models
from tests.asr_finetune.models.test_methods import prepared, private_step

CTC = [family for family in small_models.FAMILIES if family != "whisper"]
Weights = dict[str, torch.Tensor]
LONG = (16000, 19200, 24000)  # room for letters at 80 ms a frame


def edited(base: Path, folder: Path, edit: Callable[[Weights], Weights]) -> Path:
    """A copy of a checkpoint or adapter with other weights in its file."""
    shutil.copytree(base, folder)
    (file,) = folder.glob("*.safetensors")
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})
    return folder


def without(*endings: str) -> Callable[[Weights], Weights]:
    def edit(weights: Weights) -> Weights:
        kept = {key: value for key, value in weights.items() if not key.endswith(endings)}
        assert len(kept) < len(weights)
        return kept

    return edit


def configured(base: Path, folder: Path, **values: Any) -> Path:
    """A copy of a checkpoint with other values in its configuration."""
    shutil.copytree(base, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def is_head(key: str) -> bool:
    return key.startswith(("lm_head.", "ctc_head."))


def headless(weights: Weights) -> Weights:
    return {key: value for key, value in weights.items() if not is_head(key)}


@pytest.mark.parametrize("family", CTC)
def test_a_missing_output_layer_is_refused_with_the_fix(
    folders: dict[str, Path], family: str, tmp_path: Path
) -> None:
    folder = edited(folders[family], tmp_path / "headless", headless)
    with pytest.raises(
        ConfigError, match=r"model\.name=.*no weights for (lm|ctc)_head\.bias, .*set model\.new_head=true"
    ):
        small_models.load(folder)
    assert small_models.load(folder, new_head=True, vocabulary="own").new_head


@pytest.mark.thinned(2)
@pytest.mark.parametrize("kind", ["lora", "dp_rp"])
@pytest.mark.parametrize("vocabulary", ["own", "characters"])
def test_two_loads_of_one_adapter_are_one_model_where_the_output_layer_is_new(
    folders: dict[str, Path], vocabulary: str, kind: str, tmp_path: Path
) -> None:
    folder = edited(folders["wav2vec2-bert"], tmp_path / "headless", headless)
    recognizer = prepared(folder, kind, new_head=True, vocabulary=vocabulary)
    private_step(recognizer, LONG)
    recognizer.save(tmp_path / "adapter")
    batch, _ = small_models.batch_and_singles(recognizer)
    expected = small_models.logits(recognizer, batch)
    for seed in range(2):
        torch.manual_seed(seed)  # another start for whatever is not in the files
        loaded = small_models.load(tmp_path / "adapter")
        torch.testing.assert_close(small_models.logits(loaded, batch), expected)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("new", [{}, {"new_head": True, "vocabulary": "characters"}], ids=["keep", "new"])
@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("parakeet", "encoder.layers.1.self_attn.q_proj.weight"),
        ("parakeet", "norm.running_var"),
        ("wav2vec2-bert", "feature_projection.layer_norm.bias"),
        ("wav2vec2", "feature_extractor.conv_layers.0.conv.weight"),
        ("wav2vec2-conformer", "batch_norm.running_mean"),
    ],
)
def test_a_missing_weight_is_refused_whatever_the_head(
    folders: dict[str, Path], family: str, key: str, new: dict[str, Any], tmp_path: Path
) -> None:
    folder = edited(folders[family], tmp_path / "damaged", without(key))
    with pytest.raises(ConfigError, match=rf"no weights for .*{key}.*give a complete checkpoint"):
        small_models.load(folder, **new)


def test_missing_weights_of_whisper_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = edited(folders["whisper"], tmp_path / "damaged", without("decoder.embed_tokens.weight"))
    with pytest.raises(ConfigError, match=r"no weights for .*embed_tokens.*give a complete checkpoint"):
        small_models.load(folder)


@pytest.mark.parametrize("family", CTC)
def test_weights_of_another_shape_are_refused(folders: dict[str, Path], family: str, tmp_path: Path) -> None:
    wider = configured(folders[family], tmp_path / "wider", vocab_size=20)
    with pytest.raises(
        ConfigError,
        match=r"(lm|ctc)_head\..* has the shape \[\d+\] where its configuration wants \[20\].*new_head",
    ):
        small_models.load(wider)

    def widened(weights: Weights) -> Weights:
        key = next(key for key, value in weights.items() if value.dim() == 2 and not is_head(key))
        return weights | {key: torch.zeros(99, weights[key].shape[1])}

    other = edited(folders[family], tmp_path / "other", widened)
    for new in ({}, {"new_head": True, "vocabulary": "characters"}):
        with pytest.raises(ConfigError, match=r"has the shape \[99, .*give a complete checkpoint"):
            small_models.load(other, **new)


def test_a_token_table_of_another_shape_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = configured(folders["whisper"], tmp_path / "other", vocab_size=20)
    with pytest.raises(
        ConfigError, match=r"embed_tokens\.weight has the shape \[15, 16\].*complete checkpoint"
    ):
        small_models.load(folder)


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("family", "endings"),
    [
        ("wav2vec2-bert", ("masked_spec_embed",)),
        ("wav2vec2", ("masked_spec_embed",)),
        ("parakeet", ("num_batches_tracked",)),
        ("wav2vec2-conformer", ("num_batches_tracked", "masked_spec_embed")),
        ("whisper", ("encoder.embed_positions.weight",)),
    ],
)
def test_what_is_not_computed_with_or_is_a_constant_may_be_absent(
    folders: dict[str, Path], family: str, endings: tuple[str, ...], tmp_path: Path
) -> None:
    whole = small_models.load(folders[family])
    batch, _ = small_models.batch_and_singles(whole)
    loaded = small_models.load(edited(folders[family], tmp_path / "absent", without(*endings)))
    assert torch.equal(small_models.logits(loaded, batch), small_models.logits(whole, batch))


def test_weight_norm_under_its_old_names_is_found(folders: dict[str, Path], tmp_path: Path) -> None:
    names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}

    def renamed(weights: Weights) -> Weights:
        for new, old in names.items():
            weights = {key.replace(new, old): value for key, value in weights.items()}
        assert any(key.endswith("weight_g") for key in weights)
        return weights

    whole = small_models.load(folders["wav2vec2"])
    batch, _ = small_models.batch_and_singles(whole)
    loaded = small_models.load(edited(folders["wav2vec2"], tmp_path / "old", renamed))
    assert torch.equal(small_models.logits(loaded, batch), small_models.logits(whole, batch))


def more_letters(base: Path, folder: Path, *letters: str) -> Path:
    """A copy of a checkpoint whose tokenizer has more letters than the output layer has classes."""
    recognizer = small_models.load(base)
    shutil.copytree(base, folder)
    recognizer.tokenizer.add_tokens(list(letters))
    recognizer.processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["wav2vec2", "wav2vec2-bert", "parakeet"])
def test_a_tokenizer_with_more_tokens_than_classes_is_refused(
    folders: dict[str, Path], family: str, tmp_path: Path
) -> None:
    folder = more_letters(folders[family], tmp_path / "more", "x", "y", "z")
    classes = small_models.load(folders[family]).classes
    with pytest.raises(
        ConfigError,
        match=rf"tokens up to {classes + 2}, but its output layer has {classes} classes: none for 'x', 'y', 'z';"
        ".*new_head=true",
    ):
        small_models.load(folder)
    new = small_models.load(folder, new_head=True, vocabulary="own")
    batch, _ = small_models.batch_and_singles(new)
    assert new.classes == small_models.logits(new, batch).shape[-1] == classes + 3
    assert new.label_problem(new.encode_text("x low" if family == "parakeet" else "xlow")) is None


def test_a_whisper_tokenizer_beyond_its_table_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = more_letters(folders["whisper"], tmp_path / "more", "x")
    with pytest.raises(ConfigError, match=r"has 15 classes: none for 'x'; .*resize_token_embeddings"):
        small_models.load(folder)


def test_sentence_marks_that_no_text_holds_may_lie_beyond_the_classes(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """transformers adds them to a vocabulary that lacks them, as those of many published checkpoints do."""
    folder = tmp_path / "marks"
    shutil.copytree(folders["wav2vec2"], folder)
    recognizer = small_models.load(folder)
    recognizer.tokenizer.add_special_tokens({"bos_token": "<begin>", "eos_token": "<end>"})
    recognizer.processor.save_pretrained(folder)
    loaded = small_models.load(folder)
    assert len(loaded.tokenizer) == loaded.classes + 2
    assert int(loaded.encode_text("low <begin> high <end>").max()) < loaded.classes
    problem = loaded.text_problem(small_models.recording(16000, "low <begin>"))
    assert problem is not None
    assert problem.startswith("not in the vocabulary: '<begin>'")


@pytest.mark.parametrize("family", ["wav2vec2", "parakeet"])
@pytest.mark.parametrize("blank", [-1, 99])
def test_a_blank_outside_the_classes_is_refused(
    folders: dict[str, Path], family: str, blank: int, tmp_path: Path
) -> None:
    folder = configured(folders[family], tmp_path / "blank", pad_token_id=blank)
    with pytest.raises(ConfigError, match=rf"pad_token_id={blank} .*CTC blank, .*classes 0 to"):
        small_models.load(folder)


def test_a_blank_that_is_a_letter_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = configured(folders["wav2vec2"], tmp_path / "blank", pad_token_id=9)
    with pytest.raises(
        ConfigError, match=r"pad_token_id=9 .* its tokenizer has 'o' there and the padding '<pad>' at 0"
    ):
        small_models.load(folder)


def test_a_checkpoint_without_a_vocabulary_wants_a_new_head(folders: dict[str, Path], tmp_path: Path) -> None:
    """As a self-supervised one comes."""
    folder = configured(folders["wav2vec2-bert"], tmp_path / "pretrained", vocab_size=None)
    with pytest.raises(ConfigError, match=r"names no vocabulary.*model\.new_head=true"):
        small_models.load(folder)
    assert small_models.load(folder, new_head=True, vocabulary="characters").new_head


def test_a_new_head_of_as_many_classes_takes_nothing_of_the_old_one(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    first = small_models.load(folders["wav2vec2"], new_head=True, vocabulary="characters")
    torch.nn.init.ones_(first.base.lm_head.weight)
    first.save(tmp_path)
    second = small_models.load(tmp_path, new_head=True, vocabulary="characters")
    assert second.classes == first.classes
    assert not bool((second.base.lm_head.weight == 1).any())


@pytest.fixture(scope="module")
def adapter(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fit") / "adapter"
    prepared(folders["parakeet"], "lora").save(folder)
    return folder


def renamed(weights: Weights) -> Weights:
    return {key.replace("layers.1", "layers.7"): value for key, value in weights.items()}


def of_another_shape(weights: Weights) -> Weights:
    key = next(key for key in weights if "lora_B" in key)
    return weights | {key: torch.zeros(5, weights[key].shape[1])}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            without("layers.0.self_attn.q_proj.lora_B.weight"),
            r"its file lacks .*layers\.0\.self_attn\.q_proj\.lora_B",
        ),
        (renamed, r"lacks .* and \d+ more and has .*layers\.7.*no place for"),
        (of_another_shape, "does not fit model.name=.*PEFT says: size mismatch"),
    ],
    ids=["lacking", "renamed", "shape"],
)
def test_an_adapter_that_is_not_whole_is_refused(
    folders: dict[str, Path], adapter: Path, edit: Callable[[Weights], Weights], message: str, tmp_path: Path
) -> None:
    damaged = edited(adapter, tmp_path / "adapter", edit)
    config = ModelConfig(str(folders["parakeet"]), device="cpu")
    with pytest.raises(ConfigError, match=message):
        load_with_adapter(config, damaged)
    load_with_adapter(config, adapter)
