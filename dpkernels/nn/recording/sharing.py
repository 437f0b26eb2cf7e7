"""Linear layers that read the same tensor (query, key and value; gate and up) share its Gram matrix.

Σ_l ‖g_lᵀ x‖² is the square of one layer with all their outputs side by side, g = [g_1 … g_k]: its Gram form
computes the T×T products of x once, T²(Σp + d) operations in place of T²(Σp + k·d), and is one launch in place
of k (measured on two cores: q, k and v of 256×256 at B = 8, T = 150 take 0.77 of the time). Its rounding bound
covers the parts' sums too: by Minkowski Σ_t ‖x_t‖‖g_t‖ ≥ √(Σ_l (Σ_t ‖x_t‖‖g_lt‖)²), what their errors can add
up to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from dpkernels.nn.recording.records import LinearRecord, Record


def sharing_inputs(records: Sequence[Record]) -> list[Record]:
    """The records to ask for norms in place of `records`: the sum of their squared norms is the same.

    Only for norms: a record that stands for several has the first one's weight. Layers are joined where the joint one
    is cheaper by Gram, which is the form that has something to share.
    """
    if len(records) < 2:
        return list(records)
    readers: dict[tuple[object, ...], list[LinearRecord]] = {}
    rest: list[Record] = []
    for record in records:
        if isinstance(record, LinearRecord):
            x, g = record.x, record.g
            same = (x.data_ptr(), x.shape, x.stride(), x.dtype, x.device, g.dtype, g.shape[:2])
            readers.setdefault(same, []).append(record)
        else:
            rest.append(record)
    for group in readers.values():
        frames, d, p = group[0].x.shape[1], group[0].x.shape[2], sum(r.g.shape[2] for r in group)
        if len(group) > 1 and frames * (p + d) < 2 * p * d:
            rest.append(replace(group[0], g=torch.cat([r.g for r in group], 2)))
        else:
            rest += group
    return rest
