"""One layer of a grouped op, as every backend takes it."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor


class GroupedLayer(NamedTuple):
    """One layer's part of a backward: the arguments of its kind's own ops, by which grouped ops are defined.

    Its squared norms are `{kind}_norm_sq(*tensors, **options)`, and `{kind}_weighted_sum(*tensors, factors, *outs,
    **options)` adds to its sums.

    Attributes:
        kind: the family of ops, a key of `dpkernels.ops.layers.KINDS`.
        tensors: the family's tensors, in the order of its ops.
        options: numbers, by the names of the ops' keywords. Those that only a norm takes may stand here for a sum too,
            which reads them off its outs.
        outs: what the weighted sum adds to; none for a norm.
    """

    kind: str
    tensors: tuple[Tensor, ...]
    options: Mapping[str, Any] = MappingProxyType({})
    outs: tuple[Tensor, ...] = ()

    @property
    def norm_op(self) -> str:
        """The op of its norms."""
        return f"{self.kind}_norm_sq"

    @property
    def sum_op(self) -> str:
        """The op of its weighted sum."""
        return f"{self.kind}_weighted_sum"

    @property
    def device_type(self) -> str:
        """The kind of device that its tensors are on."""
        return self.tensors[0].device.type
