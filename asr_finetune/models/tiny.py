"""Small CTC recognisers with fresh weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import transformers
from torch import nn

from asr_finetune.config.values import ConfigError
from asr_finetune.models.alphabets import ctc_tokenizer
from asr_finetune.models.ctc import CTCRecognizer


def tiny_parakeet(
    vocabulary: Sequence[str],
    *,
    unit: Literal["words", "characters"] | None = None,
    hidden: int = 128,
    layers: int = 4,
    heads: int = 4,
    channels: int = 64,
    mels: int = 80,
    seed: int = 0,
    **encoder: Any,
) -> CTCRecognizer:
    """A small ParakeetForCTC with fresh weights. It runs the same code as the 608.8 M-parameter model.

    Args:
        vocabulary: words or characters; it becomes part of the model, so it must be public.
        unit: the unit of one label; None: characters if every entry is one letter, else words.
        hidden: width; the feed-forward layers are 4 times as wide.
        layers: conformer blocks.
        heads: attention heads.
        channels: channels of the subsampling convolutions.
        mels: log-mel bins.
        seed: public seed of the initialisation.
        encoder: more fields of transformers' ParakeetEncoderConfig.

    Raises:
        ConfigError: `ctc_tokenizer` refuses the vocabulary, or the heads do not divide the width.
    """
    if hidden % heads:
        raise ConfigError(f"tiny_parakeet: hidden={hidden} is not a multiple of heads={heads}")
    unit = unit or ("characters" if all(len(entry) == 1 for entry in vocabulary) else "words")
    tokenizer = ctc_tokenizer(vocabulary, unit)
    config = transformers.ParakeetCTCConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        encoder_config={
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": 4 * hidden,
            "subsampling_conv_channels": channels,
            "num_mel_bins": mels,
            "dropout": 0.0,
            "activation_dropout": 0.0,
            "attention_dropout": 0.0,
            "layerdrop": 0.0,
            **encoder,
        },
    )
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.ParakeetForCTC(config)
        for module in model.modules():
            # transformers initialises convolutions from N(0, 0.02), since checkpoints overwrite them: in the
            # subsampling of a small new model the signal would vanish, and the model would learn nothing.
            if isinstance(module, nn.Conv1d | nn.Conv2d):
                module.reset_parameters()
    extractor = transformers.ParakeetFeatureExtractor(feature_size=mels)
    processor = transformers.ParakeetProcessor(extractor, tokenizer)
    return CTCRecognizer(model.eval(), processor, name="tiny-parakeet")
