"""Writing vectors as codes of few bits."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from malloc_bench.kernels.switch import fits, spread

BITS = (1, 2, 4, 8)  # codes that cross no byte


def spans(x: Tensor, mask: Tensor, bits: int, group: int, along: Literal["slots", "width"]) -> list[Tensor] | None:
    """Least and greatest of each group, 0 of padding: x [B, H, S, D], mask [B, H or 1, S] -> two [B, H, G, W]."""
    if not _serves(x, mask, bits):
        return None
    from malloc_bench.kernels.writers import writers  # here: its compiler takes half a second to load

    b, h, s, d = x.shape
    shape = (-(-s // group), d) if along == "slots" else (s, -(-d // group))
    found = [x.new_empty(b, h, *shape) for _ in range(2)]
    call = writers(bits).span_by_channel if along == "slots" else writers(bits).span_by_slot
    arrays = [*_rows(x, mask), group, *(each.view(b * h, *shape).numpy() for each in found)]
    spread(lambda start, stop: call(*arrays, start, stop), b * h, x.numel())
    return found


def write(
    x: Tensor, mask: Tensor, bits: int, group: int, along: Literal["slots", "width"], step: Tensor, zero: Tensor | None
) -> Tensor | None:
    """Codes [B, H, S, ceil(D bits / 8)] uint8 of (x - zero) / step, or of x / step around the middle code where zero is
    None; step and zero [B, H, G, W], as `spans` has them."""
    if not _serves(x, mask, bits):
        return None
    from malloc_bench.kernels.writers import writers

    b, h, s, d = x.shape
    codes = torch.empty(b, h, s, -(-d * bits // 8), dtype=torch.uint8)
    middle, least = (0.0, 0.0) if zero is not None else (2.0 ** (bits - 1), 1.0)
    low = step if zero is None else zero  # not looked at
    sizes = (each.expand(b, h, *each.shape[2:]).contiguous().flatten(0, 1).numpy() for each in (step, low))
    call = writers(bits).write_by_channel if along == "slots" else writers(bits).write_by_slot
    limits = (np.float32(each) for each in (middle, least, 2**bits - 1))
    arrays = [*_rows(x, mask), group, *sizes, *limits, codes.flatten(0, 1).numpy()]
    spread(lambda start, stop: call(*arrays, start, stop), b * h, x.numel())
    return codes


def _serves(x: Tensor, mask: Tensor, bits: int) -> bool:
    return bits in BITS and x.dtype == torch.float32 and bool(x.numel()) and fits(x, mask)


def _rows(x: Tensor, mask: Tensor) -> list:  # type: ignore[type-arg]
    b, h, s, _ = x.shape
    real = mask.expand(b, h, s).contiguous().flatten(0, 1)
    return [x.detach().contiguous().flatten(0, 1).numpy(), real.numpy()]
