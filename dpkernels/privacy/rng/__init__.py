"""Randomness: the secret ChaCha20 streams of noise and sampling, and control over the model's own draws in a check.

This folder imports nothing of `dpkernels.privacy`; every other folder there may import it.
"""
