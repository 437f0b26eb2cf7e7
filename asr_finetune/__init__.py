"""Differentially private fine-tuning of speech recognisers, on the public API of `dpkernels`."""
