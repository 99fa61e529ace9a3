"""Sums of rows over the groups that they are in."""

from __future__ import annotations

import torch
from torch import Tensor

from malloc_bench.kernels.switch import fits, spread


def group(x: Tensor, of: Tensor, size: int, weight: Tensor | None = None) -> Tensor | None:
    """Sums [B, H, size, D] of the rows of x [B, H, S, D], times weight [B, H or 1, S], over the groups `of` [B, H or 1,
    S] int64 that they are in; rows of a group beyond the last are left out. Not a bit is other than torch's."""
    if x.dtype not in (torch.float32, torch.float64) or not x.numel() or not size:
        return None
    if not fits(x, of, *([] if weight is None else [weight])):
        return None
    from malloc_bench.kernels.groups import added, weighed  # here: its compiler takes half a second to load

    b, h, s, d = x.shape
    out = x.new_zeros(b, h, size, d)
    given = [of] if weight is None else [of, weight.to(x.dtype)]
    rows = [each.expand(b, h, s).reshape(b * h, s).detach().numpy() for each in given]
    arrays = [x.detach().contiguous().view(b * h, s, d).numpy(), *rows, out.view(b * h, size, d).numpy()]
    call = added if weight is None else weighed
    spread(lambda start, stop: call(*arrays, start, stop), b * h, x.numel())
    return out
