"""What is evicted is folded into the kept event that is most like it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from malloc_bench.compressors.base import Sources, as_compressor, grows
from malloc_bench.compressors.merging.clusters import ASKED, Clusters, compared_shapes, placed, unit
from malloc_bench.compressors.selection import Eviction
from malloc_bench.registry import register
from malloc_bench.state import Prefill, Stats, UserState


@register("d2o")
@dataclass(frozen=True)
class D2O(Clusters):
    """Another method chooses k slots; each of the others joins the kept one of the nearest key, weighted by cosine.

    inner: the method that scores, a name or {name: {parameter: value}}. A slot counts exp(cosine) in its cluster, the
    kept one exp(1), as in the paper's weights. The paper drops slots that are like none, by a running threshold of a
    decoding model; here all join, and a cluster's mass is its events, which is ours.
    """

    inner: Any = "h2o"

    grid = {"inner": ("h2o", "snapkv", "tova", "knorm")}
    family = "merging"
    version_placed = 3
    paper = "D2O, Wan et al., ICLR 2025, arXiv 2406.13035"
    formula = "weights in a cluster: exp(cos(k_i, k_kept)) / sum; the kept slots by the inner score"
    growth = grows(compress="h n^2 L + k n L d")
    stores = "k merged keys and values a layer and head, their counts, and mean positions where the backbone reads them"

    def __post_init__(self) -> None:
        object.__setattr__(self, "inner", as_compressor(self.inner))
        if not isinstance(self.inner, Eviction):
            raise ValueError(f"d2o: an inner method that scores is needed, not {self.inner}")

    @property
    def needs(self) -> Stats:
        return self.inner.needs | ASKED

    def supports(self, backbone: Any) -> str | None:
        return super().supports(backbone) or self.inner.supports(backbone)

    def owners(self, prefill: Prefill, layer: int, k: Tensor) -> Tensor:
        x = unit(placed(prefill, layer))
        kept = self._kept(prefill, layer, k, x.shape[1])  # [B, H, K] slots, in time order
        if kept.shape[2] == 0:
            return torch.zeros(x.shape[:3], dtype=torch.long, device=x.device)
        spare = torch.arange(kept.shape[2], device=k.device) >= k.view(-1, 1, 1)
        near = x @ x.gather(2, kept.unsqueeze(-1).expand(-1, -1, -1, x.shape[3])).mT  # [B, H, S, K]
        owner = near.masked_fill(spare[:, :, None], -torch.inf).argmax(-1)
        own = torch.where(spare, kept.shape[2], torch.arange(kept.shape[2], device=k.device)).expand_as(kept)
        pinned = torch.full_like(owner, kept.shape[2]).scatter_reduce(2, kept, own, "amin")
        return torch.where(pinned < kept.shape[2], pinned, owner)

    def shares(self, prefill: Prefill, layer: int, owners: Tensor, mass: Tensor) -> Tensor:
        x = unit(placed(prefill, layer))
        k = (owners.masked_fill(mass <= 0, -1).amax(-1)[:, 0] + 1) if x.shape[2] else mass.new_zeros(len(mass)).long()
        kept = self._kept(prefill, layer, k, x.shape[1])
        if kept.shape[2] == 0:
            return mass
        chosen = kept.gather(2, owners.clamp(max=kept.shape[2] - 1))
        cosine = (x * x.gather(2, chosen.unsqueeze(-1).expand_as(x))).sum(-1)
        return cosine.exp() * mass

    def flops(self, state: UserState, of: Sources) -> int:
        """Products of all keys with the kept ones, and what the inner method costs."""
        near = sum(2 * h * x.events * kept * width for x, (h, kept, width) in zip(of, compared_shapes(state)))
        return near + super().flops(state, of)

    def _kept(self, prefill: Prefill, layer: int, k: Tensor, heads: int) -> Tensor:
        return self.inner.index(prefill, layer, k).expand(-1, heads, -1)
