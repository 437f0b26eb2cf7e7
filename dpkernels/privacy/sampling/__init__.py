"""Poisson sampling: the loader, the samplers, the plan of rates and steps, and the rows of a batch.

This folder imports `rng` and `guards`; `step`, `accounting`, `self_check` and the engine import it.
"""
