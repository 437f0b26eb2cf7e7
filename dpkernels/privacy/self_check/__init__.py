"""The self-check: whether each example's contribution to a private step is the same alone and in any batch.

This folder imports `rng`, `guards`, `sampling` and `step`; only the engine imports it.
"""
