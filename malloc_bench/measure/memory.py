"""Peak memory of a call, in bytes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")

_FRESH = torch.ops.aten.lift_fresh.default  # torch.tensor(...) hands in the storage that it has just made


def peak_memory(fn: Callable[[], T], device: str | torch.device = "cpu") -> tuple[T, int]:
    """fn() and the most bytes of tensors that it held at one time, beyond those that existed before the call.

    The result counts as long as it lives, memory that fn only looks at does not. CPU: exact sizes of all storages that
    operators return, about 8 us an operator; scratch inside a kernel is not seen. CUDA: the allocator's own statistics,
    which round every tensor up to 512 bytes and do see scratch.
    """
    device = torch.device(device)
    if device.type == "cuda":
        gc.collect()  # what would else be freed during the call
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = fn()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    tracker = _Storages()
    with tracker:
        result = fn()
    return result, tracker.peak


class _Storages(TorchDispatchMode):
    """Follows every storage from the operator that returns it first until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int | None] = {}  # of live storages, by address of the storage; None: was there before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # in inference mode compound operators arrive whole: their temporaries are in their parts
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        if func is not _FRESH:
            for x in tree_leaves((args, kwargs)):
                self._see(x, new=False)
        out = func(*args, **kwargs)
        for x in tree_leaves(out):
            self._see(x, new=True)
        return out

    def _see(self, x: Any, new: bool) -> None:
        if not isinstance(x, Tensor) or x.device.type != "cpu" or x.layout is not torch.strided:
            return
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = 0 if new else None
            weakref.finalize(storage, self._freed, key).atexit = False
        size = self.sizes[key]
        if size is not None:  # an operator may have resized it
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes() - size
            self.peak = max(self.peak, self.now)

    def _freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key) or 0
