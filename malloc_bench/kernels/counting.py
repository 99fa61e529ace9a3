"""How many scores reach a mark."""

from __future__ import annotations

import torch
from torch import Tensor

from malloc_bench.kernels.switch import fits, spread


def reach(scores: Tensor, marks: Tensor) -> Tensor | None:
    """How many of scores [B, n] are no less than each of marks [B, M], [B, M] int32."""
    if scores.dtype != torch.float32 or not fits(scores, marks):
        return None
    from malloc_bench.kernels.counts import counted  # here: its compiler takes half a second to load

    count = torch.empty(marks.shape, dtype=torch.int32)
    arrays = scores.detach().numpy(), marks.detach().numpy(), count.numpy()
    spread(lambda start, stop: counted(*arrays, start, stop), len(scores), scores.numel())
    return count
