"""Checks of the losses' graph for parts outside of the private model: batch norms and other trained tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from dpkernels.privacy.guards.preconditions import some_of

_SCALES = ("Div", "Mul")
# Operations that may follow a scaling: changes of shape and type, added terms, and sums of an example's entries.
_FOLLOWS = frozenset(
    {
        "Clone",
        "View",
        "UnsafeView",
        "Reshape",
        "ReshapeAlias",
        "ToCopy",
        "Alias",
        "AsStrided",
        "Squeeze",
        "Unsqueeze",
    }
    | {
        "Stack",
        "Cat",
        "Select",
        "Slice",
        "Unbind",
        "Transpose",
        "T",
        "Permute",
        "Expand",
        "Add",
        "Sub",
        "Sum",
        "Where",
    }
)


def check_graph(losses: Tensor, model: nn.Module, leaf_of_tape: Tensor) -> None:
    """Raise RuntimeError, by name, if the losses depend on parts outside of the private model that void the claim.

    The check visits every node, so callers run it only now and then. A graph of torch.compile is one node: its
    parameters are seen, its batch statistics are not, and the batch-independence check has to find them.

    leaf_of_tape: a scalar on which compiled layers depend.
    """
    of_model = {id(parameter) for parameter in model.parameters()} | {id(leaf_of_tape)}
    foreign, mixing = [], []
    for node in _nodes(losses):
        name = type(node).__name__  # node.name may be an attribute of a Python Function
        if name.endswith("AccumulateGrad"):
            leaf = node.variable
            if id(leaf) not in of_model and not _is_of_the_batch(leaf, len(losses)):
                foreign.append(tuple(leaf.shape))
        elif "BatchNorm" in name and getattr(node, "_saved_training", False) and _rows(node) != 1:
            mixing.append(name)
    if mixing:
        raise RuntimeError(
            f"optimizer.backward: the losses depend on batch statistics ({some_of(mixing)}), which mix the examples "
            "of a batch. If they belong to another module than the one given to make_private (a frozen head, an "
            "encoder), put that module into eval()"
        )
    if foreign:
        raise RuntimeError(
            f"optimizer.backward: the losses depend on {len(foreign)} trained parameters that are not the private "
            f"model's, or tensors that require grad (shapes {some_of(foreign)}): their gradients would be neither "
            "clipped nor noised. Freeze them (requires_grad_(False)), detach the tensors computed from them, or give "
            "make_private one module that holds all of them as nn.Parameter"
        )


def _is_of_the_batch(leaf: Tensor, examples: int) -> bool:
    """Whether a leaf may be an input that requires grad: it is no parameter and has a dimension of the batch's size.

    A trained tensor may have such a dimension, too, but hardly in every checked batch.
    """
    return not isinstance(leaf, nn.Parameter) and examples in leaf.shape


def scales_at_last(losses: Tensor) -> int:
    """The number of divisions and products at the end of the losses' graph, not counting operations in between that
    change shape or type or add terms."""
    node: Any = losses.grad_fn
    scales = 0
    while node is not None:
        operation = type(node).__name__.split("Backward")[0]
        if operation not in _FOLLOWS and operation not in _SCALES:
            break
        scales += operation in _SCALES
        node = next((following for following, _ in node.next_functions if following is not None), None)
    return scales


def _nodes(losses: Tensor) -> Iterator[Any]:
    stack: list[Any] = [losses.grad_fn]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node is None:
            continue
        yield node
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                stack.append(following)


def _rows(node: Any) -> int:
    """First dimension of a batch norm's output. A batch norm of one row mixes no rows: torch's instance norm is a
    batch norm of one row, with the examples' channels as its channels."""
    return int(node._input_metadata[0].shape[0])
