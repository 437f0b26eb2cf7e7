"""The self-check: whether a private step adds what each example alone would add, whatever is beside it in the batch.

This folder imports `rng`, `guards`, `sampling` and `step`; only the engine imports it.
"""
