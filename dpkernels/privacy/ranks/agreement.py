"""What must be the same on all ranks when a run begins, and the first values of the trained parameters: rank 0's."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpkernels.privacy.ranks.group import SET_UP, Ranks


def check_same_run(
    ranks: Ranks, constants: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor, bool]]
) -> None:
    """Raise RanksError, on every rank, unless the ranks have the same constants and the same model.

    Args:
        ranks: the processes.
        constants: what defines the run, by name: values with a repr that shows all of them.
        tensors: name, tensor and whether it is trained, of all parameters and buffers. Of trained ones only shape,
            dtype and device are compared, and of sharded ones shape and dtype (`shard_frozen` compares their values
            while each rank has all).
    """
    if ranks.size == 1:
        return
    facts: dict[str, Any] = {name: repr(value) for name, value in constants.items()}
    # By numbers: each rank has devices of its own, and exchanges the parameters of each apart.
    devices: dict[torch.device, int] = {}
    for name, tensor, trained in tensors:
        kind = f"not trained, {tensor.dtype}, {tuple(tensor.shape)}"
        if trained:
            number = devices.setdefault(tensor.device, len(devices))
            kind = kind.removeprefix("not ") + f", on {tensor.device.type} (device {number} of the model's)"
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta
        facts[f"model's {name}"] = kind if trained or not plain else f"{kind}, bits {bits_of(tensor)}"
    ranks.check_same(SET_UP, facts)


@torch.no_grad()
def take_first_values(ranks: Ranks, parameters: Iterable[Tensor]) -> None:
    """Copy rank 0's values of these parameters to all ranks."""
    if ranks.size == 1:
        return
    first = dist.get_process_group_ranks(ranks.group)[0]
    for parameter in parameters:
        values = parameter.detach().contiguous()
        dist.broadcast(values, first, group=ranks.group)
        if values.data_ptr() != parameter.data_ptr():
            parameter.copy_(values)


def bits_of(tensor: Tensor) -> int:
    """A sum over a tensor's bytes, weighted by position."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    words = flat[: len(flat) // 8 * 8].view(torch.int64)
    # Odd multipliers: an exchange of two words changes the sum. int64 arithmetic wraps around.
    total = torch.sum(words * (2 * torch.arange(len(words), device=words.device) + 1))
    return int(total + torch.sum(flat[len(words) * 8 :], dtype=torch.int64))
