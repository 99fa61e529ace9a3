"""Whether Triton reads what lies on a GPU."""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from malloc_bench.kernels.switch import fits, stopped

log = logging.getLogger(__name__)


@cache
def _triton() -> str | None:
    """What Triton reads, if it is here and wanted: what lies on GPUs, in its interpreter what lies on CPUs."""
    if os.environ.get("MALLOC_BENCH_KERNELS", "") == "eager" or find_spec("triton") is None:
        return None
    return "cpu" if os.environ.get("TRITON_INTERPRET", "") == "1" else "cuda"


def on_gpu(*given: Tensor) -> ModuleType | None:
    """`kernels.tiles` where it may read these."""
    kind = _triton()
    if kind is None or stopped() or any(x.device.type != kind for x in given):
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return None
    return _tiles(given[0].device)


@cache
def _tiles(device: torch.device) -> ModuleType | None:
    """Tried once, before anything is measured."""
    try:
        from malloc_bench.kernels import tiles  # here: Triton need not be installed

        tiles.tried(device)
    except Exception as wrong:
        log.warning("Triton does not read on %s, plain torch does: %s: %s", device, type(wrong).__name__, wrong)
        return None
    return tiles


def reads(x: Tensor) -> bool:
    """Whether some kernel reads for what lies where x does."""
    return fits(x) or on_gpu(x) is not None
