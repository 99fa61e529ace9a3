"""Sums of slots over the groups that they are in."""

from __future__ import annotations

import torch
from torch import Tensor

from malloc_bench import kernels


def grouped(x: Tensor, group: Tensor, size: int, weight: Tensor | None = None) -> Tensor:
    """Sums [B, H, size, D] of rows x [B, H or 1, S, D], times weight [B, H or 1, S], by their group [B, H or 1, S]
    int64. Rows of group `size` are left out, whatever they hold.
    """
    if weight is not None:
        x = x.to(torch.promote_types(x.dtype, weight.dtype))
    x = x.expand(-1, max(each.shape[1] for each in (x, group, weight) if each is not None), -1, -1)
    found = kernels.group(x, group, size, weight)
    if found is None:
        x = x if weight is None else x * weight.unsqueeze(-1)
        out = x.new_zeros(*x.shape[:2], size + 1, x.shape[3])
        at = group.expand(x.shape[:3]).unsqueeze(-1).expand_as(x)
        found = out.scatter_add_(2, at, x)[:, :, :size]
    return found
