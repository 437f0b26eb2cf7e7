"""Small CTC recognisers and transducers with fresh weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import transformers
from torch import nn

from asr_finetune.config.values import ConfigError
from asr_finetune.models.alphabets import ctc_tokenizer
from asr_finetune.models.ctc import CTCRecognizer
from asr_finetune.models.transducer import DECODER_PARTS, TransducerRecognizer


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
    tokenizer = _tokenizer(vocabulary, unit)
    config = transformers.ParakeetCTCConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        encoder_config=_encoder(hidden, layers, heads, channels, mels, encoder),
    )
    model = _fresh(transformers.ParakeetForCTC, config, seed)
    return CTCRecognizer(model, _processor(mels, tokenizer), name="tiny-parakeet")


def tiny_transducer(
    vocabulary: Sequence[str],
    *,
    unit: Literal["words", "characters"] | None = None,
    durations: Sequence[int] = (0, 1, 2, 3, 4),
    hidden: int = 128,
    layers: int = 4,
    heads: int = 4,
    channels: int = 64,
    mels: int = 80,
    decoder: int | None = None,
    decoder_layers: int = 1,
    seed: int = 0,
    **encoder: Any,
) -> TransducerRecognizer:
    """A small ParakeetForTDT, or ParakeetForRNNT without durations, with fresh weights.

    Args:
        vocabulary, unit, hidden, layers, heads, channels, mels, seed, encoder: as `tiny_parakeet`'s.
        durations: of the TDT, in frames; empty for an RNN-T.
        decoder: width of the prediction and joint networks; None: the encoder's.
        decoder_layers: LSTM layers of the prediction network.

    Raises:
        ConfigError: as `tiny_parakeet`.
    """
    tokenizer = _tokenizer(vocabulary, unit)
    kind = "TDT" if durations else "RNNT"
    config = getattr(transformers, f"Parakeet{kind}Config")(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        blank_token_id=tokenizer.pad_token_id,
        decoder_hidden_size=decoder or hidden,
        num_decoder_layers=decoder_layers,
        encoder_config=_encoder(hidden, layers, heads, channels, mels, encoder),
        **({"durations": list(durations)} if durations else {}),
    )
    model = _fresh(getattr(transformers, f"ParakeetFor{kind}"), config, seed)
    return TransducerRecognizer(model, _processor(mels, tokenizer), name="tiny-transducer")


def _tokenizer(vocabulary: Sequence[str], unit: Literal["words", "characters"] | None) -> Any:
    unit = unit or ("characters" if all(len(entry) == 1 for entry in vocabulary) else "words")
    return ctc_tokenizer(vocabulary, unit)


def _encoder(
    hidden: int, layers: int, heads: int, channels: int, mels: int, more: dict[str, Any]
) -> dict[str, Any]:
    if hidden % heads:
        raise ConfigError(f"tiny_parakeet: hidden={hidden} is not a multiple of heads={heads}")
    return {
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
        **more,
    }


def _fresh(model_class: Any, config: Any, seed: int) -> nn.Module:
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = model_class(config)
        for name, module in model.named_modules():
            # transformers initialises convolutions from N(0, 0.02), since checkpoints overwrite them: in the
            # subsampling of a small new model the signal would vanish, and the model would learn nothing. So would the
            # states of a small prediction network.
            if isinstance(module, nn.Conv1d | nn.Conv2d) or (
                name.startswith(DECODER_PARTS) and hasattr(module, "reset_parameters")
            ):
                module.reset_parameters()
    return model.eval()


def _processor(mels: int, tokenizer: Any) -> Any:
    return transformers.ParakeetProcessor(transformers.ParakeetFeatureExtractor(feature_size=mels), tokenizer)
