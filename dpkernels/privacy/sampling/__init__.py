"""Poisson sampling: the loader, the samplers, the plan of rates and steps, and how a batch is made of its examples.

This folder imports `rng` and `guards`; `step`, `accounting`, `self_check` and the engine import it.
"""
