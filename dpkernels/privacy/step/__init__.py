"""One private step: per-sample norms, clipping, sums, noise, the update, and recovery after out-of-memory errors.

This folder imports `rng`, `guards` and `sampling`; `self_check` and the engine import it.
"""
