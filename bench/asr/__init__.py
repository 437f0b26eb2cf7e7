"""Measurements of speech recognisers: recipes at full size, the largest batch, memory peaks, strategies, audio reading.

This folder imports `harness`, `cases` and `contenders`, and `asr_finetune`.
"""
