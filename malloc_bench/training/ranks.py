"""Training by several processes that torchrun has started: they share every batch, and the first one writes.

Each draws the same batches, learns from its rows of them, and adds up the gradients with the others, weighed by how
many targets each had: the step is that of one process, to rounding. Dropout is drawn by each for its own rows, so that
with it the weights are others, as good. Data and cache must be under the same path for all.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from malloc_bench.state import map_tensors

T = TypeVar("T")
_LONG = timedelta(days=7)  # the others wait while the first one validates, or waits for another run's training


@contextlib.contextmanager
def met(device: torch.device) -> Iterator[torch.device]:
    """The processes of torchrun come together; the device of this one. Without torchrun it is alone."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_LONG)
    try:
        yield device
        dist.barrier()  # who leaves while another still speaks ends it
    finally:
        dist.destroy_process_group()


def together() -> bool:
    return dist.is_initialized()


def rank() -> int:
    """Of this process among them, from 0."""
    return dist.get_rank() if together() else 0


def first(work: Callable[[], T]) -> T:
    """What `work` gives, or raises, in the first process: for all of them, which wait for it."""
    if not together():
        return work()
    told: list[Any] = [None, None]
    if rank() == 0:
        try:
            told[0] = work()
        except Exception as error:
            told[1] = error
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    return told[0]


def share(batch: T) -> T:
    """This process's rows of a batch."""
    return map_tensors(lambda x: x[rank() :: dist.get_world_size()], batch) if together() else batch


def alike(model: nn.Module) -> None:
    """Every process begins from the first one's weights."""
    for x in model.state_dict().values() if together() else ():
        dist.broadcast(x, 0)


def add_up(model: nn.Module) -> None:
    """Sum the gradients over the processes; a parameter that none of them has used keeps none."""
    if not together():
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    used = torch.tensor([p.grad is not None for p in parameters], device=parameters[0].device).int()
    dist.all_reduce(used)
    summed = [p for p, n in zip(parameters, used.tolist()) if n]
    for p in summed:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    for each in [dist.all_reduce(p.grad, async_op=True) for p in summed]:
        each.wait()
