"""One private step: per-sample norms, clipping, sums, noise, the update, and recovery from a lack of memory.

This folder imports `rng`, `guards` and `sampling`; `self_check` and the engine import it.
"""
