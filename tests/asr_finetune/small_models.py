"""Small checkpoints with fresh weights of every family, in transformers' own format, for tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from asr_finetune.config.schema import ModelConfig
from asr_finetune.data.utterance import Utterance
from asr_finetune.models.loading import (
    CTCRecognizer,
    Recognizer,
    load_recognizer,
    tiny_parakeet,
)
from asr_finetune.models.seq2seq import Seq2SeqRecognizer
from asr_finetune.models.transducer import TransducerRecognizer

RATE = 16000
WORDS = ("low", "high")
TEXTS = ("low", "high low", "low low high")
SAMPLES = (6400, 9600, 12160)
LETTERS = ("<pad>", "<s>", "</s>", "<unk>", "|", *"ghilow")
WINDOW_SECONDS = 1.0
_WHISPER_SPECIAL = ("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|transcribe|>")
_WHISPER_LAST = ("<|translate|>", "<|notimestamps|>")
NO_DROPOUT = {
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "activation_dropout": 0.0,
    "final_dropout": 0.0,
}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
RAW = {
    "vocab_size": len(LETTERS),
    "pad_token_id": 0,
    "conv_dim": (8, 8, 8),
    "conv_kernel": (40, 8, 4),
    "conv_stride": (20, 4, 4),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "feat_proj_dropout": 0.0,
    **SIZES,
    **NO_DROPOUT,
}


def parakeet(folder: Path) -> None:
    tiny_parakeet(WORDS, hidden=16, layers=2, heads=2, channels=4, mels=16).save(folder)


def wav2vec2_bert(folder: Path) -> None:
    config = transformers.Wav2Vec2BertConfig(
        vocab_size=len(LETTERS),
        pad_token_id=0,
        feature_projection_input_dim=16,
        conv_depthwise_kernel_size=5,
        left_max_position_embeddings=4,
        right_max_position_embeddings=2,
        feat_proj_dropout=0.0,
        conformer_conv_dropout=0.0,
        **SIZES,
        **NO_DROPOUT,
    )
    extractor = transformers.SeamlessM4TFeatureExtractor(feature_size=8, num_mel_bins=8, stride=2)
    processor = transformers.Wav2Vec2BertProcessor(extractor, letter_tokenizer(folder))
    save(folder, transformers.Wav2Vec2BertForCTC, config, processor)


def wav2vec2(folder: Path, *, norm: str = "layer") -> None:
    config = transformers.Wav2Vec2Config(
        feat_extract_norm=norm, do_stable_layer_norm=norm == "layer", conv_bias=norm == "layer", **RAW
    )
    save(folder, transformers.Wav2Vec2ForCTC, config, raw_processor(folder))


def wav2vec2_group(folder: Path) -> None:
    wav2vec2(folder, norm="group")


def wav2vec2_conformer(folder: Path) -> None:
    config = transformers.Wav2Vec2ConformerConfig(
        feat_extract_norm="layer",
        conv_bias=True,
        conv_depthwise_kernel_size=5,
        position_embeddings_type="relative",
        max_source_positions=200,
        conformer_conv_dropout=0.0,
        **RAW,
    )
    save(folder, transformers.Wav2Vec2ConformerForCTC, config, raw_processor(folder))


def whisper(folder: Path, *, multilingual: bool = False) -> None:
    tokenizer = _whisper_tokenizer(folder)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (*_WHISPER_SPECIAL, *_WHISPER_LAST)}
    end = ids["<|endoftext|>"]
    config = transformers.WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=8,
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_source_positions=round(50 * WINDOW_SECONDS),
        max_target_positions=24,
        decoder_start_token_id=ids["<|startoftranscript|>"],
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), end),
        dropout=0.0,
    )
    generation: dict[str, Any] = {"is_multilingual": multilingual, "begin_suppress_tokens": [end]}
    if multilingual:
        generation["lang_to_id"] = {token: ids[token] for token in ("<|en|>", "<|de|>")}
        generation["task_to_id"] = {task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")}
    extractor = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    processor = transformers.WhisperProcessor(extractor, tokenizer)
    model = save(folder, transformers.WhisperForConditionalGeneration, config, processor)
    generation["_from_model_config"] = False  # else a loader makes it anew and forgets these
    for key, value in generation.items():
        setattr(model.generation_config, key, value)
    model.save_pretrained(folder)


FAMILIES: dict[str, Callable[[Path], None]] = {
    "parakeet": parakeet,
    "wav2vec2-bert": wav2vec2_bert,
    "wav2vec2": wav2vec2,
    "wav2vec2-group": wav2vec2_group,
    "wav2vec2-conformer": wav2vec2_conformer,
    "whisper": whisper,
}
EQUAL_LENGTHS_ONLY = ("wav2vec2-group", "wav2vec2-conformer")


def load(folder: Path, **options: Any) -> Recognizer:
    return load_recognizer(ModelConfig(str(folder), device="cpu", **options))


def recording(samples: int, text: str = "low") -> Utterance:
    return Utterance("u", None, np.zeros(samples, np.float32), RATE, text, None, samples / RATE)


def waves(lengths: tuple[int, ...] = SAMPLES) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.normal(scale=0.1, size=size).astype(np.float32) for size in lengths]


def items(recognizer: Recognizer, lengths: tuple[int, ...] = SAMPLES) -> list[dict[str, Any]]:
    """An item for each length, with a transcript."""
    return [
        {
            **recognizer.encode_audio(wave),
            "labels": recognizer.encode_text(recognizer.target_prefix + text),
            "index": index,
        }
        for index, (wave, text) in enumerate(zip(waves(lengths), TEXTS, strict=False))
    ]


def batch_and_singles(recognizer: Recognizer) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Utterances of unlike lengths together (of one length where a model takes no others), and one by one."""
    lengths = SAMPLES[:1] * len(SAMPLES) if recognizer.equal_lengths_only else SAMPLES
    made = items(recognizer, lengths)
    return recognizer.collate(made), [recognizer.collate([item]) for item in made]


