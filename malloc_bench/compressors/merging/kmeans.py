"""Similar events become one slot, wherever they stand."""

from dataclasses import dataclass

import torch
from torch import Tensor

from malloc_bench.compressors.base import Sources, grows
from malloc_bench.compressors.merging.clusters import ASKED, Clusters, compared_shapes, placed, spread
from malloc_bench.registry import register
from malloc_bench.state import Prefill, Stats, UserState, grouped


@register("kmeans")
@dataclass(frozen=True)
class KMeans(Clusters):
    """Clusters each head's keys by Lloyd's algorithm; a cluster's mean key and value stand for all of its events.

    Begins with k slots evenly spaced in time, the newest among them, each of which stays in its own cluster, so that
    none is empty and no number is drawn. Where slots have a bias by place it is one number more of a key, over twice
    the root mean square of the newest 64 queries. TWIN V2 clusters a life's behaviours so, offline; the count term is
    ours.
    """

    rounds: int = 5

    grid = {"rounds": (1, 2, 5, 10)}
    family = "merging"
    version_placed = 3
    needs_at_best = True
    paper = "the hierarchical clusters of TWIN V2, Si et al., CIKM 2024, arXiv 2407.16357"
    formula = (
        "k clusters of keys and biases by squared distance; key and value = mean over the cluster, mass = its events"
    )
    growth = grows(compress="k n L d")
    stores = "k mean keys and values a layer and head, their counts, and mean positions where the backbone reads them"

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"kmeans: rounds >= 1 is needed, not {self.rounds}")

    @property
    def needs(self) -> Stats:
        return ASKED

    def owners(self, prefill: Prefill, layer: int, k: Tensor) -> Tensor:
        x, real = placed(prefill, layer), prefill.mask(layer).unsqueeze(-1)
        b, h, s, d = x.shape
        size = int(k.max()) if b else 0
        if not size or not s:
            return torch.zeros(b, h, s, dtype=torch.long, device=x.device)
        x = x / x.abs().amax((2, 3), keepdim=True).clamp(min=1e-30)  # squares of huge keys stay finite
        seeds, alone = self.seeds(prefill, layer, k, size)
        seeds = seeds.expand(-1, h, -1)
        spare = torch.arange(size, device=x.device) >= k.view(-1, 1, 1)  # clusters that a user has not
        centres = x.gather(2, seeds.unsqueeze(-1).expand(-1, -1, -1, d))
        own = torch.where(spare, size, torch.arange(size, device=x.device)).expand(b, h, -1)
        owner = own.new_zeros(b, h, s)
        for _ in range(self.rounds):
            far = torch.where(spare | alone, torch.inf, centres.square().sum(-1))[:, :, None]
            owner = (far - 2 * x @ centres.mT).argmin(-1)  # less |x|^2, the same for all centres
            pinned = torch.full((b, h, s), size, device=x.device).scatter_reduce(2, seeds, own, "amin")
            owner = torch.where(pinned < size, pinned, owner)
            sums = grouped(x, owner, size)
            count = grouped(real.expand(b, h, s, 1).to(x.dtype), owner, size)
            centres = sums / count.clamp(min=1)
        return owner

    def seeds(self, prefill: Prefill, layer: int, k: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """The slots that clusters begin with, in time order, [B, H or 1, size] of which k [B] count, and the same shape
        bool: clusters that nothing may join, fewer than k unless k is the count."""
        seeds = spread(prefill.slots(layer).count[:, 0].long(), k, size)[:, None]
        return seeds, torch.zeros_like(seeds, dtype=torch.bool)

    def flops(self, state: UserState, of: Sources) -> int:
        """Products of all keys with all centres, each round."""
        pairs = sum(h * x.events * kept * width for x, (h, kept, width) in zip(of, compared_shapes(state)))
        return super().flops(state, of) + 2 * self.rounds * pairs
