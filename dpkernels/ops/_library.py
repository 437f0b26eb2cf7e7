"""Registration of an op with torch.library: its schema, its fake, and a kernel that calls the registry's backend."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpkernels.backends import registry

_LIBRARY = torch.library.Library("dpkernels", "FRAGMENT")


def define(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    check: Callable[..., None] | None = None,
    arguments: Callable[..., tuple[Any, ...]] | None = None,
) -> Callable[..., Any]:
    """Register `dpkernels::name` and return the callable overload.

    Args:
        name: the op's name in the schema, the reference, the backends and the tests.
        schema: arguments and results, with mutated tensors marked.
        fake: shapes and dtypes of the results, without data.
        check: a check of *values* (lengths, ids) with the implementations' arguments, called on real tensors only.
        arguments: converts the schema's arguments to the implementations'; None if they are the same.
    """

    def kernel(*args: Any, **kwargs: Any) -> Any:
        first = args[0][0] if isinstance(args[0], list) else args[0]
        if arguments is not None:
            args = arguments(*args)
        if check is not None:
            check(*args, **kwargs)
        with torch.no_grad():
            return registry.implementation(name, first.device.type)(*args, **kwargs)

    _LIBRARY.define(f"{name}{schema}")
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dpkernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.dpkernels, name).default


def norms(like: Tensor) -> Tensor:
    """The fake result of a norm op: [B] float32."""
    return like.new_empty(like.shape[0], dtype=torch.float32)
