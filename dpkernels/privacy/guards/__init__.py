"""Guards: they refuse models, buffers, parameters and graphs that break the claim, before anything is released.

This folder imports `rng`; the folders above it (`sampling`, `step`, `self_check`) and the engine import it.
"""
