"""Small checkpoints with fresh weights of every CTC and sequence-to-sequence family of transformers, beside those of
`small_models.py`: configuration, weights and processor on disk."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import transformers

from asr_finetune.models.alphabets import ctc_tokenizer
from tests.asr_finetune.small_models import (
    LETTERS,
    RAW,
    SIZES,
    raw_processor,
    save,
)


def raw(name: str, folder: Path, **options: Any) -> None:
    """A family with Wav2Vec2's processor."""
    config = getattr(transformers, f"{name}Config")(**{**RAW, **options})
    save(folder, getattr(transformers, f"{name}ForCTC"), config, raw_processor(folder))


def lasr(folder: Path) -> None:
    config = transformers.LasrCTCConfig(
        vocab_size=len(LETTERS),
        pad_token_id=0,
        encoder_config={
            **SIZES,
            "subsampling_conv_channels": 4,
            "num_mel_bins": 16,
            "conv_kernel_size": 4,
            "dropout": 0.0,
            "activation_dropout": 0.0,
            "attention_dropout": 0.0,
        },
    )
    extractor = transformers.LasrFeatureExtractor(feature_size=16)
    save(
        folder, transformers.LasrForCTC, config, transformers.LasrProcessor(extractor, character_tokenizer())
    )


def granite_speech5(folder: Path) -> None:
    """Its own feature extractor needs torchaudio; Wav2Vec2-BERT's makes as many features of a frame."""
    config = transformers.GraniteSpeech5CTCConfig(
        vocab_size=len(LETTERS),
        pad_token_id=0,
        encoder_config={
            **SIZES,
            "vocab_size": len(LETTERS),
            "num_mel_bins": 4,
            "context_size": 16,
            "max_position_embeddings": 16,
            "subsample_layers": [0],
        },
    )
    extractor = transformers.SeamlessM4TFeatureExtractor(feature_size=8, num_mel_bins=8, stride=2)
    processor = transformers.GraniteSpeech5Processor(extractor, character_tokenizer())
    save(folder, transformers.GraniteSpeech5ForCTC, config, processor)


def omniasr(folder: Path) -> None:
    """Its blank is another token than its padding."""
    audio = {key: value for key, value in RAW.items() if key not in ("vocab_size", "pad_token_id")}
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    config = transformers.OmniASRCTCConfig(
        vocab_size=len(LETTERS),
        blank_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        audio_config={"model_type": "omniasr_audio", **audio},
    )
    extractor = transformers.OmniASRFeatureExtractor()
    save(folder, transformers.OmniASRForCTC, config, transformers.OmniASRCTCProcessor(extractor, tokenizer))


def character_tokenizer() -> Any:
    """The letters of `LETTERS`, in their order."""
    tokenizer = ctc_tokenizer(LETTERS[4:], "characters")
    return tokenizer


FAMILIES: dict[str, Callable[[Path], None]] = {
    "hubert": partial(raw, "Hubert", feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True),
    "hubert-group": partial(raw, "Hubert"),
    "wavlm": partial(raw, "WavLM", feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True),
    "data2vec-audio": partial(raw, "Data2VecAudio", num_conv_pos_embeddings=2),
    "unispeech": partial(
        raw, "UniSpeech", feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True
    ),
    "unispeech-sat": partial(
        raw, "UniSpeechSat", feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True
    ),
    "sew": partial(raw, "SEW", feat_extract_norm="layer", conv_bias=True),
    "lasr_ctc": lasr,
    "granite_speech5_ctc": granite_speech5,
    "omniasr_ctc": omniasr,
    "sew-d": partial(raw, "SEWD", feat_extract_norm="layer", conv_bias=True),
}
