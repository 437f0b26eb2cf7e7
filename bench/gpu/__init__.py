"""What only a GPU runs: the parts of `make gpu`, tuning, sanitizers, tensor-core experiments, compile tables.

This folder may import `harness`, `cases`, `contenders` and `reports`.
"""
