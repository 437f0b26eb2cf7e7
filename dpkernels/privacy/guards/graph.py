"""What the losses' graph holds beside the private model: another module's batch norm, or other trained tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from dpkernels.privacy.guards.preconditions import some_of

_SCALES = ("Div", "Mul")
# What may follow a division without being one: other shapes, other types, terms, and sums of an example's entries.
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


def check_graph(losses: Tensor, model: nn.Module) -> None:
    """Raise RuntimeError, by name, where the losses went through what is not the private model's and voids the claim.

    Every node is looked at, so that a caller does it now and then.
    """
    own = {id(parameter) for parameter in model.parameters()}
    foreign, mixing = [], []
    for node in _nodes(losses):
        name = type(node).__name__  # node.name may be what a Function of Python keeps in its context
        if name.endswith("AccumulateGrad"):
            leaf = node.variable
            if id(leaf) not in own and not _is_of_the_batch(leaf, len(losses)):
                foreign.append(tuple(leaf.shape))
        elif "BatchNorm" in name and getattr(node, "_saved_training", False) and _rows(node) != 1:
            mixing.append(name)
    if mixing:
        raise RuntimeError(
            f"optimizer.backward: the losses went through batch statistics ({some_of(mixing)}), which mix the examples "
            "of a batch. Where it is a module beside the one given to make_private (a frozen head, an encoder), put it "
            "into eval()"
        )
    if foreign:
        raise RuntimeError(
            f"optimizer.backward: the losses depend on {len(foreign)} trained parameters that are not the private "
            f"model's, or tensors that require grad (shapes {some_of(foreign)}): their gradients would be neither "
            "clipped nor noised. Freeze them (requires_grad_(False)), detach what they make, or give make_private one "
            "module that holds all of them as nn.Parameter"
        )


def _is_of_the_batch(leaf: Tensor, examples: int) -> bool:
    """Whether a leaf may be an input that requires grad: no parameter, with a dimension of the batch's size.

    A tensor that is trained may have one, too, but hardly in every batch that is looked at.
    """
    return not isinstance(leaf, nn.Parameter) and examples in leaf.shape


def scales_at_last(losses: Tensor) -> int:
    """How many divisions and products were the last that was done to the losses, whatever changed their shape, their
    type or added to them in between."""
    node: Any = losses.grad_fn
    found = 0
    while node is not None:
        operation = type(node).__name__.split("Backward")[0]
        if operation not in _FOLLOWS and operation not in _SCALES:
            break
        found += operation in _SCALES
        node = next((following for following, _ in node.next_functions if following is not None), None)
    return found


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
    """First dimension of what a batch norm gave. Of one row it mixes nothing across rows: torch's instance norm is a
    batch norm of one row, whose channels are the examples'."""
    return int(node._input_metadata[0].shape[0])
