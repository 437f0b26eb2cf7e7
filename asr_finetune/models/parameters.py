"""Counts of a model's parameters."""

from __future__ import annotations

from torch import nn


def trained_parameters(model: nn.Module) -> int:
    """Number of trained values; a tensor that two modules share counts once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def total_parameters(model: nn.Module) -> int:
    """Number of values; a tensor that two modules share counts once."""
    return sum(parameter.numel() for parameter in model.parameters())
