"""Joining the processes that torchrun started."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others: longer than the slowest may take from one step to the next, a first
compilation, an evaluation and a checkpoint included."""


def join_processes(timeout: timedelta = TIMEOUT) -> bool:
    """Initialise torch.distributed for the processes that torchrun or `accelerate launch` started.

    Each gets the GPU of its local rank, if there are GPUs; gradients and parameters then travel by NCCL and all else
    by gloo. Does nothing in a process that was started alone, and where torch.distributed is initialised already.

    After a failure torchrun may start all processes again with the same store, in which gloo would find the addresses
    of the processes that ended, and wait for them in vain (seen with torch 2.13). Every start has keys of its own here.

    Args:
        timeout: after which a process gives up waiting for another one.

    Returns:
        Whether this call initialised it: call torch.distributed.destroy_process_group() at the end.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1 or dist.is_initialized():
        return False
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"start {start}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return True
