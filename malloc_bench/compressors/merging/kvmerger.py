"""Runs of alike neighbours become one slot, drawn towards the run's most typical event."""

from dataclasses import dataclass

import torch
from torch import Tensor

from malloc_bench.compressors.merging.clusters import Clusters, compared, unit
from malloc_bench.registry import register
from malloc_bench.state import Prefill, grouped


@register("kvmerger")
@dataclass(frozen=True)
class KVMerger(Clusters):
    """Cuts the history where neighbouring keys differ most, and merges each run by a Gaussian kernel around its pivot.

    The paper cuts by a threshold on the cosine of neighbours; the k - 1 deepest cuts are that threshold for a budget.
    The pivot is the slot nearest to the run's mean direction (the paper's: of most attention), of equals the newest;
    the kernel's width is the mean distance of the run's keys to it. A run's mass is its events, which is ours.
    """

    family = "merging"
    paper = "KVMerger, Wang et al., Model Tells You Where to Merge, arXiv 2407.08454"
    formula = "weights in a run: exp(-|k_p - k_i|^2 / (2 sigma^2)), sigma = mean |k_p - k_i|; sums come to 1"
    stores = "k merged keys and values a layer and head, their counts, and mean positions where the backbone reads them"

    def owners(self, prefill: Prefill, layer: int, k: Tensor) -> Tensor:
        x = compared(prefill, layer)
        b, h, s, _ = x.shape
        if s == 0:
            return torch.zeros(b, h, s, dtype=torch.long, device=x.device)
        alike = (unit(x[:, :, 1:]) * unit(x[:, :, :-1])).sum(-1)  # [B, H, S - 1]: slot i + 1 and the one before
        inside = torch.arange(1, s, device=x.device) < prefill.slots(layer).count.unsqueeze(-1)
        order = alike.masked_fill(~inside, torch.inf).argsort(dim=-1, stable=True)
        cuts = torch.arange(s - 1, device=x.device) < (k - 1).view(-1, 1, 1)
        cut = torch.zeros(b, h, s, dtype=torch.long, device=x.device)
        cut[:, :, 1:].scatter_(2, order, cuts.expand(b, h, -1).long())
        return cut.cumsum(-1)

    def shares(self, prefill: Prefill, layer: int, owners: Tensor, mass: Tensor) -> Tensor:
        x = compared(prefill, layer)
        if not x.numel():
            return mass
        size = int(owners.max()) + 1
        at = owners.unsqueeze(-1).expand_as(x)
        ways = unit(x) * (mass > 0).unsqueeze(-1)
        mean = grouped(ways, owners, size).gather(2, at)
        typical = (ways * mean).sum(-1).masked_fill(mass <= 0, -torch.inf)
        best = typical.new_full((*x.shape[:2], size), -torch.inf).scatter_reduce(2, owners, typical, "amax")
        slot = torch.arange(x.shape[2], device=x.device).expand_as(owners)
        pivots = slot.new_zeros(*x.shape[:2], size).scatter_reduce(
            2, owners, torch.where(typical >= best.gather(2, owners) - 1e-5, slot, 0), "amax"
        )
        pivot = x.gather(2, pivots.gather(2, owners).unsqueeze(-1).expand_as(x))
        gap = (x - pivot).norm(dim=-1)
        inside = (mass > 0).to(gap.dtype)
        total, count = (
            gap.new_zeros(*x.shape[:2], size).scatter_add_(2, owners, y * inside) for y in (gap, torch.ones_like(gap))
        )
        sigma = (total / count.clamp(min=1)).gather(2, owners)
        return torch.where(sigma > 0, (-0.5 * (gap / sigma.clamp(min=1e-30)) ** 2).exp(), 1.0) * mass
