"""Implementations of the ops, and the registry that says which one a call uses and why."""
