"""One layer of a grouped op: the argument type of every backend."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor


class GroupedLayer(NamedTuple):
    """One layer's part of a backward: the arguments of the ops of its kind, which define the grouped ops.

    Its squared norms are `{kind}_norm_sq(*tensors, **options)`, and its weighted sums are
    `{kind}_weighted_sum(*tensors, factors, *outs, **options)`.

    Attributes:
        kind: the family of ops, a key of `dpkernels.ops.layers.KINDS`.
        tensors: the family's tensors, in the order of its ops.
        options: numbers, by the ops' keywords. A weighted sum ignores those that only the norm takes, and derives their
            values from its outs.
        outs: the tensors that the weighted sum adds to; empty for a norm.
    """

    kind: str
    tensors: tuple[Tensor, ...]
    options: Mapping[str, Any] = MappingProxyType({})
    outs: tuple[Tensor, ...] = ()

    @property
    def norm_op(self) -> str:
        """The name of the layer's norm op."""
        return f"{self.kind}_norm_sq"

    @property
    def sum_op(self) -> str:
        """The name of the layer's weighted-sum op."""
        return f"{self.kind}_weighted_sum"

    @property
    def device_type(self) -> str:
        """The device type of the layer's tensors."""
        return self.tensors[0].device.type