def logits(recognizer: Recognizer, batch: dict[str, Any]) -> torch.Tensor:
    """The model's logits [B, T, V]; a decoder's after its prompt and the batch's labels, a transducer's of all
    cells."""
    if isinstance(recognizer, CTCRecognizer):
        return recognizer.logits(recognizer.model, batch)[0].detach()
    if isinstance(recognizer, TransducerRecognizer):
        arguments = recognizer.inputs.arguments(batch, torch.float32)
        labels = recognizer._before(batch["labels"])
        return recognizer.model(**arguments, decoder_input_ids=labels).logits.detach()
    assert isinstance(recognizer, Seq2SeqRecognizer)
    decoder, _ = recognizer._teacher_forcing(batch["labels"])
    arguments = recognizer._arguments(recognizer.model, batch)
    return recognizer.model(**arguments, decoder_input_ids=decoder).logits.detach()


def randomised(model: nn.Module) -> None:
    """Weights large enough that every part of the model matters, LoRA's second factor included."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("embed_positions.weight"):
                continue
            if parameter.dim() < 2 or "bias_" in name:
                parameter.normal_(mean=float("norm" in name and name.endswith("weight")), std=0.2)
            else:
                parameter.normal_(std=(parameter.numel() / len(parameter)) ** -0.5)


def letter_tokenizer(folder: Path) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "vocab.json"
    path.write_text(json.dumps({token: index for index, token in enumerate(LETTERS)}))
    return transformers.Wav2Vec2CTCTokenizer(str(path))


def raw_processor(folder: Path) -> Any:
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    return transformers.Wav2Vec2Processor(extractor, letter_tokenizer(folder))


def _whisper_tokenizer(folder: Path) -> Any:
    """Whisper's byte-level BPE with no merges over a few letters; Ġ is the space."""
    symbols = [*"ghilow", "Ġ", "."]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = transformers.WhisperTokenizer(vocab=vocabulary, merges=[], unk_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": [*_WHISPER_SPECIAL, *_WHISPER_LAST]})
    return tokenizer


def same_start(make: Callable[[], Any]) -> Any:
    """What `make` makes, from the same random numbers each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def save(folder: Path, kind: Any, config: Any, processor: Any) -> nn.Module:
    model: Any = same_start(lambda: kind(config))
    randomised(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model
