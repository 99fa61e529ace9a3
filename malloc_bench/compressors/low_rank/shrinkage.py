"""Optimal shrinkage of singular values under white noise of unknown size (Gavish and Donoho, arXiv 1405.7511)."""

from functools import lru_cache

import torch
from torch import Tensor

from malloc_bench.state import LowRank, factor


def shrunk(x: Tensor, mask: Tensor) -> LowRank:
    """The low-rank part of x [B, H, S, D]; mask [B, H or 1, S]."""
    x = torch.where(mask.unsqueeze(-1), x, 0.0).double()
    d, n = x.shape[3], mask.sum(-1).expand(x.shape[:2])  # [B, H]
    gram = x.mT @ x
    most = gram.diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=1e-30)[..., None]
    square, basis = torch.linalg.eigh(gram / most.unsqueeze(-1))
    s, basis = square.flip(-1).clamp(min=0).sqrt(), basis.flip(-1)  # in units of the root of `most`
    short = n.clamp(max=d)
    ratio = short / n.clamp(min=d)
    middle = s.gather(-1, (short // 2).clamp(max=d - 1).unsqueeze(-1))
    table = medians().to(x.device)
    t2 = middle.square() / table[(ratio * (len(table) - 1)).round().long()].unsqueeze(-1)
    ratio = ratio.unsqueeze(-1)
    stands = (s.square() > (1 + ratio.sqrt()).square() * t2) & (s > 1e-6 * s[..., :1])
    size = ((s.square() - (ratio + 1) * t2).square() - 4 * ratio * t2.square()).clamp(min=0).sqrt() / s.square()
    rank = stands.sum(-1)
    width = max(int(rank.max()), 1) if rank.numel() else 1
    left = (x @ basis[..., :width]) * torch.where(stands, size, 0.0)[..., None, :width]
    return LowRank(factor(left.float(), mask, rank, d, torch.float16), basis[..., :width].mT.half().contiguous(), d)


@lru_cache(maxsize=1)
def medians(steps: int = 200) -> Tensor:
    """Median of the Marchenko-Pastur law for ratios 0, 1 / steps, ... 1, float64."""
    found = [1.0]
    for i in range(1, steps + 1):
        b = i / steps
        low, high = (1 - b**0.5) ** 2, (1 + b**0.5) ** 2
        angle = (torch.arange(4000, dtype=torch.float64) + 0.5) * torch.pi / 4000
        at = (low + high) / 2 - (high - low) / 2 * angle.cos()  # close to each other at both ends
        mass = ((high - at) * (at - low)).sqrt() / at * angle.sin()
        below = mass.cumsum(0) / mass.sum()
        found.append(float(at[torch.searchsorted(below, 0.5)]))
    return torch.tensor(found, dtype=torch.float64)
