"""A torch optimizer whose groups, state and defaults are another optimizer's."""

from typing import Any

import torch


class WrappedOptimizer(torch.optim.Optimizer):
    """Delegates to the wrapped optimizer: groups, state, defaults, and every attribute that it does not define.

    Attributes:
        original_optimizer: the wrapped optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        # Optimizer.__init__ is not called: groups and state live in the wrapped optimizer, once.
        self.original_optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's."""
        return self.original_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.original_optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The wrapped optimizer's."""
        return self.original_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.original_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's."""
        return self.original_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.original_optimizer.defaults = defaults

    def __getattr__(self, name: str) -> Any:
        if name == "original_optimizer":  # not set yet
            raise AttributeError(name)
        return getattr(self.original_optimizer, name)
