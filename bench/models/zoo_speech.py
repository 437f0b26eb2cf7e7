"""Speech recognisers and audio encoders of transformers: CTC, encoder-decoders, transducers."""

from __future__ import annotations

from functools import partial
from typing import Any

from bench.models.entry import of_transformers
from bench.models.kinds import (
    CHANNELS,
    FRAMES,
    SPECTROGRAM,
    SPEECH_TO_TEXT,
    VOCABULARY,
    WAVE_TO_TEXT,
    WAVEFORM,
    WHISPER,
    WHOLE_SPECTROGRAM,
)
from bench.models.zoo_text import TINY as TEXT

TINY: dict[str, Any] = {
    **TEXT,
    "pad_token_id": 0,
    "num_mel_bins": CHANNELS,
    "input_feat_per_channel": CHANNELS,
    "conv_channels": 8,
    "feature_projection_input_dim": CHANNELS,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "conv_depthwise_kernel_size": 5,
    "conv_kernel_size": 5,
    "subsampling_conv_channels": 4,
    "subsampling_factor": 4,
    "left_max_position_embeddings": 4,
    "right_max_position_embeddings": 2,
    "max_source_positions": FRAMES,
    "max_target_positions": 32,
    "max_position_embeddings": 128,
    "speech_encoder_layers": 2,
    "speech_encoder_attention_heads": 4,
    "speech_encoder_intermediate_size": 24,
}
WAVES: dict[str, Any] = {"conv_dim": (8, 8, 8), "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2)}
STABLE: dict[str, Any] = {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}
MOONSHINE: dict[str, Any] = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}.items()
}

wave, spectrogram, to_text = (
    partial(of_transformers, TINY, kind) for kind in (WAVEFORM, SPECTROGRAM, SPEECH_TO_TEXT)
)

ENTRIES = [
    wave("wav2vec 2.0", "Wav2Vec2ForCTC", **WAVES),
    wave("wav2vec 2.0, layer norms", "Wav2Vec2ForCTC", **WAVES, **STABLE),
    wave("wav2vec 2.0 classifier", "Wav2Vec2ForSequenceClassification", **WAVES),
    wave("HuBERT", "HubertForCTC", **WAVES),
    wave("HuBERT, layer norms", "HubertForCTC", **WAVES, **STABLE),
    wave("WavLM", "WavLMForCTC", **WAVES),
    wave("data2vec audio", "Data2VecAudioForCTC", **WAVES),
    wave("UniSpeech", "UniSpeechForCTC", **WAVES),
    wave("UniSpeech-SAT", "UniSpeechSatForCTC", **WAVES),
    wave("SEW", "SEWForCTC", **WAVES),
    wave("SEW-D", "SEWDForCTC", **WAVES),
    wave("wav2vec 2.0 Conformer", "Wav2Vec2ConformerForCTC", **WAVES),
    wave("MMS adapters", "Wav2Vec2ForCTC", **WAVES, **STABLE, adapter_attn_dim=4),
    spectrogram("wav2vec-BERT 2.0", "Wav2Vec2BertForCTC", vocab_size=VOCABULARY),
    spectrogram("Parakeet CTC", "ParakeetForCTC"),
    spectrogram("LASR CTC", "LasrForCTC"),
    to_text("Parakeet TDT", "ParakeetForTDT", decoder_hidden_size=16, blank_token_id=VOCABULARY - 1),
    to_text("Parakeet RNN-T", "ParakeetForRNNT", decoder_hidden_size=16, blank_token_id=VOCABULARY - 1),
    to_text("Canary", "CanaryForConditionalGeneration", encoder_config={"num_key_value_heads": 4}),
    of_transformers(
        TINY, WHISPER, "Whisper", "WhisperForConditionalGeneration", max_source_positions=FRAMES // 2
    ),
    of_transformers(TINY, WAVE_TO_TEXT, "Moonshine", "MoonshineForConditionalGeneration", **MOONSHINE),
    of_transformers(TINY, WAVE_TO_TEXT, "SpeechT5", "SpeechT5ForSpeechToText", **WAVES),
    to_text("Speech2Text", "Speech2TextForConditionalGeneration"),
    to_text("SeamlessM4T", "SeamlessM4TForSpeechToText"),
    to_text("SeamlessM4T v2", "SeamlessM4Tv2ForSpeechToText"),
    of_transformers(
        TINY,
        WHOLE_SPECTROGRAM,
        "AST",
        "ASTForAudioClassification",
        patch_size=4,
        frequency_stride=4,
        time_stride=4,
        max_length=FRAMES,
    ),
]
