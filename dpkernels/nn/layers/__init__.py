"""The ghost layers: each computes what its torch layer computes, and records what a per-sample norm and sum need.

A layer lives beside its records. This folder imports `batch` and `recording`; only `convert` imports it.
"""
