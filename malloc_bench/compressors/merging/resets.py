"""Some slots stay as they are; all others become cluster means that count for their events."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from malloc_bench.compressors.base import as_compressor, grows
from malloc_bench.compressors.merging.clusters import ASKED, spread
from malloc_bench.compressors.merging.kmeans import KMeans
from malloc_bench.compressors.selection import Eviction
from malloc_bench.registry import register
from malloc_bench.state import Prefill, Stats


@register("resets")
@dataclass(frozen=True)
class Resets(KMeans):
    """Keeps k/2 slots that another method would, and of the rest k/2 cluster means, log of their counts in the logits.

    inner: the method that scores. What would be evicted is clustered by `kmeans`; kept slots take nothing in. ResKV is
    known here by others' notes only ([S]): how it clusters is `kmeans`', the halves are ours.
    """

    inner: Any = "h2o"
    needs_at_best = False

    family = "merging"
    paper = "ResKV as described by others: cluster means of evicted slots with log counts"
    formula = "k/2 slots by the inner score; the others in k/2 clusters of keys: means, mass = events in it"
    growth = grows(compress="k n L d")
    stores = "k keys and values a layer and head, their counts, and mean positions where the backbone reads them"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "inner", as_compressor(self.inner))
        if not isinstance(self.inner, Eviction):
            raise ValueError(f"resets: an inner method that scores is needed, not {self.inner}")

    @property
    def needs(self) -> Stats:
        return self.inner.needs | ASKED

    def supports(self, backbone: Any) -> str | None:
        return super().supports(backbone) or self.inner.supports(backbone)

    def seeds(self, prefill: Prefill, layer: int, k: Tensor, size: int) -> tuple[Tensor, Tensor]:
        count, half = prefill.slots(layer).count[:, 0].long(), k // 2
        width = prefill.segment(layer).width
        early = self.inner.index(prefill, layer, half)  # [B, H, max half]
        beyond = torch.arange(early.shape[2], device=k.device) >= half.view(-1, 1, 1)
        kept = torch.zeros(*early.shape[:2], width + 1, dtype=torch.long, device=k.device)
        kept.scatter_(2, early.masked_fill(beyond, width), 1)
        kept = kept[..., :width]
        rest = (1 - kept).argsort(dim=-1, descending=True, stable=True)  # slots that are not kept, in time order
        more = spread(count - half, k - half, size)[:, None].expand(-1, early.shape[1], -1)
        more = rest.gather(2, more.clamp(max=width - 1))
        fits = torch.arange(size, device=k.device) < (k - half).view(-1, 1, 1)
        marks = torch.zeros(*early.shape[:2], width + 1, dtype=torch.long, device=k.device)
        marks.scatter_(2, more.masked_fill(~fits, width), 1)
        chosen = (marks[..., :width] + kept).argsort(dim=-1, descending=True, stable=True)[..., :size]
        return chosen, kept.gather(2, chosen).bool()
