"""Text models of transformers: encoders, decoders, encoder-decoders, mixtures of experts, state spaces."""

from __future__ import annotations

from functools import partial
from typing import Any

from bench.models.entry import of_transformers
from bench.models.kinds import DECODER, ENCODER, SEQ2SEQ, VOCABULARY

TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "d_model": 16,
    "n_embd": 16,
    "embedding_size": 16,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "d_kv": 4,
    "intermediate_size": 24,
    "d_ff": 24,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "n_inner": 24,
    "ffn_dim": 24,
    "max_position_embeddings": 32,
    "n_positions": 32,
    "n_ctx": 32,
    "type_vocab_size": 2,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "decoder_start_token_id": 2,
}


encoder, decoder, seq2seq = (partial(of_transformers, TINY, kind) for kind in (ENCODER, DECODER, SEQ2SEQ))

ENTRIES = [
    encoder("BERT", "BertForMaskedLM"),
    encoder("BERT, one label a token", "BertForTokenClassification", num_labels=3),
    encoder("RoBERTa", "RobertaForMaskedLM"),
    encoder("ALBERT", "AlbertForMaskedLM"),
    encoder("DistilBERT", "DistilBertForMaskedLM", dim=16, hidden_dim=24, n_heads=4, n_layers=2),
    encoder("ELECTRA", "ElectraForMaskedLM"),
    encoder("DeBERTa", "DebertaForMaskedLM"),
    encoder("DeBERTa v3", "DebertaV2ForMaskedLM", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    encoder("MPNet", "MPNetForMaskedLM"),
    encoder("ModernBERT", "ModernBertForMaskedLM"),
    decoder("GPT-2", "GPT2LMHeadModel"),
    decoder("GPT-Neo", "GPTNeoForCausalLM", attention_types=[[["global", "local"], 1]]),
    decoder("GPT-NeoX, Pythia", "GPTNeoXForCausalLM"),
    decoder("GPT-J", "GPTJForCausalLM", rotary_dim=4),
    decoder("OPT", "OPTForCausalLM", word_embed_proj_dim=16),
    decoder("BLOOM", "BloomForCausalLM"),
    decoder("Falcon", "FalconForCausalLM"),
    decoder("Llama", "LlamaForCausalLM"),
    decoder("Mistral", "MistralForCausalLM"),
    decoder("Qwen 2", "Qwen2ForCausalLM"),
    decoder("Qwen 3", "Qwen3ForCausalLM"),
    decoder("Gemma", "GemmaForCausalLM"),
    decoder("Gemma 2", "Gemma2ForCausalLM"),
    decoder("Phi", "PhiForCausalLM"),
    decoder("Mixtral", "MixtralForCausalLM", num_local_experts=4),
    decoder("Mamba", "MambaForCausalLM", targets=("in_proj", "x_proj"), state_size=4),
    decoder("RWKV", "RwkvForCausalLM", attention_hidden_size=16),
    seq2seq("T5", "T5ForConditionalGeneration"),
    seq2seq("BART", "BartForConditionalGeneration"),
    seq2seq("Marian", "MarianMTModel"),
]
