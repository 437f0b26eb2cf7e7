"""The ghost layers: each computes the same as its torch layer, and records the tensors for its norms and sums.

A layer lives beside its records. This folder imports `batch` and `recording`; only `convert` imports it.
"""
