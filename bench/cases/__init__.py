"""The measured cases: models, ops, optimizers, and the CUDA code that only measurements use.

This folder imports no other folder of `bench`; all others may import it.
"""
