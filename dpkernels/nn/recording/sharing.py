"""Linear layers that read the same tensor (query, key and value; gate and up) share its Gram matrix.
Σ_l ‖g_lᵀ x‖² is the squared norm of one layer with all their outputs side by side, g = [g_1 … g_k]. Its Gram form
computes the T×T products of x once: T²(Σp + d) operations instead of T²(Σp + k·d), and one launch instead
of k (measured on two cores: q, k and v of 256×256 at B = 8, T = 150 take 0.77 of the time). Its rounding bound
also covers the sums of the parts: by Minkowski Σ_t ‖x_t‖‖g_t‖ ≥ √(Σ_l (Σ_t ‖x_t‖‖g_lt‖)²), the largest total of
their errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from dpkernels.nn.recording.records import LinearRecord, Record


def sharing_inputs(records: Sequence[Record]) -> list[Record]:
    """The records to compute norms from in place of `records`: the sum of their squared norms is the same.

    Use them for norms only: a joint record has the weight of its first layer. Layers are joined whatever the length is,
    also where only the Gram form of shorter examples has a shared part: if the padded length decided, an example that
    lengthens its batch would change the form of the others' norms (Gram of the joint layer, direct of its parts). For
    the same reason no layer is joined of which examples may be materialised: those that are kept then have copies of x,
    and would be joined only in batches where no example is materialised.
    """
    if len(records) < 2:
        return list(records)
    readers: dict[tuple[object, ...], list[LinearRecord]] = {}
    rest: list[Record] = []
    for record in records:
        if isinstance(record, LinearRecord) and record.may_share_input:
            x, g = record.x, record.g
            same = (x.data_ptr(), x.shape, x.stride(), x.dtype, x.device, g.dtype, g.shape[:2])
            readers.setdefault(same, []).append(record)
        else:
            rest.append(record)
    for group in readers.values():
        joint = replace(group[0], g=torch.cat([r.g for r in group], 2)) if len(group) > 1 else group[0]
        rest.append(joint)
    return rest
