"""Small checkpoints with fresh weights of every CTC and sequence-to-sequence family of transformers, beside those of
`small_models.py`: configuration, weights and processor on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from asr_finetune.models.alphabets import ctc_tokenizer
from tests.asr_finetune.small_models import (
    LETTERS,
    RAW,
    SIZES,
    raw_processor,
    save,
)

STABLE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}


def raw(name: str, folder: Path, **options: Any) -> None:
    """A family with Wav2Vec2's processor."""
    config = getattr(transformers, f"{name}Config")(**{**RAW, **options})
    save(folder, getattr(transformers, f"{name}ForCTC"), config, raw_processor(folder))


def mms(folder: Path) -> None:
    """Wav2Vec2 with an adapter for each of two languages, whose vocabularies differ in size; its weights hold `eng`."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = {"eng": LETTERS, "nld": (*LETTERS, *"abé")}
    vocabulary = {
        name: {token: index for index, token in enumerate(those)} for name, those in letters.items()
    }
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), target_lang="eng")
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    processor = transformers.Wav2Vec2Processor(extractor, tokenizer)
    config = transformers.Wav2Vec2Config(**STABLE, **RAW, adapter_attn_dim=4)
    model: Any = save(folder, transformers.Wav2Vec2ForCTC, config, processor)
    for name, those in letters.items():
        torch.manual_seed(len(those))
        model.lm_head = nn.Linear(config.hidden_size, len(those))
        adapter = {key: torch.randn_like(value).contiguous() for key, value in model._get_adapters().items()}
        save_file(adapter, folder / f"adapter.{name}.safetensors")


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


def moonshine(folder: Path) -> None:
    sides = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    tokenizer = text_tokenizer()
    config = transformers.MoonshineConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=24,
        max_position_embeddings=64,
        **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()},
        **token_ids(tokenizer),
    )
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True)
    processor = transformers.Wav2Vec2Processor(extractor, tokenizer)
    save(folder, transformers.MoonshineForConditionalGeneration, config, processor)


def speech_to_text(folder: Path) -> None:
    """Its own tokenizer needs sentencepiece."""
    sides = {"layers": 2, "attention_heads": 2, "ffn_dim": 24, "layerdrop": 0.0}
    tokenizer = text_tokenizer()
    config = transformers.Speech2TextConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        dropout=0.0,
        input_feat_per_channel=16,
        conv_channels=8,
        max_source_positions=400,
        max_target_positions=64,
        **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()},
        **token_ids(tokenizer),
    )
    extractor = transformers.Speech2TextFeatureExtractor(feature_size=16, num_mel_bins=16)
    processor = transformers.Speech2TextProcessor(extractor, tokenizer)
    save(folder, transformers.Speech2TextForConditionalGeneration, config, processor)


def speech_encoder_decoder(folder: Path) -> None:
    """Wav2Vec2 and a BERT that decodes."""
    tokenizer = text_tokenizer()
    encoder = transformers.Wav2Vec2Config(feat_extract_norm="layer", conv_bias=True, **RAW)
    decoder = transformers.BertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **SIZES,
    )
    config = transformers.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(
        encoder, decoder, **token_ids(tokenizer)
    )
    processor = transformers.Wav2Vec2Processor(raw_processor(folder).feature_extractor, tokenizer)
    save(folder, transformers.SpeechEncoderDecoderModel, config, processor)


def text_tokenizer() -> Any:
    """Letters of texts, with tokens that begin and end them."""
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    return tokenizer


def token_ids(tokenizer: Any) -> dict[str, int]:
    """A configuration's special tokens."""
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "decoder_start_token_id": tokenizer.bos_token_id,
    }


def transducer(
    folder: Path, name: str, *, kind: str = "RNNT", encoder: dict[str, Any] | None = None, **options: Any
) -> None:
    """A transducer of a family ("Parakeet"): "RNNT" or "TDT"."""
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<blank>"]})
    own = name if name.startswith("Nemotron") else f"{name}{kind}"
    config = getattr(transformers, f"{own}Config")(
        vocab_size=len(tokenizer),
        blank_token_id=len(tokenizer) - 1,
        pad_token_id=tokenizer.pad_token_id,
        decoder_hidden_size=12,
        max_symbols_per_step=3,
        encoder_config={
            **SIZES,
            "subsampling_conv_channels": 4,
            "num_mel_bins": 16,
            **dict.fromkeys(("dropout", "activation_dropout", "attention_dropout"), 0.0),
            **(encoder or {}),
        },
        **options,
    )
    extractor = getattr(transformers, f"{STREAMING if encoder else name}FeatureExtractor")(feature_size=16)
    processor = getattr(transformers, f"{name}Processor")(extractor, tokenizer)
    save(folder, getattr(transformers, f"{name}For{kind}"), config, processor)


STREAMING = "NemotronAsrStreaming"
STREAMED = {"model_type": "nemotron_asr_streaming_encoder"}
FAMILIES: dict[str, Callable[[Path], None]] = {
    "hubert": partial(raw, "Hubert", **STABLE),
    "hubert-group": partial(raw, "Hubert"),
    "mms": mms,
    "wavlm": partial(raw, "WavLM", **STABLE),
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
    "parakeet_tdt": partial(transducer, name="Parakeet", kind="TDT", durations=[0, 1, 2]),
    "parakeet_rnnt": partial(transducer, name="Parakeet"),
    "nemotron_asr_streaming": partial(transducer, name=STREAMING, encoder=STREAMED),
    "nemotron3_5_asr": partial(
        transducer,
        name="Nemotron3_5Asr",
        encoder=STREAMED,
        num_prompts=4,
        prompt_intermediate_size=8,
        default_prompt_id=1,
    ),
    "sew-d": partial(raw, "SEWD", feat_extract_norm="layer", conv_bias=True),
    "moonshine": moonshine,
    "speech_to_text": speech_to_text,
    "speech-encoder-decoder": speech_encoder_decoder,
}
TRANSDUCERS = ("parakeet_tdt", "parakeet_rnnt", "nemotron_asr_streaming", "nemotron3_5_asr")
SEQ2SEQ = ("moonshine", "speech_to_text", "speech-encoder-decoder")
EQUAL_LENGTHS_ONLY = ("hubert-group", "data2vec-audio", "sew", "sew-d", "moonshine", "speech_to_text")


def method_of(family: str) -> str:
    """LoRA, except where PEFT has no place for it."""
    return "bitfit" if family == "granite_speech5_ctc" else "lora"
