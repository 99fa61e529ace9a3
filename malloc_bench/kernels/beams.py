"""Vectors as sums of entries, one of each codebook, of which several are held until the last."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from malloc_bench.kernels.switch import fits, spread


def nearest_sums(rows: Tensor, tables: Tensor, beam: int, kids: int) -> Tensor | None:
    """Codes [H, N, M] uint8 of rows [H, N, D] float32 among tables [H, M, K, D]: after each table the `beam` nearest
    sums are held, each tried with its `kids` nearest entries of the next; in the end the nearest one is taken."""
    if rows.dtype != torch.float32 or not rows.numel() or not fits(rows, tables):
        return None
    from malloc_bench.kernels.holding import held  # here: its compiler takes half a second to load

    heads, many, stages, size, width = *rows.shape[:2], *tables.shape[1:]
    left, codes = rows.reshape(heads * many, 1, width), rows.new_empty(heads * many, 1, stages, dtype=torch.uint8)
    for stage, entries in enumerate(tables.unbind(1)):
        half = entries.square().sum(-1).unsqueeze(1) / 2
        near = torch.baddbmm(half, left.view(heads, -1, width), entries.mT, alpha=-1)
        each = min(beam if stage == 0 else kids, size)
        wide = min(beam, left.shape[1] * each)
        onward = left.new_empty(len(left), wide, width), codes.new_empty(len(left), wide, stages)
        given = [x.detach().numpy() for x in (near.view(*left.shape[:2], size), left, codes, entries.contiguous())]
        after = [x.numpy() for x in onward]
        spread(partial(held, *given, each, stage, *after), len(left), near.numel())
        left, codes = onward
    first = left.square().sum(-1).argmin(1)
    return codes[torch.arange(len(codes)), first].view(heads, many, stages)
