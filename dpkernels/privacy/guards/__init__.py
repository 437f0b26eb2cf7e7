"""What is refused before anything is released: arguments, models, buffers, parameters and graphs that break the claim.

This folder imports `rng`; the folders above it (`sampling`, `step`, `self_check`) and the engine import it.
"""
