"""How many scores reach another."""

from __future__ import annotations

import torch
from torch import Tensor

from malloc_bench.kernels.switch import fits, spread


def reach(scores: Tensor, marked: Tensor, count: Tensor) -> bool:
    """Write how many of scores [B, n] are no less than each of those in the columns marked [B, M] int64 to count [B, M]
    int32; False where there is no kernel for these."""
    if scores.dtype != torch.float32 or not fits(scores, marked):
        return False
    from malloc_bench.kernels.counts import counted  # here: its compiler takes half a second to load

    arrays = scores.detach().numpy(), marked.numpy(), count.numpy()
    spread(lambda start, stop: counted(*arrays, start, stop), len(scores), scores.numel())
    return True
