"""Numbers of entries of a codebook: what each entry is worth to a query is known before any is read."""

from __future__ import annotations

import torch
from torch import Tensor

from malloc_bench.kernels.affine import FEW
from malloc_bench.kernels.switch import fits, spread


def serves(codes: Tensor, tables: Tensor, asked: Tensor) -> bool:
    """Where few queries, for they come one after the other, meet more slots than a part has entries; codes may be
    packed."""
    many = asked.shape[2] <= FEW and codes.shape[2] > tables.shape[2]
    alike = codes.shape[:2] == asked.shape[:2] and asked.dtype == tables.dtype == torch.float32
    return many and alike and fits(codes, tables, asked)


def dot(codes: Tensor, tables: Tensor, added: bool, q: Tensor) -> Tensor:
    """q . x: codes [B, H, S, N] uint8, tables [H, N, K, w], q [B, H, M, D] -> [B, H, M, S]. added: x is the sum of its
    entries, w = D; else they stand side by side."""
    from malloc_bench.kernels.loops import tables as loops  # here: its compiler takes half a second to load

    b, h, m, _ = q.shape
    if added:
        worth = torch.einsum("bhmd,hnkd->bhmnk", q, tables)
    else:
        worth = torch.einsum("bhmnw,hnkw->bhmnk", _parts(q, tables), tables)
    out = q.new_empty(b * h, m, codes.shape[2])
    arrays = [x.detach().flatten(0, 1).contiguous().numpy() for x in (codes, worth)] + [out.numpy()]
    spread(lambda start, stop: loops()[0](*arrays, start, stop), b * h, codes.numel() * m)
    return out.view(b, h, m, -1)


def mix(codes: Tensor, tables: Tensor, added: bool, w: Tensor, width: int) -> Tensor:
    """Weighted sums of the vectors: w [B, H, M, S] -> [B, H, M, width]."""
    from malloc_bench.kernels.loops import tables as loops

    b, h, m, _ = w.shape
    fallen = w.new_empty(b * h, m, *tables.shape[1:3])
    arrays = [x.detach().flatten(0, 1).contiguous().numpy() for x in (codes, w)] + [fallen.numpy()]
    spread(lambda start, stop: loops()[1](*arrays, start, stop), b * h, codes.numel() * m)
    fallen = fallen.view(b, h, m, *tables.shape[1:3])
    if added:
        return torch.einsum("bhmnk,hnkd->bhmd", fallen, tables)
    return torch.einsum("bhmnk,hnkw->bhmnw", fallen, tables).flatten(3)[..., :width]


def _parts(q: Tensor, tables: Tensor) -> Tensor:
    """[B, H, M, D] -> [B, H, M, N, w], the last part filled up with zeros."""
    _, n, _, w = tables.shape
    return torch.nn.functional.pad(q, (0, n * w - q.shape[3])).unflatten(3, (n, w))
