"""The kinds of model: batches of examples of different lengths, and losses per example."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models.entry import Batch, Kind

VOCABULARY = 50
LENGTH = 5
"""Tokens of the longest text."""
FRAMES = 40
CHANNELS = 8
"""Of a spectrogram."""
SAMPLES = 400
"""Of a waveform."""
IMAGE = 32


def lengths(batch: int, longest: int) -> Tensor:
    """[B]: `longest`, then shorter ones, and so on."""
    return longest - (torch.arange(batch) % (LENGTH // 2 + 1)) * (longest // LENGTH)


def mask_of(batch: int, longest: int) -> Tensor:
    """[B,T] int64: 1 where an example has a token."""
    return (torch.arange(longest) < lengths(batch, longest)[:, None]).long()


def token_ids(batch: int, longest: int = LENGTH) -> Tensor:
    """[B,T] ids, none of them special; the padding is 1."""
    mask = mask_of(batch, longest)
    return torch.randint(5, VOCABULARY, mask.shape) * mask + (1 - mask)


def texts(batch: int) -> Batch:
    """input_ids and attention_mask."""
    return {"input_ids": token_ids(batch), "attention_mask": mask_of(batch, LENGTH)}


def texts_to_texts(batch: int) -> Batch:
    """The same, and decoder_input_ids of another length."""
    return {**texts(batch), "decoder_input_ids": token_ids(batch, LENGTH + 1)}


def spectrograms(batch: int) -> Batch:
    """input_features [B,T,C] and attention_mask."""
    mask = mask_of(batch, FRAMES)
    return {"input_features": torch.randn(batch, FRAMES, CHANNELS) * mask[..., None], "attention_mask": mask}


def waveforms(batch: int, samples: int = SAMPLES) -> Batch:
    """input_values [B,S] and attention_mask."""
    mask = mask_of(batch, samples)
    return {"input_values": torch.randn(batch, samples) * mask, "attention_mask": mask}


def images(batch: int) -> Batch:
    """pixel_values [B,3,H,W]."""
    return {"pixel_values": torch.randn(batch, 3, IMAGE, IMAGE)}


def square(t: Tensor) -> Tensor:
    """[B,*] -> [B], an uneven function of everything in t."""
    return t.flatten(1).square().mean(1) + t.flatten(1)[:, ::3].sum(1)


def of_valid(t: Tensor, mask: Tensor) -> Tensor:
    """[B,T,*] -> [B]: the same of the positions that are no padding."""
    return square(t * mask.reshape(*mask.shape, *(1,) * (t.dim() - 2)))


def output_of(output: Any) -> Tensor:
    """The logits, else the hidden states, of what a model returned."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state", "predicted_depth", "reconstruction"):
        if (value := getattr(output, name, None)) is not None:
            return value
    raise KeyError(f"no output to take a loss of in {type(output).__name__}: {list(output)}")


def token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the valid tokens, each with the next one's id; of hidden states, `square`."""
    out, mask = output_of(model(**batch)), batch["attention_mask"]
    if out.dim() > 2:
        out = out[:, -mask.shape[1] :]  # the places of an image's patches come first
    if out.shape[-1] < VOCABULARY:
        return of_valid(out, mask) if out.dim() > 2 else square(out)
    labels = batch.get("input_ids", batch.get("decoder_input_ids")).roll(-1, 1)
    return (F.cross_entropy(out.transpose(1, 2), labels, reduction="none") * mask).sum(1)


def decoder_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the decoder's logits."""
    out, labels = output_of(model(**batch)), batch["decoder_input_ids"].roll(-1, 1)
    return F.cross_entropy(out.transpose(1, 2), labels, reduction="none").sum(1)


def sequence_loss(model: nn.Module, batch: Batch) -> Tensor:
    """`square` of the outputs whose inputs are no padding; the output may be shorter than the input."""
    out, mask = output_of(model(**batch)), batch["attention_mask"]
    kept = (mask.sum(1) * out.shape[1]) // mask.shape[1]
    return of_valid(out, (torch.arange(out.shape[1]) < kept[:, None]).to(out.dtype))


def whole_loss(model: nn.Module, batch: Batch) -> Tensor:
    """`square` of all of the output."""
    return square(output_of(model(**batch)))


def positional_loss(model: nn.Module, batch: Batch) -> Tensor:
    """`square` of the output of a model without keywords, such as torchvision's and timm's."""
    return square(output_of(model(*batch.values())))


def speech_and_text(batch: int) -> Batch:
    """Spectrograms, and the decoder's ids."""
    return {**spectrograms(batch), "decoder_input_ids": token_ids(batch, LENGTH + 1)}


def whole_spectrograms(batch: int) -> Batch:
    """input_values [B,T,C], all of one length."""
    return {"input_values": torch.randn(batch, FRAMES, CHANNELS)}


def images_and_texts(batch: int) -> Batch:
    """Both, an image for each text."""
    return {**texts(batch), **images(batch)}


def pair_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return a contrastive model's score of each text with its image: the product of their two vectors."""
    out = model(**batch)
    return (out.text_embeds * out.image_embeds).sum(1)


def images_in_texts(batch: int) -> Batch:
    """Texts that begin with the places of an image's patches, as a LLaVA's processor makes them."""
    inputs = images_and_texts(batch)
    places = torch.full((batch, IMAGE_TOKENS), IMAGE_TOKEN)
    inputs["input_ids"] = torch.cat([places, inputs["input_ids"]], 1)
    inputs["attention_mask"] = torch.cat([torch.ones_like(places), inputs["attention_mask"]], 1)
    return inputs


IMAGE_TOKEN, IMAGE_TOKENS = 4, 4

ENCODER = Kind("text encoder", texts, token_loss, LENGTH)
DECODER = Kind("text decoder", texts, token_loss, LENGTH)
SEQ2SEQ = Kind("text to text", texts_to_texts, decoder_loss, LENGTH)
IMAGES = Kind("vision", images, whole_loss, 5)
CLASSIFIER = Kind("vision", images, positional_loss, 5)
SPECTROGRAM = Kind("speech", spectrograms, sequence_loss, CHANNELS)
WAVEFORM = Kind("speech", waveforms, sequence_loss, 4)


def whisper_speech(batch: int) -> Batch:
    """input_features [B,C,T], padded to one length, and the decoder's ids."""
    return {
        "input_features": torch.randn(batch, CHANNELS, FRAMES),
        "decoder_input_ids": token_ids(batch, LENGTH + 1),
    }


def waveforms_and_text(batch: int) -> Batch:
    """Waveforms, and the decoder's ids; Moonshine takes 384 samples a frame."""
    return {**waveforms(batch, 4 * SAMPLES), "decoder_input_ids": token_ids(batch, LENGTH + 1)}


WHISPER = Kind("speech to text", whisper_speech, whole_loss, LENGTH + 1)
WAVE_TO_TEXT = Kind("speech to text", waveforms_and_text, whole_loss, LENGTH + 1)
SPEECH_TO_TEXT = Kind("speech to text", speech_and_text, whole_loss, LENGTH + 1)
WHOLE_SPECTROGRAM = Kind("audio", whole_spectrograms, whole_loss, CHANNELS)
PAIRS = Kind("image and text", images_and_texts, pair_loss, LENGTH)
IMAGE_TEXTS = Kind("image and text", images_in_texts, token_loss, IMAGE_TOKENS + LENGTH)
CAPTIONS = Kind("image and text", images_and_texts, token_loss, LENGTH)
